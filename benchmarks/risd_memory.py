"""Does the memory of a RISD step depend on the size of the vocabulary?

One step of `zscore_trainers.engine` (forward, backward, clip, AdamW) on 8 samples of the drawn world, joint layout,
with a vocabulary of 1 k, 32 k and 248 k tokens; and the same step with the usual loss, which takes all logits
[B, T, V] from transformers' own forward pass, their log-softmax and then the level tokens. Each is a process of its
own; both ways compute the same gradient.

`rest_mb` is the highest sum of all tensors that the step allocates, exact to the byte (see `_memory.py`), but for those
of an embedding table's own size: the two tables' gradients, and copies of them, if autograd or the optimizer make any.
No other tensor has that size, since the vocabularies are primes; how many of them there were at a time is `tables`.
Weights and the optimizer's state were there before the step, which is one micro-batch (with more, autograd adds each
one's gradient to the sum, which is a table more at a time). `resident_mb` is the kernel's count, tables included.

    python benchmarks/risd_memory.py [--samples 8] [--vocabularies 1279 32003 248317]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import report  # type: ignore[import-not-found]
from _memory import Resident, Tensors, in_child, peak  # type: ignore[import-not-found]

from tests.trainers import world_set
from zscore._torchvision import ensure_importable
from zscore.demo.student import TEXT, build_student
from zscore_trainers.data import Order
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.losses import risd_loss
from zscore_trainers.risd import Risd, RisdConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from zscore_trainers.data import Collator
    from zscore_trainers.policy import PolicyBatch, ScorePolicy

# Primes, so that no activation is as large as a table; the last is just short of Qwen3.5's 248,320.
VOCABULARIES = (1279, 32_003, 248_317)
WAYS = ("zscore", "full logits")
MASS = RisdConfig().mass
LIMIT = 1.05
COLUMNS = ("rest_mb", "tables", "table_mb", "resident_mb")


class FullLogits:
    """RISD's loss the usual way: every logit of every position, then the few that are wanted."""

    def __init__(self, order: Order, collate: Collator) -> None:
        self._order = order
        self._collate = collate

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Add the gradients of one batch."""
        batch, teacher_BDK = self._collate(self._order.indices(step).tolist())
        logprob_BTV = all_logits(policy, batch).log_softmax(-1)
        rows_B1 = torch.arange(len(logprob_BTV)).unsqueeze(-1)
        level_BDK = logprob_BTV[rows_B1, batch.probes_BD][..., policy.level_token_ids_K]
        # The softmax over a few tokens' log-probabilities is the one over their logits.
        divergence = risd_loss(teacher_BDK.flatten(0, 1), level_BDK.flatten(0, 1))
        loss = divergence - MASS * level_BDK.logsumexp(-1).mean()
        loss.backward()
        return {"loss": float(loss.detach())}


def all_logits(policy: ScorePolicy, batch: PolicyBatch) -> Tensor:
    """Transformers' own forward pass, (B, T, V)."""
    model: Any = policy.model
    logits_BTV: Tensor = model(
        input_ids=batch.tokens_BT,
        attention_mask=batch.mask_BT,
        mm_token_type_ids=(batch.tokens_BT == model.config.image_token_id).int(),
        pixel_values=batch.pixels_NX,
        image_grid_thw=batch.grid_B3,
        use_cache=False,
    ).logits
    return logits_BTV


class EnoughError(Exception):
    """The steps that are measured are done."""


class Watch:
    """Measures the second step's resident memory and the third one's tensors; the first builds what stays."""

    def __init__(self, table: int) -> None:
        self._table = table
        self._resident, self._tensors = Resident(), Tensors()
        self.found: dict[str, Any] = {}

    def __call__(self, step: int, logged: Mapping[str, float]) -> None:
        """Called by the engine when a step is done."""
        if step == 1:
            self.found = {"loss": logged["loss"], "gradient_norm": logged["gradient_norm"]}
            self._resident.rest()
        elif step == 2:
            self.found["resident_mb"] = round(self._resident.peak() / 1e6, 1)
            self._tensors.start()
        else:
            self._tensors.stop()
            rest, tables = peak(self._tensors.changes, self._table)
            whole, _ = peak(self._tensors.changes)
            self.found |= {"rest_mb": rest / 1e6, "tables": tables, "whole_mb": whole / 1e6}
            raise EnoughError


def child(folder: Path, way: str, vocabulary: int, samples: int) -> None:
    """Build a student, train three steps, print what they took."""
    torch.manual_seed(0)
    ensure_importable()
    text = {"vocab_size": vocabulary, "num_hidden_layers": 2, "full_attention_interval": 2}
    build_student(folder / "student", text=text, vision={"depth": 1})
    policy = world_set.load(folder / "student")
    collate = world_set.collator(world_set.world_set(folder, samples // 2), folder, folder / "student")
    order = Order(samples, samples)
    config = RisdConfig(batch_size=samples, micro_batch=samples)
    algorithm = Risd(config, order, collate) if way == "zscore" else FullLogits(order, collate)
    # 5 steps, so that the engine doesn't save behind the third.
    engine = Engine(policy, algorithm, EngineConfig(steps=5, learning_rate=1e-6), folder)
    table = vocabulary * TEXT["hidden_size"] * 4
    watch = Watch(table)
    with contextlib.suppress(EnoughError):
        engine.run(watch)
    print(json.dumps({**watch.found, "table_mb": table / 1e6}))


def measure(way: str, vocabulary: int, samples: int) -> dict[str, Any]:
    """One step's figures, of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--way", way, "--vocabularies", str(vocabulary), "--samples", str(samples)]
        return in_child([__file__, "--child", folder, *options])


def show(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """A row a measurement."""
    print(f"{'':<12}{'vocabulary':>11}" + "".join(f"{name:>13}" for name in COLUMNS))
    for way, rows in found.items():
        for vocabulary, row in rows.items():
            print(f"{way:<12}{vocabulary:>11}" + "".join(f"{row[name]:>13.4g}" for name in COLUMNS))


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.way, options.vocabularies[0], options.samples)
        return
    found = {way: {str(v): measure(way, v, options.samples) for v in options.vocabularies} for way in WAYS}
    show(found)
    rest = {way: [row["rest_mb"] for row in rows.values()] for way, rows in found.items()}
    growth = {way: round(max(values) / min(values), 3) for way, values in rest.items()}
    report(
        "risd_memory",
        {
            "samples": options.samples,
            "by_way": found,
            "rest_largest_over_smallest": growth,
            "full_logits_over_zscore": [round(b / a, 1) for a, b in zip(*rest.values(), strict=True)],
            "wanted": f"rest_largest_over_smallest of zscore <= {LIMIT}",
            "reached": growth["zscore"] <= LIMIT,
        },
    )


if __name__ == "__main__":
    main()
