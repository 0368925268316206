"""A vision-language model as the trainers see it: token log-probabilities and score logits, never [B, T, V].

The body runs once over right-padded sequences. From its hidden states come the log-probabilities of given tokens, in
chunks whose logits live only as long as the chunk, and the logits of the K level tokens at given probes: one behind
the reasoning, or one a dimension in the joint layout.

Shape suffixes: B sequences, T tokens, D probes a sequence, H hidden size, V vocabulary, K levels, M of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from zscore_kernels import score_head, score_head_kl
from zscore_trainers.vocabulary import CHUNK, log_partition, token_logprobs

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
    probes_BD: Tensor
    """Positions whose next token is a score, as in `zscore.records.EnginePrompt`; -1 where there is none."""

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
        lengths_B1 = mask_BT.sum(-1, keepdim=True)
        if bool((self.probes_BD >= lengths_B1).any()) or bool((self.probes_BD < -1).any()):
            raise ValueError("a probe outside its sequence")

    def to(self, device: torch.device) -> PolicyBatch:
        """The same on another device."""
        names = ("tokens_BT", "mask_BT", "pixels_NX", "grid_B3", "probes_BD")
        return PolicyBatch(**{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class PolicyOutput(NamedTuple):
    """What losses are computed from; float32."""

    logprob_BT: Tensor | None
    """Of each token given those before it; 0 for the first token and the padding."""
    score_logits_BDK: Tensor
    """Of the level tokens at the probes; NaN where there is none."""
    divergence: Tensor | None = None
    """Mean KL(teacher || student) over the probes, a scalar."""
    log_mass_BD: Tensor | None = None
    """Log of the share of the next token's probability that lies on the level tokens."""


class ScorePolicy(nn.Module):
    """A Qwen-style vision-language model (transformers) with its level tokens.

    Args:
        model: the checkpoint, with its output projection.
        level_token_ids: the K level tokens, in rubric order.
        chunk: positions whose V logits exist at one time.
    """

    def __init__(self, model: nn.Module, level_token_ids: Sequence[int], *, chunk: int = CHUNK) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.register_buffer("level_token_ids_K", torch.tensor(list(level_token_ids)), persistent=False)

    def forward(
        self,
        batch: PolicyBatch,
        *,
        with_logprobs: bool = True,
        teacher_BDK: Tensor | None = None,
        with_mass: bool = False,
    ) -> PolicyOutput:
        """Run the body once.

        Args:
            batch: the sequences.
            with_logprobs: whether token log-probabilities are wanted.
            teacher_BDK: distributions to be distilled (eq. 15); every probe must be there.
            with_mass: whether the mass on the level tokens is wanted.
        """
        hidden_BTH = self._hidden(batch)
        weight_VH: Tensor = self.model.get_output_embeddings().weight  # type: ignore[operator]
        ids_K: Tensor = self.level_token_ids_K  # type: ignore[assignment]
        weight_KH = weight_VH[ids_K]
        rows_B1 = torch.arange(len(hidden_BTH), device=hidden_BTH.device).unsqueeze(-1)
        shape = batch.probes_BD.shape
        probed_MH = hidden_BTH[rows_B1, batch.probes_BD.clamp(min=0)].flatten(0, 1)
        # Only its logits are used here; what the levels are worth is the losses' business.
        logits_BDK = score_head(probed_MH, weight_KH, ids_K.float()).logits_BK.view(*shape, -1)
        return PolicyOutput(
            self._logprobs(hidden_BTH, weight_VH, batch) if with_logprobs else None,
            logits_BDK.masked_fill((batch.probes_BD < 0).unsqueeze(-1), float("nan")),
            None if teacher_BDK is None else score_head_kl(probed_MH, weight_KH, teacher_BDK.flatten(0, 1)),
            logits_BDK.logsumexp(-1) - log_partition(probed_MH, weight_VH).view(shape) if with_mass else None,
        )

    def _logprobs(self, hidden_BTH: Tensor, weight_VH: Tensor, batch: PolicyBatch) -> Tensor:
        counted_BT = batch.mask_BT.bool().clone()
        counted_BT[:, 0] = False
        before_MH = hidden_BTH[:, :-1][counted_BT[:, 1:]]
        found_M = token_logprobs(before_MH, weight_VH, batch.tokens_BT[counted_BT], self.chunk)
        logprob_BT = torch.zeros(batch.tokens_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
        return logprob_BT.masked_scatter(counted_BT, found_M)

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
