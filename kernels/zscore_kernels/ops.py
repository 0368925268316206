"""The kernels as torch operators: what autograd, torch.compile and CUDA graphs see.

Each operator is opaque to torch.compile (it traces the shapes given here and never looks inside), and none waits for
the GPU. Gradients are operators too, so that a compiled backward can hold them; they have no gradient of their own.

Shape suffixes: B rows, H hidden size, K score classes, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from zscore_kernels import launch

if TYPE_CHECKING:
    from collections.abc import Callable


@custom_op("zscore_kernels::head", mutates_args=())
def head(
    hidden_BH: Tensor, weight_KH: Tensor, values_K: Tensor, bias_K: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states → probs_BK, stats_3B (mean, variance, entropy), logits_BK."""
    return launch.head_forward(hidden_BH, weight_KH, values_K, bias_K, temperature)


@head.register_fake
def _(
    hidden_BH: Tensor, weight_KH: Tensor, values_K: Tensor, bias_K: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    del values_K, bias_K, temperature
    return launch.new_head(hidden_BH, weight_KH.shape[0])


@custom_op("zscore_kernels::head_kl", mutates_args=())
def head_kl(
    hidden_BH: Tensor, weight_KH: Tensor, target_BK: Tensor, bias_K: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Hidden states → loss_B and, from the same launch, its gradient before the temperature, grad_BK."""
    return launch.kl_forward(hidden_BH, weight_KH, target_BK, bias_K, temperature)


@head_kl.register_fake
def _(
    hidden_BH: Tensor, weight_KH: Tensor, target_BK: Tensor, bias_K: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    del weight_KH, bias_K, temperature
    return launch.new_loss(hidden_BH, target_BK)


@custom_op("zscore_kernels::from_logits", mutates_args=())
def from_logits(
    logits_BV: Tensor, token_ids_K: Tensor, values_K: Tensor, temperature: float, *, with_mass: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Full-vocabulary logits → probs_BK, stats_3B, logits_BK, mass_3B (log mass, row maximum, log-sum about it)."""
    return launch.from_logits_forward(logits_BV, token_ids_K, values_K, temperature, with_mass=with_mass)


@from_logits.register_fake
def _(
    logits_BV: Tensor, token_ids_K: Tensor, values_K: Tensor, temperature: float, *, with_mass: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del values_K, temperature
    return *launch.new_head(logits_BV, token_ids_K.shape[0]), launch.new_mass(logits_BV, with_mass=with_mass)


@custom_op("zscore_kernels::score_gradient", mutates_args=())
def score_gradient(
    logits_BK: Tensor,
    values_K: Tensor,
    grad_probs_BK: Tensor | None,
    grad_stats_3B: Tensor | None,
    grad_logits_BK: Tensor | None,
    *,
    temperature: float,
) -> Tensor:
    """Gradients of the outputs → gradient before the temperature, grad_BK."""
    return launch.score_gradient(logits_BK, values_K, (grad_probs_BK, grad_stats_3B, grad_logits_BK), temperature)


@score_gradient.register_fake
def _(logits_BK: Tensor, *rest: object, temperature: float) -> Tensor:
    del rest, temperature
    return torch.empty_like(logits_BK)


@custom_op("zscore_kernels::loss_gradient", mutates_args=())
def loss_gradient(
    grad_loss_B: Tensor, grad_BK: Tensor, hidden_BH: Tensor, weight_KH: Tensor, bias_K: Tensor | None
) -> Tensor:
    """Gradient of the loss times what the forward kernel left, which autograd takes for a constant.

    It depends on the inputs, though: they are arguments so that a second derivative of any of them is refused.
    """
    del hidden_BH, weight_KH, bias_K
    return grad_loss_B[:, None] * grad_BK


@loss_gradient.register_fake
def _(grad_loss_B: Tensor, grad_BK: Tensor, *rest: object) -> Tensor:
    del grad_loss_B, rest
    return torch.empty_like(grad_BK)


@custom_op("zscore_kernels::hidden_gradient", mutates_args=())
def hidden_gradient(grad_BK: Tensor, weight_KH: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_BK · weight_KH."""
    return launch.hidden_gradient(grad_BK, weight_KH, dtype)


@hidden_gradient.register_fake
def _(grad_BK: Tensor, weight_KH: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_BK.new_empty((grad_BK.shape[0], weight_KH.shape[1]), dtype=dtype)


@custom_op("zscore_kernels::weight_gradient", mutates_args=())
def weight_gradient(grad_BK: Tensor, hidden_BH: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_BKᵀ · hidden_BH."""
    return launch.weight_gradient(grad_BK, hidden_BH, dtype)


@weight_gradient.register_fake
def _(grad_BK: Tensor, hidden_BH: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_BK.new_empty((grad_BK.shape[1], hidden_BH.shape[1]), dtype=dtype)


@custom_op("zscore_kernels::from_logits_gradient", mutates_args=())
def from_logits_gradient(
    logits_BV: Tensor, token_ids_K: Tensor, grad_BK: Tensor, mass_3B: Tensor, grad_mass_B: Tensor | None
) -> Tensor:
    """Gradient of the full-vocabulary logits."""
    return launch.from_logits_gradient(logits_BV, token_ids_K, grad_BK, mass_3B, grad_mass_B)


@from_logits_gradient.register_fake
def _(logits_BV: Tensor, *rest: object) -> Tensor:
    del rest
    return torch.empty_like(logits_BV, memory_format=torch.contiguous_format)


def _projected(ctx: Any, grad_BK: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, each only where somebody asks for it."""
    hidden_BH, weight_KH = ctx.saved_tensors[:2]
    wants_hidden, wants_weight, _, wants_bias = ctx.needs_input_grad[:4]
    return (
        hidden_gradient(grad_BK, weight_KH, hidden_BH.dtype) if wants_hidden else None,
        weight_gradient(grad_BK, hidden_BH, weight_KH.dtype) if wants_weight else None,
        grad_BK.sum(0).to(ctx.bias_dtype) if wants_bias else None,
    )


def _setup_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_BH, weight_KH, values_K, bias_K, ctx.temperature = inputs
    ctx.bias_dtype = None if bias_K is None else bias_K.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_BH, weight_KH, values_K, output[2])


def _backward_head(
    ctx: Any, grad_probs_BK: Tensor | None, grad_stats_3B: Tensor | None, grad_logits_BK: Tensor | None
) -> tuple[Tensor | None, ...]:
    _, _, values_K, logits_BK = ctx.saved_tensors
    grad_BK = score_gradient(
        logits_BK, values_K, grad_probs_BK, grad_stats_3B, grad_logits_BK, temperature=ctx.temperature
    )
    grad_hidden_BH, grad_weight_KH, grad_bias_K = _projected(ctx, grad_BK)
    return grad_hidden_BH, grad_weight_KH, None, grad_bias_K, None


def _setup_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_BH, weight_KH, _, bias_K, _ = inputs
    ctx.bias_dtype = None if bias_K is None else bias_K.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the gradient of what has none
    ctx.save_for_backward(hidden_BH, weight_KH, bias_K, output[1])


def _backward_kl(ctx: Any, grad_loss_B: Tensor, _: None) -> tuple[Tensor | None, ...]:
    hidden_BH, weight_KH, bias_K, loss_grad_BK = ctx.saved_tensors
    grad_BK = loss_gradient(grad_loss_B, loss_grad_BK, hidden_BH, weight_KH, bias_K)
    grad_hidden_BH, grad_weight_KH, grad_bias_K = _projected(ctx, grad_BK)
    return grad_hidden_BH, grad_weight_KH, None, grad_bias_K, None


def _setup_from_logits(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    logits_BV, token_ids_K, values_K, ctx.temperature = inputs
    ctx.set_materialize_grads(False)
    if not keyword_only_inputs["with_mass"]:
        ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(logits_BV, token_ids_K, values_K, output[2], output[3])


def _backward_from_logits(
    ctx: Any,
    grad_probs_BK: Tensor | None,
    grad_stats_3B: Tensor | None,
    grad_logits_BK: Tensor | None,
    grad_mass_3B: Tensor | None,
) -> tuple[Tensor | None, ...]:
    logits_BV, token_ids_K, values_K, logits_BK, mass_3B = ctx.saved_tensors
    grad_BK = score_gradient(
        logits_BK, values_K, grad_probs_BK, grad_stats_3B, grad_logits_BK, temperature=ctx.temperature
    )
    grad_mass_B = None if grad_mass_3B is None or not mass_3B.numel() else grad_mass_3B[0]
    return from_logits_gradient(logits_BV, token_ids_K, grad_BK, mass_3B, grad_mass_B), None, None, None


def _no_second_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    del ctx, grads
    raise NotImplementedError(
        "the score head has no second derivative; pass backend='reference' upstream of create_graph=True or detach it"
    )


def _register() -> None:
    pairs: list[tuple[Any, Callable[..., object], Callable[..., None]]] = [
        (head, _backward_head, _setup_head),
        (head_kl, _backward_kl, _setup_kl),
        (from_logits, _backward_from_logits, _setup_from_logits),
    ]
    for operator, backward, setup in pairs:
        operator.register_autograd(backward, setup_context=setup)
    for operator in (score_gradient, loss_gradient, hidden_gradient, weight_gradient, from_logits_gradient):
        operator.register_autograd(_no_second_gradient)


_register()
