"""A vision-language model as the trainers see it: token log-probabilities and score logits, never [B, T, V].

The body runs once over right-padded sequences. From its hidden states come the log-probabilities of given tokens, in
chunks whose logits live only as long as the chunk, and the logits of the K level tokens at given positions.

Shape suffixes: B sequences, T tokens, H hidden size, V vocabulary, K levels, M positions of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zscore_kernels import score_head

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """Sequences for one forward pass."""

    tokens_BT: Tensor
    """Prompt and output, right-padded."""
    mask_BT: Tensor
    """1 for tokens, 0 for the padding behind them."""
    pixels_NX: Tensor
    """Patches of all pictures, as the vision tower reads them."""
    grid_B3: Tensor
    """(temporal, rows, columns) of each sequence's picture, in patches."""
    score_at_B: Tensor
    """Position whose token is the score; -1 where the output has none."""

    def __post_init__(self) -> None:
        """Refuse what the body would silently get wrong.

        Raises:
            ValueError: padding that isn't on the right, or several sequences packed into a row.
        """
        mask_BT = self.mask_BT
        if mask_BT.shape != self.tokens_BT.shape:
            raise ValueError(f"a mask of shape {tuple(mask_BT.shape)} for tokens of {tuple(self.tokens_BT.shape)}")
        # A packed row numbers its sequences 1, 2, …; transformers' fallback of the gated delta net ignores where one
        # ends, and its state leaks into the next.
        if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
            raise ValueError("the mask numbers several sequences in a row: packed input isn't exact here, pad instead")
        if bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any()) or not bool(mask_BT[:, 0].all()):
            raise ValueError("padding must be on the right: the recurrence reads what stands on the left")
        lengths_B = mask_BT.sum(-1)
        if bool((self.score_at_B >= lengths_B).any()) or bool((self.score_at_B == 0).any()):
            raise ValueError("a score position outside its sequence")


class PolicyOutput(NamedTuple):
    """What losses are computed from."""

    logprob_BT: Tensor
    """Of each token given those before it; 0 for the first token and the padding; float32."""
    score_logits_BK: Tensor
    """Of the level tokens at the score position; NaN where there is none; float32."""


class ScorePolicy(nn.Module):
    """A Qwen-style vision-language model (transformers) with its level tokens.

    Args:
        model: the checkpoint, with its output projection.
        level_token_ids: the K level tokens, in rubric order.
        chunk: positions whose V logits exist at one time.
    """

    def __init__(self, model: nn.Module, level_token_ids: Sequence[int], *, chunk: int = 512) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.register_buffer("level_token_ids_K", torch.tensor(list(level_token_ids)), persistent=False)

    def forward(self, batch: PolicyBatch, *, with_logprobs: bool = True) -> PolicyOutput:
        """Run the body once; without `with_logprobs`, nothing of size V is ever made and log-probabilities are 0."""
        hidden_BTH = self._hidden(batch)
        weight_VH: Tensor = self.model.get_output_embeddings().weight  # type: ignore[operator]
        logprob_BT = torch.zeros(batch.tokens_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
        if with_logprobs:
            counted_BT = batch.mask_BT.bool().clone()
            counted_BT[:, 0] = False
            before_MH = hidden_BTH[:, :-1][counted_BT[:, 1:]]
            found_M = token_logprobs(before_MH, weight_VH, batch.tokens_BT[counted_BT], self.chunk)
            logprob_BT = logprob_BT.masked_scatter(counted_BT, found_M)
        return PolicyOutput(logprob_BT, self._score_logits(hidden_BTH, weight_VH, batch.score_at_B))

    def _hidden(self, batch: PolicyBatch) -> Tensor:
        image_token: int = self.model.config.image_token_id  # type: ignore[union-attr, assignment]
        output: Any = self.model.model(  # type: ignore[operator]
            input_ids=batch.tokens_BT,
            attention_mask=batch.mask_BT,
            mm_token_type_ids=(batch.tokens_BT == image_token).int(),
            pixel_values=batch.pixels_NX,
            image_grid_thw=batch.grid_B3,
            use_cache=False,
        )
        hidden_BTH: Tensor = output.last_hidden_state
        return hidden_BTH

    def _score_logits(self, hidden_BTH: Tensor, weight_VH: Tensor, score_at_B: Tensor) -> Tensor:
        rows_B = torch.arange(len(hidden_BTH), device=hidden_BTH.device)
        before_BH = hidden_BTH[rows_B, (score_at_B - 1).clamp(min=0)]
        ids_K: Tensor = self.level_token_ids_K  # type: ignore[assignment]
        logits_BK = score_head(before_BH, weight_VH[ids_K], ids_K.float()).logits_BK
        return logits_BK.masked_fill((score_at_B < 0).unsqueeze(-1), float("nan"))


def token_logprobs(hidden_MH: Tensor, weight_VH: Tensor, tokens_M: Tensor, chunk: int = 512) -> Tensor:
    """Log-probability of each token from the hidden state before it, float32, (M,).

    At most `chunk` rows of V logits exist at a time, in the backward pass too: there they are computed again.
    """
    parts = [
        checkpoint(_chunk_logprobs, hidden, weight_VH, tokens, use_reentrant=False)
        for hidden, tokens in zip(torch.split(hidden_MH, chunk), torch.split(tokens_M, chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden_MH.new_zeros(0, dtype=torch.float32)


def _chunk_logprobs(hidden_CH: Tensor, weight_VH: Tensor, tokens_C: Tensor) -> Tensor:
    logits_CV = nn.functional.linear(hidden_CH, weight_VH).float()
    return logits_CV.gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1) - logits_CV.logsumexp(-1)


def find_score(output: Sequence[int], marker: Sequence[int], level_token_ids: Sequence[int]) -> int | None:
    """Where an output's score token stands: behind the last marker that ends the reasoning.

    Args:
        output: token ids that the model wrote.
        marker: token ids of what comes before the score, like `Score:`.
        level_token_ids: tokens that are scores.

    Returns:
        The position, or None where there is no marker, or no level token behind the last one. Digits and markers
        inside the reasoning don't count.
    """
    width = len(marker)
    for start in range(len(output) - width, -1, -1):
        if list(output[start : start + width]) == list(marker):
            at = start + width
            return at if at < len(output) and output[at] in level_token_ids else None
    return None
