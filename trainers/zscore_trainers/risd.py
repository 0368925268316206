"""RISD, Reasoning-Internalized Score Distillation (algorithm 2): the student gives the teacher's distribution at once.

The teacher's distributions are computed once (`zscore score`) and read from parquet, so the student trains without
the teacher in memory.

The loss is eq. 15 plus `mass` x the negative log of the share that lies on the level tokens, which eq. 15 doesn't see.
A dimension without a target (NaN) adds nothing to eq. 15, whose mean is still over all of them: so a label weighs the
same whatever else is in the batch, and on whichever rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zscore_trainers.checks import check_least
from zscore_trainers.losses import mass_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from zscore_trainers.data import Order
    from zscore_trainers.policy import PolicyBatch, ScorePolicy

    Collate = Callable[[Sequence[int]], tuple[PolicyBatch, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RisdConfig:
    """What the paper leaves open."""

    batch_size: int = 64
    """Samples a step, over all ranks."""
    micro_batch: int = 64
    """Samples a forward pass."""
    mass: float = 0.05
    """Weight of the mass term; 0 leaves it out."""

    def __post_init__(self) -> None:
        """Refuse numbers that can't be meant.

        Raises:
            UsageError: names the setting.
        """
        check_least(self, 1, "batch_size", "micro_batch")
        check_least(self, 0, "mass")


class Risd:
    """Gradients of algorithm 2; see `zscore_trainers.engine.Algorithm`."""

    def __init__(self, config: RisdConfig, order: Order, collate: Collate, *, rank: int = 0, ranks: int = 1) -> None:
        order.check_ranks(ranks)
        self._config = config
        self._order = order
        self._collate = collate
        self._rank, self._ranks = rank, ranks

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Add the gradients of one batch."""
        mine = self._order.share(step, self._rank, self._ranks)
        totals = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(mine), self._config.micro_batch):
            some = mine[start : start + self._config.micro_batch]
            batch, teacher_BDK = self._collate(some)
            loss, divergence, mass = self._loss(policy, batch, teacher_BDK)
            share = len(some) / len(mine)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            totals += share * torch.tensor([float(loss.detach()), float(divergence.detach()), float(mass)])
        return dict(zip(("loss", "divergence", "mass"), totals.tolist(), strict=True))

    def _loss(self, policy: ScorePolicy, batch: PolicyBatch, teacher_BDK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = next(policy.parameters()).device
        found = policy(
            batch.to(device),
            with_logprobs=False,
            teacher_BDK=teacher_BDK.nan_to_num(0.0).to(device),  # no mass, no gradient
            with_mass=self._config.mass > 0,
        )
        if found.log_mass_BD is None:
            return found.divergence, found.divergence, torch.tensor(float("nan"))
        loss = found.divergence + self._config.mass * mass_loss(found.log_mass_BD)
        return loss, found.divergence, found.log_mass_BD.detach().exp().mean()
