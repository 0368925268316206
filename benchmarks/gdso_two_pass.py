"""What does the two-pass gradient of a GDSO step cost in time, and what does it save in memory?

P pairs of drawn pictures, G = 8 outputs of about 48 random tokens behind each side's prompt and 96x96 picture, the demo
student's body in float32. The loss is that of a GDSO step: cross-entropy of every output's score (eq. 8), errors of the
score gaps over all G x G cross pairs (eq. 11), and the policy gradient on the outputs' tokens (eqs. 3, 4 and 13).

Three ways to one gradient: `two_pass` over micro-batches of 8 of like lengths, as GDSO makes them; all sequences in one
batch, padded to the longest, whose graph is held at once; and the same micro-batches with all their graphs held
(`kept`), which shows what the batches' size and padding alone do to the time. They run in turn in one process, in one
order and the other, and each round gives a ratio; seconds of the process's processor stand beside the clock's, because
others use the machine. Memory is that of tensors above what a resting process holds (parameters), gradients included,
each way in a process of its own (see `_memory.py`).

    python benchmarks/gdso_two_pass.py [--pairs 4] [--micro-batch 8] [--rounds 8]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import report  # type: ignore[import-not-found]
from _memory import Resident, Tensors, in_child, peak  # type: ignore[import-not-found]

from tests.trainers import world_set
from zscore._torchvision import ensure_importable
from zscore.demo.student import untrained_student
from zscore_trainers import losses
from zscore_trainers.policy import PolicyBatch, ScorePolicy
from zscore_trainers.two_pass import two_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

GROUP = 8
OUTPUT = (40, 56)
"""Fewest and most tokens of an output."""
BYTES = 256
"""Tokens of the demo's tokenizer that are text: its first."""
PATCHES = 36
"""Of a picture of 96x96 pixels."""
WAYS = ("two_pass", "single", "kept")
MOST_TIME, MOST_MEMORY = 1.4, 0.25


@dataclass(frozen=True)
class Problem:
    """The sequences of a step, and what they are worth."""

    policy: ScorePolicy
    batch: PolicyBatch
    outputs_NT: Tensor
    """Which tokens are the outputs'."""
    label_PJ: Tensor
    values_K: Tensor

    @classmethod
    def drawn(cls, folder: Path, pairs: int) -> Problem:
        """Pairs of drawn pictures with random outputs."""
        ensure_importable()
        model = untrained_student()
        collate = world_set.collator(world_set.world_set(folder, pairs), folder, model, "separate")
        policy = world_set.load(model)
        values_K = torch.tensor(world_set.RUBRIC.values)
        rng = torch.Generator().manual_seed(0)
        rows, pictures, labels = [], [], []
        for sample in range(2 * pairs):
            batch, targets_BDK = collate([sample])
            prompt_T = batch.tokens_BT[0, : int(batch.mask_BT[0].sum())]
            for _ in range(GROUP):
                length = int(torch.randint(OUTPUT[0], OUTPUT[1] + 1, (), generator=rng))
                rows.append((len(prompt_T), torch.cat([prompt_T, torch.randint(BYTES, (length,), generator=rng)])))
                pictures.append(batch.pixels_NX[:PATCHES])
            labels.append(float(targets_BDK[0, 0] @ values_K))
        whole, outputs_NT = padded(rows, torch.cat(pictures))
        return cls(policy, whole, outputs_NT, torch.tensor(labels).reshape(pairs, 2), values_K)

    def forward(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Score logits (B, K) and token log-probabilities (B, T of the whole batch)."""
        found = self.policy(batch)
        assert found.logprob_BT is not None
        behind = self.batch.tokens_BT.shape[1] - found.logprob_BT.shape[1]
        return found.score_logits_BDK[:, 0], torch.nn.functional.pad(found.logprob_BT, (0, behind))

    def loss(self, logits_NK: Tensor, logprob_NT: Tensor) -> Tensor:
        """Of a GDSO step."""
        logits_PJGK = logits_NK.reshape(*self.label_PJ.shape, GROUP, -1)
        span = float(self.values_K[-1] - self.values_K[0])
        mu_PJG = losses.expected_score(logits_PJGK, self.values_K)
        reward_PJG = losses.gdso_reward(
            losses.pointwise_reward(mu_PJG, self.label_PJ, span),
            losses.pairwise_reward(mu_PJG, self.label_PJ, span),
            lambda_pt=1.0,
            lambda_pw=1.0,
        )
        advantage_N = losses.group_advantages(reward_PJG).flatten()
        return (
            losses.policy_gradient_loss(logprob_NT, advantage_N, self.outputs_NT)
            + losses.pointwise_loss(logits_PJGK, losses.label_targets(self.label_PJ, self.values_K))
            + losses.pairwise_loss(mu_PJG, self.label_PJ, span)
        )


def padded(rows: list[tuple[int, Tensor]], pixels_NX: Tensor) -> tuple[PolicyBatch, Tensor]:
    """Sequences of (tokens of the prompt, all tokens) as one batch, and where their outputs are."""
    lengths_N1 = torch.tensor([len(tokens) for _, tokens in rows]).unsqueeze(-1)
    prompts_N1 = torch.tensor([prompt for prompt, _ in rows]).unsqueeze(-1)
    tokens_NT = torch.nn.utils.rnn.pad_sequence([tokens for _, tokens in rows], batch_first=True)
    at_T = torch.arange(tokens_NT.shape[1])
    edge = int(PATCHES**0.5)
    batch = PolicyBatch(
        tokens_BT=tokens_NT,
        mask_BT=(at_T < lengths_N1).long(),
        pixels_NX=pixels_NX,
        grid_B3=torch.tensor([(1, edge, edge)] * len(rows)),
        probes_BD=lengths_N1 - 1,
    )
    return batch, (at_T >= prompts_N1) & (at_T < lengths_N1)


def split(batch: PolicyBatch, size: int) -> tuple[list[PolicyBatch], list[int]]:
    """Micro-batches of like lengths, as GDSO makes them, and which sequences they hold."""
    lengths_N = batch.mask_BT.sum(-1)
    order = torch.argsort(lengths_N, stable=True)
    pixels_NPX = batch.pixels_NX.unflatten(0, (len(order), PATCHES))

    def part(chosen: Tensor) -> PolicyBatch:
        longest = int(lengths_N[chosen].max())
        return PolicyBatch(
            tokens_BT=batch.tokens_BT[chosen, :longest],
            mask_BT=batch.mask_BT[chosen, :longest],
            pixels_NX=pixels_NPX[chosen].flatten(0, 1),
            grid_B3=batch.grid_B3[chosen],
            probes_BD=batch.probes_BD[chosen],
        )

    return [part(chosen) for chosen in order.split(size)], order.tolist()


def ways(problem: Problem, micro_batch: int) -> dict[str, Callable[[], Tensor]]:
    """Each adds the gradient of the step to the parameters' and returns the loss."""
    parts, order = split(problem.batch, micro_batch)
    back = torch.argsort(torch.tensor(order))

    def held(batches: list[PolicyBatch], back: Tensor | slice) -> Tensor:
        outputs = [problem.forward(batch) for batch in batches]
        value = problem.loss(*(torch.cat(tensors)[back] for tensors in zip(*outputs, strict=True)))
        value.backward()
        return value.detach()

    return {
        "two_pass": lambda: two_pass(problem.forward, parts, problem.loss, order=order),
        "single": lambda: held([problem.batch], slice(None)),
        "kept": lambda: held(parts, back),
    }


def gradient(problem: Problem) -> Tensor:
    """All parameters' in a row; they are cleared."""
    found = torch.cat([one.grad.flatten() for one in problem.policy.parameters() if one.grad is not None])
    problem.policy.zero_grad(set_to_none=True)
    return found


def child(folder: Path, options: argparse.Namespace) -> None:
    """Print what one way takes: of tensors in its third step, resident in its second."""
    problem = Problem.drawn(folder, options.pairs)
    way = ways(problem, options.micro_batch)[options.way]
    way()
    gradient(problem)
    resident = Resident()
    resident.rest()
    way()
    found = {"resident_mb": round(resident.peak() / 1e6, 1)}
    gradient(problem)
    with Tensors() as tensors:
        way()
    print(json.dumps({"tensors_mb": peak(tensors.changes)[0] / 1e6, **found}))


def memory(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way's figures, of a process of its own."""
    numbers = ["--pairs", str(options.pairs), "--micro-batch", str(options.micro_batch)]
    with tempfile.TemporaryDirectory() as folder:
        return in_child([__file__, "--child", folder, "--way", way, *numbers])


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - clock, time.process_time() - processor


def times(problem: Problem, options: argparse.Namespace) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Seconds by way and round, and by how much the gradients differ at most, relative to their norm."""
    steps = ways(problem, options.micro_batch)
    gradients = {}
    for name, step in steps.items():  # what the first call builds isn't timed
        step()
        gradients[name] = gradient(problem)
    wanted = gradients["single"]
    apart = max(float((one - wanted).norm() / wanted.norm()) for one in gradients.values())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in WAYS if number % 2 else reversed(WAYS):
            found[name].append(timed(steps[name]))
            problem.policy.zero_grad(set_to_none=True)
        print("  ".join(f"{name} {found[name][-1][0]:.2f} s" for name in WAYS), flush=True)
    return found, apart


def ratios(seconds: Mapping[str, list[tuple[float, float]]], other: str, clock: int) -> dict[str, Any]:
    """How many times as long the two passes take, round by round.

    What ran just before makes a difference, and rounds run in one order and the other in turn: the mean of both orders'
    medians.
    """
    by_round = [a[clock] / b[clock] for a, b in zip(seconds["two_pass"], seconds[other], strict=True)]
    medians = [statistics.median(by_round[order::2]) for order in range(2)]
    return {
        "mean_of_medians": round(statistics.mean(medians), 3),
        "by_order": [round(one, 3) for one in medians],
        "by_round": [round(one, 2) for one in by_round],
    }


def summary(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured."""
    seconds, apart = times(problem, options)
    taken = {way: memory(way, options) for way in WAYS}
    found = {
        "sequences": len(problem.batch.tokens_BT),
        "tokens": int(problem.batch.mask_BT.sum()),
        "micro_batch": options.micro_batch,
        "gradients_apart": apart,
        "seconds": {way: [round(clock, 2) for clock, _ in rounds] for way, rounds in seconds.items()},
        "time_over_single": ratios(seconds, "single", 0),
        "time_over_kept": ratios(seconds, "kept", 0),
        "processor_over_single": ratios(seconds, "single", 1),
        "processor_over_kept": ratios(seconds, "kept", 1),
        "memory": taken,
        "memory_over_single": round(taken["two_pass"]["tensors_mb"] / taken["single"]["tensors_mb"], 3),
        "wanted": f"time_over_single (mean_of_medians) <= {MOST_TIME}, memory_over_single <= {MOST_MEMORY}",
    }
    reached = {
        "time": found["time_over_single"]["mean_of_medians"] <= MOST_TIME,
        "memory": found["memory_over_single"] <= MOST_MEMORY,
    }
    return {**found, "reached": reached}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        report("gdso_two_pass", summary(Problem.drawn(Path(folder), options.pairs), options))


if __name__ == "__main__":
    main()
