"""Batches of rollouts for pairs of pictures: written by the policy, read by the reference.

    pairs → G rollouts a side → sequences, and what the loss wants to know of them (`Sampled`, of all ranks)

Shape suffixes: P pairs, J = 2 sides, G outputs a side, N = P x J x G, T tokens, K levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from zscore_trainers import parallel
from zscore_trainers.rollouts import by_length, rollout_seed
from zscore_trainers.sequences import at_left, collate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zscore_trainers.data import Order
    from zscore_trainers.pairs import Pair
    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.reference import Reference
    from zscore_trainers.rollouts import Rollout, Sampling
    from zscore_trainers.sequences import OutputBatch


class Sampled(NamedTuple):
    """What a step's loss is computed from, besides the policy's outputs."""

    label_PJ: Tensor
    valid_N: Tensor
    text_N: Tensor
    """Level values as written; NaN without a score."""
    sampled_NT: Tensor
    """The generator's log-probabilities, output tokens at the left."""
    output_NT: Tensor
    score_NT: Tensor
    reference_NT: Tensor | None
    probs_NK: Tensor
    """The generator's distributions at the scores; zeros without a score."""
    mass_N: Tensor
    """And the mass that it has on the level tokens there."""

    def gathered(self) -> Sampled:
        """Those of all ranks, in their order."""
        return self._replace(
            **{name: parallel.gathered(one) for name, one in self._asdict().items() if one is not None}
        )


@dataclass(slots=True)
class Outputs:
    """A batch of rollouts, for one step of the optimizer or several."""

    batches: list[OutputBatch]
    """Micro-batches, short outputs first."""
    order: list[int]
    """Which outputs they hold."""
    width: int
    """Tokens of the longest output of all ranks."""
    sampled: Sampled
    advantage_N: Tensor | None = None
    """By the policy that wrote: the first step computes it for all."""
    logged: dict[str, float] = field(default_factory=dict)
    """What is known once for all steps."""


class PairRollouts:
    """Rolls out batches of pairs.

    Args:
        sampling: where outputs come from, and this rank's share of them.
        order: over the pairs.
        pairs: of which outputs are wanted.
        group: G.
        micro_batch: sequences a forward pass.
        reference: whose log-probabilities are wanted too; None for none.
    """

    def __init__(
        self,
        sampling: Sampling,
        order: Order,
        pairs: Sequence[Pair],
        *,
        group: int,
        micro_batch: int,
        reference: Reference | None,
    ) -> None:
        self._sampling = sampling
        self._order = order
        self._pairs = pairs
        self._group = group
        self._micro_batch = micro_batch
        self._reference = reference

    def __call__(self, policy: ScorePolicy, number: int) -> Outputs:
        """Outputs of the policy for a batch of pairs, by the number of the batch."""
        numbers = self._sampling.share(self._order, number)
        self._sampling.rollouts.follow(policy)
        if self._reference is not None:
            self._reference.refresh(policy, number)
        drawn = self.draw(numbers, number)
        order, size = by_length(drawn), self._micro_batch
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [self.sequences([drawn[at] for at in part]) for part in parts]
        width = parallel.largest(max(len(one.written.tokens) for one in drawn))
        return Outputs(batches, order, width, self._sampled(numbers, drawn, order, batches, width).gathered())

    def draw(self, numbers: Sequence[int], batch: int) -> list[Rollout]:
        """G rollouts for both sides of each pair, in the order P, J, G."""
        pairs = [self._pairs[number] for number in numbers]
        sides = [side for pair in pairs for side in (pair.winner, pair.loser)]
        found = self._sampling.collator.prompts(sides)
        each = [prompts[pairs[at // 2].dimension] for at, prompts in enumerate(found)]
        prompts = [prompt for prompt in each for _ in range(self._group)]
        seeds = [
            rollout_seed(self._sampling.seed, batch, number, side, i + self._group * before)
            for number, before in zip(numbers, self._sampling.repeats(self._order, batch), strict=True)
            for side in range(2)
            for i in range(self._group)
        ]
        return self._sampling.rollouts.draw(prompts, seeds)

    def sequences(self, rollouts: Sequence[Rollout]) -> OutputBatch:
        """A micro-batch of them."""
        return collate(self._sampling.collator.pad, [(one.prompt, one.written) for one in rollouts])

    def _sampled(
        self,
        numbers: Sequence[int],
        drawn: Sequence[Rollout],
        order: Sequence[int],
        batches: Sequence[OutputBatch],
        width: int,
    ) -> Sampled:
        """What the loss wants to know of the outputs, as they were drawn; the batches hold them in `order`."""
        values_K = torch.tensor(self._sampling.values)
        back = torch.argsort(torch.tensor(order))
        level_of = {token: at for at, token in enumerate(self._sampling.collator.builder.level_ids)}
        text_N = torch.full((len(drawn),), float("nan"))
        sampled_NT, probs_NK = torch.zeros(len(drawn), width), torch.zeros(len(drawn), len(values_K))
        for row, one in enumerate(drawn):
            sampled_NT[row, : len(one.logprob_T)] = torch.from_numpy(one.logprob_T)
            if one.written.score_at is not None:
                text_N[row] = values_K[level_of[one.written.tokens[one.written.score_at]]]
                probs_NK[row] = torch.from_numpy(one.probs_K)
        reference = self._reference
        return Sampled(
            label_PJ=torch.tensor([self._pairs[number].labels for number in numbers]),
            valid_N=~text_N.isnan(),
            text_N=text_N,
            sampled_NT=sampled_NT,
            output_NT=torch.cat([at_left(batch.output_BT, batch, width) for batch in batches])[back],
            score_NT=torch.cat([at_left(batch.score_BT, batch, width) for batch in batches])[back],
            reference_NT=None if reference is None else torch.cat([reference(batch, width) for batch in batches])[back],
            probs_NK=probs_NK,
            mass_N=torch.tensor([one.mass for one in drawn]),
        )
