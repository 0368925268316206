"""How well means of the learned distributions agree with the targets' on prompts that aren't trained on.

`zscore_trainers.guard` watches it: a policy that drifts to the middle of the scale gains in loss and reward while its
agreement falls, which no training figure shows.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from zscore.agreement import accuracies, count_pairs
from zscore_trainers import parallel
from zscore_trainers.rewarddance import told_batch
from zscore_trainers.rollouts import rollout_seed
from zscore_trainers.sequences import collate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from zscore.records import EnginePrompt, Sample
    from zscore_trainers.data import Collator
    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.rewarddance import Told
    from zscore_trainers.rollouts import Rollout, Rollouts


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt is evaluated on: by its hash, so that the same ones are in every run."""
    digest = hashlib.sha256(b"held out " + prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


class HeldOut:
    """Evaluates a policy in the course of training."""

    def __init__(self, collate: Collator, names: Sequence[str], values: Sequence[float], batch: int) -> None:
        self._collate = collate
        self.names = names
        self.values = values
        self._values = torch.tensor(values)
        self._batch = batch
        train = collate.train
        self._wanted_ND = train.targets_NDK @ np.asarray(values, np.float32)
        groups: dict[str, int] = {}
        self._group_N = np.array([groups.setdefault(_group(sample), len(groups)) for sample in train.samples])

    def __len__(self) -> int:
        """Samples."""
        return len(self._group_N)

    def prompts(self, numbers: Sequence[int]) -> list[list[EnginePrompt]]:
        """Of these samples."""
        return self._collate.prompts(numbers)

    @torch.no_grad()
    def __call__(self, policy: ScorePolicy) -> Mapping[str, float]:
        """PLCC and pair accuracy (HPA) of each dimension and of their mean; on all ranks, which share the work."""
        return self.agreement(self._means(policy))

    @torch.no_grad()
    def read(self, policy: ScorePolicy, drawn: Sequence[Rollout]) -> Tensor:
        """The policy's expected scores behind outputs, (N,); nothing of meaning where an output has none."""
        device = next(policy.parameters()).device
        found = []
        for start in range(0, len(drawn), self._batch):
            some = [(one.prompt, one.written) for one in drawn[start : start + self._batch]]
            batch = collate(self._collate.pad, some).policy
            probs_BK = policy(batch.to(device), with_logprobs=False).score_logits_BDK[:, 0].softmax(-1)
            found.append(probs_BK.cpu() @ self._values)
        return torch.cat(found)

    def agreement(self, mu_ND: NDArray[np.float32]) -> Mapping[str, float]:
        """Of expected scores with the targets', where there are any; scores that are all alike have a PLCC of 0."""
        result = {}
        known_ND = ~np.isnan(self._wanted_ND)
        for column, name in enumerate((*self.names, "overall")):
            some_N = known_ND.any(1) if column == len(self.names) else known_ND[:, column]
            if not some_N.any():
                continue
            mine, wanted = (_column(values[some_N], column, known_ND[some_N]) for values in (mu_ND, self._wanted_ND))
            if np.ptp(wanted) > 0:
                result[f"plcc_{name}"] = float(stats.pearsonr(mine, wanted).statistic) if np.ptp(mine) > 0 else 0.0
            accuracy = _accuracy(mine, wanted, self._group_N[some_N])
            if accuracy is not None:
                result[f"hpa_{name}"] = accuracy
        return result

    def _means(self, policy: ScorePolicy) -> NDArray[np.float32]:
        """Means of all samples, on every rank."""
        device = next(policy.parameters()).device
        mu_ND = torch.zeros(len(self), len(self.names))
        for some, counts in turns(len(self), self._batch):
            batch, _ = self._collate(some)
            probs_BDK = policy(batch.to(device), with_logprobs=False).score_logits_BDK.softmax(-1)
            if counts:
                mu_ND[some.start : some.stop] = (probs_BDK.cpu() @ self._values).reshape(-1, len(self.names))
        return parallel.summed(mu_ND).numpy()


def turns(count: int, batch: int) -> Iterator[tuple[range, bool]]:
    """This rank's batches, and whether each counts.

    Ranks take turns with the batches. Where these don't come out even some repeat the last one, whose result they
    drop: each forward pass needs all ranks, for each holds a share of the weights.
    """
    ranks, batches = parallel.ranks(), -(-count // batch)
    for turn in range(-(-batches // ranks)):
        number = turn * ranks + parallel.rank()
        start = min(number, batches - 1) * batch
        yield range(start, min(start + batch, count)), number < batches


class HeldOutTold:
    """The same where reasonings are given: each score is read behind the given one, and nothing is written.

    It tells how well scores follow from what is said; what the policy would say by itself it doesn't.
    """

    def __init__(self, direct: HeldOut, collator: Collator, told: Sequence[Told], batch: int) -> None:
        self._direct = direct
        self._collator = collator
        self._told = told
        self._batch = batch

    def __call__(self, policy: ScorePolicy) -> Mapping[str, float]:
        """PLCC and pair accuracy; on all ranks, which share the work."""
        return self._direct.agreement(self.means(policy))

    @torch.no_grad()
    def means(self, policy: ScorePolicy) -> NDArray[np.float32]:
        """Expected scores of all samples, (N, D), on every rank; 0 where nothing is said."""
        device = next(policy.parameters()).device
        mu_ND = torch.zeros(len(self._direct), len(self._direct.names))
        for numbers, counts in turns(len(self._told), self._batch):
            some = self._told[numbers.start : numbers.stop]
            batch = told_batch(self._collator, some).policy
            probs_BK = policy(batch.to(device), with_logprobs=False).score_logits_BDK[:, 0].softmax(-1)
            if counts:
                places = [one.sample for one in some], [one.dimension for one in some]
                mu_ND[places] = probs_BK.cpu() @ torch.tensor(self._direct.values)
        return parallel.summed(mu_ND).numpy()


AT_ONCE = 256
"""Samples whose pictures are decoded while outputs are drawn for them: 2.6 MB each at 1,024 image tokens."""


class HeldOutReasoning:
    """The same for a policy that reasons: one rollout a picture and dimension, with the same seeds every time.

    The policy itself reads the scores, whatever wrote the outputs. An output without one counts as the middle of the
    scale, which orders nothing. Ranks share the samples out.
    """

    def __init__(self, direct: HeldOut, rollouts: Rollouts) -> None:
        self._direct = direct
        self._rollouts = rollouts

    def __call__(self, policy: ScorePolicy) -> Mapping[str, float]:
        """PLCC, pair accuracy and the share of outputs with a score; on all ranks."""
        self._rollouts.follow(policy)
        mu_ND, valid_ND = self._drawn(policy)
        return {**self._direct.agreement(mu_ND.numpy()), "held_out_valid": float(valid_ND.mean())}

    def _drawn(self, policy: ScorePolicy) -> tuple[Tensor, Tensor]:
        """Expected scores of all samples, and 1 where an output has one, both (N, D); this rank draws for some of them.

        All ranks draw for as many, for each forward pass needs all of them; what one repeats for that is dropped.
        """
        count, wide = len(self._direct), len(self._direct.names)
        mine = list(range(parallel.rank(), count, parallel.ranks()))
        drawn_for = [*mine, *[0] * (-(-count // parallel.ranks()) - len(mine))]
        found = [self._read(policy, drawn_for[at : at + AT_ONCE]) for at in range(0, len(drawn_for), AT_ONCE)]
        mu_ND, valid_ND = torch.zeros(2, count, wide)
        mu_ND[mine] = torch.cat([mu for mu, _ in found])[: len(mine)]
        valid_ND[mine] = torch.cat([valid for _, valid in found])[: len(mine)]
        return parallel.summed(mu_ND), parallel.summed(valid_ND)

    def _read(self, policy: ScorePolicy, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The same of some samples, in their order."""
        wide = len(self._direct.names)
        prompts = [one for found in self._direct.prompts(numbers) for one in found]
        drawn = self._rollouts.draw(
            prompts, [rollout_seed(number * wide + at) for number in numbers for at in range(wide)]
        )
        scored_N = torch.tensor([one.written.score_at is not None for one in drawn])
        middle = sum(self._direct.values[at] for at in (0, -1)) / 2
        mu_N = torch.where(scored_N, self._direct.read(policy, drawn), middle)
        return mu_N.view(-1, wide), scored_N.float().view(-1, wide)


def _group(sample: Sample) -> str:
    return sample.group or sample.prompt


def _column(values_ND: NDArray[np.float32], column: int, known_ND: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of a dimension; behind the last one, the mean of each sample's known dimensions."""
    overall = column == values_ND.shape[1]
    chosen = values_ND.mean(1, where=known_ND) if overall else values_ND[:, column]
    return chosen.astype(np.float64).round(6)


def _accuracy(mine_N: NDArray[np.float64], wanted_N: NDArray[np.float64], group_N: NDArray[np.int64]) -> float | None:
    counts = count_pairs(mine_N, wanted_N, group_N, int(group_N.max()) + 1)
    return accuracies(counts)[0]["hpa"].value
