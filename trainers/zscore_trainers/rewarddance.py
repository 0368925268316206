"""RewardDance (the paper's baseline): supervised learning of reasonings that are given as data, and of their scores.

The loss is the mean cross-entropy of an output's tokens, reasoning and score alike. The reasonings come from a larger
judge, or, in the rubric world, from what is known to be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zscore_trainers.checks import check_least
from zscore_trainers.sequences import collate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zscore_trainers.data import Collator, Order
    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.sequences import OutputBatch, Written


@dataclass(frozen=True, slots=True)
class Told:
    """A given output for one question."""

    sample: int
    """Of the collator's set."""
    dimension: int
    written: Written


def told_batch(collator: Collator, some: Sequence[Told]) -> OutputBatch:
    """Questions of the collator's set with their given outputs."""
    prompts = collator.prompts([one.sample for one in some])
    return collate(
        collator.pad, [(found[one.dimension], one.written) for found, one in zip(prompts, some, strict=True)]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardDanceConfig:
    """How much at a time."""

    batch_size: int = 64
    """Outputs a step, over all ranks."""
    micro_batch: int = 64
    """Outputs a forward pass."""

    def __post_init__(self) -> None:
        """Refuse numbers that can't be meant.

        Raises:
            UsageError: names the setting.
        """
        check_least(self, 1, "batch_size", "micro_batch")


class RewardDance:
    """Gradients of the cross-entropy; see `zscore_trainers.engine.Algorithm`."""

    def __init__(
        self,
        config: RewardDanceConfig,
        order: Order,
        collator: Collator,
        told: Sequence[Told],
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        order.check_ranks(ranks)
        self._config = config
        self._order = order
        self._collator = collator
        self._told = told
        self._rank, self._ranks = rank, ranks

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Add the gradients of one batch."""
        device = next(policy.parameters()).device
        mine = [self._told[index] for index in self._order.share(step, self._rank, self._ranks)]
        total = 0.0
        for start in range(0, len(mine), self._config.micro_batch):
            some = mine[start : start + self._config.micro_batch]
            batch = told_batch(self._collator, some)
            found = policy(batch.policy.to(device))
            output_BT = batch.output_BT.to(device)
            mean_B = (found.logprob_BT * output_BT).sum(-1) / output_BT.sum(-1)
            loss = -mean_B.sum() / len(mine)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}
