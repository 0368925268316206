"""Sums over the whole vocabulary without a [positions, V] tensor, forward or backward.

Shape suffixes: M positions, H hidden size, V vocabulary, C positions of a chunk, S tokens of a slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 512
"""Positions whose logits over the whole vocabulary exist at one time."""
SLICE = 4096
"""Tokens whose logits `log_partition` holds at a time."""


def token_logprobs(hidden_MH: Tensor, weight_VH: Tensor, tokens_M: Tensor, chunk: int = CHUNK) -> Tensor:
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


def log_partition(hidden_MH: Tensor, weight_VH: Tensor) -> Tensor:
    """Log of the sum of exp(logit) over the vocabulary, float32, (M,); memory is (M + H) x `SLICE`, whatever V is.

    Logits are float32 whatever the weights are, as the level tokens' are (`zscore_kernels.head`): rounded to bfloat16,
    these at 20 are off by up to 0.06, and the level tokens' mass would come out above 1.
    """
    found: Tensor = _LogPartition.apply(hidden_MH, weight_VH)  # type: ignore[no-untyped-call]
    return found


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, weight_VH: Tensor) -> Tensor:
        total_M = hidden_MH.new_full((len(hidden_MH),), -torch.inf, dtype=torch.float32)
        for weight_SH in torch.split(weight_VH, SLICE):
            total_M = torch.logaddexp(total_M, (hidden_MH.float() @ weight_SH.float().T).logsumexp(-1))
        ctx.save_for_backward(hidden_MH, weight_VH, total_M)
        return total_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_MH, weight_VH, total_M = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad
        grad_hidden_MH = torch.zeros_like(hidden_MH, dtype=torch.float32) if wants_hidden else None
        grad_weight_VH = torch.empty_like(weight_VH) if wants_weight else None
        for start in range(0, len(weight_VH), SLICE):
            weight_SH = weight_VH[start : start + SLICE]
            # In place: these are what a step's memory peaks at when the body is small.
            share_MS = hidden_MH.float() @ weight_SH.float().T
            share_MS.sub_(total_M.unsqueeze(-1)).exp_().mul_(grads[0].unsqueeze(-1))
            if grad_hidden_MH is not None:
                grad_hidden_MH.addmm_(share_MS, weight_SH.float())
            if grad_weight_VH is not None:
                _product(share_MS.T, hidden_MH.float(), grad_weight_VH[start : start + SLICE])
        return None if grad_hidden_MH is None else grad_hidden_MH.to(hidden_MH.dtype), grad_weight_VH


def _product(left_SM: Tensor, right_MH: Tensor, out_SH: Tensor) -> None:
    if out_SH.dtype == left_SM.dtype:
        torch.mm(left_SM, right_MH, out=out_SH)
    else:
        out_SH.copy_(left_SM @ right_MH)
