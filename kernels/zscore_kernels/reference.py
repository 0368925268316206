"""The score head in plain torch: the oracle of the kernels, and what runs on a CPU.

Sums run in float64, in an order that depends on H and K alone: elementwise products, folded in halves. A matrix product
would be faster and is not used, because a BLAS picks its blocking by batch size and moves the last bits of a row with
it. Softmax runs row by row inside torch. Float64 input stays float64 (for gradcheck); all other input gives float32.

Shape suffixes: B rows, C rows of a chunk, H hidden size, K score classes, V vocabulary, N terms of a sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real
    from torch import Tensor

    from zscore_kernels.checks import Reduction

# Elements of one float64 product: 2 MiB, so that folding it stays in a core's cache.
_CHUNK_ELEMENTS: Final = 1 << 18


class ScoreHead(NamedTuple):
    """Score distributions of B rows over K levels, float32."""

    probs_BK: Float[Tensor, "B K"]
    """Softmax of the logits."""
    mean_B: Float[Tensor, " B"]
    """Expected level value."""
    var_B: Float[Tensor, " B"]
    """Variance of the level value."""
    entropy_B: Float[Tensor, " B"]
    """Shannon entropy in nats."""
    logits_BK: Float[Tensor, "B K"]
    """(hidden·weightᵀ + bias) / temperature."""


class ScoreHeadMass(NamedTuple):
    """`ScoreHead` of full-vocabulary logits, with the share of the vocabulary's probability that the K tokens hold."""

    probs_BK: Float[Tensor, "B K"]
    mean_B: Float[Tensor, " B"]
    var_B: Float[Tensor, " B"]
    entropy_B: Float[Tensor, " B"]
    logits_BK: Float[Tensor, "B K"]
    log_mass_B: Float[Tensor, " B"]
    """Logarithm of the K tokens' summed probability under softmax over V, at temperature 1. Minus infinity where the K
    logits all are, though the rest of that row is NaN; NaN where all V are."""


def score_head(
    hidden_BH: Float[Tensor, "B H"],
    weight_KH: Float[Tensor, "K H"],
    values_K: Real[Tensor, " K"],
    bias_K: Float[Tensor, " K"] | None = None,
    temperature: float = 1.0,
) -> ScoreHead:
    """Hidden states → score distributions; see `zscore_kernels.score_head`."""
    return _head(_logits(hidden_BH, weight_KH, bias_K, temperature), values_K, _result_dtype(hidden_BH))


def score_from_logits(
    logits_BV: Float[Tensor, "B V"],
    token_ids_K: Int[Tensor, " K"],
    values_K: Real[Tensor, " K"],
    temperature: float = 1.0,
    *,
    with_mass: bool = False,
) -> ScoreHead | ScoreHeadMass:
    """Full-vocabulary logits → score distributions; see `zscore_kernels.score_from_logits`."""
    dtype = _result_dtype(logits_BV)
    raw_BK = logits_BV.index_select(1, token_ids_K).double()
    head = _head(raw_BK / temperature, values_K, dtype)
    if not with_mass:
        return head
    return ScoreHeadMass(*head, (_log_sum_exp(raw_BK) - _log_sum_exp(logits_BV.double())).to(dtype))


def score_head_kl(
    hidden_BH: Float[Tensor, "B H"],
    weight_KH: Float[Tensor, "K H"],
    target_probs_BK: Float[Tensor, "B K"],
    bias_K: Float[Tensor, " K"] | None = None,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*B"]:
    """KL(target ‖ score distribution); see `zscore_kernels.score_head_kl`."""
    log_q_BK = torch.log_softmax(_logits(hidden_BH, weight_KH, bias_K, temperature), 1)
    target_BK = target_probs_BK.double()
    # 0·log 0 is 0, also against a class that the bias forbids (log q = -∞).
    log_q_BK = log_q_BK.masked_fill(target_BK == 0, 0.0)
    loss_B = fold_sum(torch.xlogy(target_BK, target_BK) - target_BK * log_q_BK)
    return reduce_loss(loss_B.to(_result_dtype(hidden_BH)), reduction)


def reduce_loss(loss_B: Float[Tensor, " B"], reduction: Reduction) -> Float[Tensor, "*B"]:
    """Mean, sum or the rows themselves; an empty batch has loss 0, so that it can't poison a training step."""
    if reduction == "none":
        return loss_B
    total = loss_B.sum()
    return total if reduction == "sum" else total / max(loss_B.shape[0], 1)


def fold_sum(terms: Float[Tensor, "*B N"]) -> Float[Tensor, "*B"]:
    """Sums the last axis in halves: elementwise additions, whose order depends on the axis' length alone."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        odd = terms[..., 2 * half :]
        terms = torch.cat((folded, odd), -1) if odd.shape[-1] else folded
    return terms.squeeze(-1)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Minus infinity where all logits are, with a gradient of 0 there."""
    largest = logits.detach().amax(1, keepdim=True)
    about = largest.masked_fill(largest == -torch.inf, 0.0)
    total = fold_sum((logits - about).exp())
    # Filled twice: a gradient of infinity at log 0 would make NaN of the zeros that it is multiplied by.
    log = total.masked_fill(total == 0, 1.0).log().masked_fill(total == 0, -torch.inf)
    return about.squeeze(1) + log


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(hidden_BH: Tensor, weight_KH: Tensor, bias_K: Tensor | None, temperature: float) -> Tensor:
    logits_BK = cast("Tensor", _Project.apply(hidden_BH, weight_KH))  # type: ignore[no-untyped-call]
    if bias_K is not None:
        logits_BK = logits_BK + bias_K.double()
    return logits_BK / temperature


def _head(logits_BK: Tensor, values_K: Tensor, dtype: torch.dtype) -> ScoreHead:
    values_K = values_K.double()
    probs_BK = torch.softmax(logits_BK, 1)
    mean_B = fold_sum(probs_BK * values_K)
    gap_BK = values_K - mean_B[:, None]
    # A probability of 0 with a logit of minus infinity would give 0·∞.
    log_probs_BK = torch.log_softmax(logits_BK, 1).masked_fill(probs_BK == 0, 0.0)
    return ScoreHead(
        probs_BK.to(dtype),
        mean_B.to(dtype),
        fold_sum(probs_BK * gap_BK * gap_BK).to(dtype),
        fold_sum(-probs_BK * log_probs_BK).to(dtype),
        logits_BK.to(dtype),
    )


class _Project(torch.autograd.Function):
    """hidden·weightᵀ in float64 with a fixed order of additions; its gradients likewise."""

    @staticmethod
    def forward(ctx: Any, hidden_BH: Tensor, weight_KH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_BH, weight_KH)
        logits_BK = hidden_BH.new_empty((hidden_BH.shape[0], weight_KH.shape[0]), dtype=torch.float64)
        weight64_KH = weight_KH.double()
        for rows in _chunks(hidden_BH):
            hidden_CH = hidden_BH[rows].double()
            for k, weight_H in enumerate(weight64_KH):
                logits_BK[rows, k] = fold_sum(hidden_CH * weight_H)
        return logits_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_BH, weight_KH = ctx.saved_tensors
        grad_hidden_BH = grad_weight_KH = None
        if ctx.needs_input_grad[0]:
            weight64_KH = weight_KH.double()
            grad_hidden_BH = torch.empty_like(hidden_BH, memory_format=torch.contiguous_format)
            for rows in _chunks(hidden_BH):
                total_CH = torch.zeros_like(hidden_BH[rows], dtype=torch.float64)
                for k, weight_H in enumerate(weight64_KH):
                    total_CH += grad_BK[rows, k, None] * weight_H
                grad_hidden_BH[rows] = total_CH.to(hidden_BH.dtype)
        if ctx.needs_input_grad[1]:
            # A sum over the batch can't but depend on it; it is the same for the same batch.
            total_KH = torch.zeros_like(weight_KH, dtype=torch.float64)
            for rows in _chunks(hidden_BH):
                total_KH += grad_BK[rows].T @ hidden_BH[rows].double()
            grad_weight_KH = total_KH.to(weight_KH.dtype)
        return grad_hidden_BH, grad_weight_KH


def _chunks(hidden_BH: Tensor) -> list[slice]:
    rows, width = hidden_BH.shape
    step = max(1, _CHUNK_ELEMENTS // width)
    return [slice(start, start + step) for start in range(0, rows, step)]
