"""The frozen policy that a KL holds on to; it becomes the policy again every M steps (algorithm 1, line 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zscore_trainers.sequences import token_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    from zscore_trainers.policy import ScorePolicy
    from zscore_trainers.sequences import OutputBatch


class Reference:
    """The policy as it was at the last multiple of `every` steps.

    Args:
        frozen: a policy of the same make, to hold its weights.
        every: M.

    Its weights are part of a checkpoint: a run that is resumed between two multiples needs them.
    """

    def __init__(self, frozen: ScorePolicy, every: int) -> None:
        if every < 1:
            raise ValueError(f"reference_every is {every}: at least 1")
        self.frozen = frozen.requires_grad_(requires_grad=False).eval()
        self._every = every

    def refresh(self, policy: ScorePolicy, step: int) -> None:
        """Become the policy where `step` is a multiple of M; ranks copy the share that each has."""
        if step % self._every == 0:
            self.frozen.load_state_dict(policy.state_dict())

    @torch.no_grad()
    def __call__(self, batch: OutputBatch, width: int) -> Tensor:
        """Log-probabilities of the outputs' tokens, (B, width)."""
        return token_logprobs(self.frozen, batch, width)
