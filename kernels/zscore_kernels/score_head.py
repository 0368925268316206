"""The public score head: checks its arguments, then runs the kernels on CUDA and plain torch elsewhere.

Departs from the paper's text only in what it also returns: eq. 2 is the mean; variance and entropy of the same
distribution cost nothing more.

Shape suffixes: B rows, H hidden size, K score classes, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar, overload

import torch

from zscore_kernels import checks, launch, ops, reference
from zscore_kernels.reference import ScoreHead, ScoreHeadMass

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int, Real
    from torch import Tensor

    from zscore_kernels.checks import Backend, Reduction

Result = TypeVar("Result")


def score_head(
    hidden_BH: Float[Tensor, "B H"],
    weight_KH: Float[Tensor, "K H"],
    values_K: Real[Tensor, " K"],
    bias_K: Float[Tensor, " K"] | None = None,
    temperature: float = 1.0,
    *,
    backend: Backend = "auto",
) -> ScoreHead:
    """Turns hidden states into score distributions over K levels, differentiable in hidden, weight and bias.

    A row's result has the same bits whatever batch it is in and wherever it stands there.

    Args:
        hidden_BH: float32, bfloat16 or float16; any strides; B from 0 up.
        weight_KH: the K score rows of the language model's head, 2 ≤ K ≤ 64. In the dtype of the checkpoint: products
            and sums are float32 anyway, and a bfloat16 copy is half the bytes to read.
        values_K: what each level is worth, in rubric units.
        bias_K: added to the logits.
        temperature: divides the logits (and the bias); from 1e-12 to 3.4e38.
        backend: "auto" takes the kernels on CUDA and plain torch elsewhere; "triton" or "reference" force one of
            them ("triton" on a CPU runs the kernels in Triton's interpreter: slow, for tests).

    Returns:
        Probabilities, mean (eq. 2), variance, entropy in nats and logits, all float32.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that doesn't fit.
        RuntimeError: CUDA input without an importable triton.
    """
    checks.check_backend(backend)
    temperature = checks.check_temperature(temperature)
    checks.check_head(hidden_BH, weight_KH, bias_K)
    checks.check_values(values_K, weight_KH.shape[0], hidden_BH)
    if not _takes_kernels("score_head", hidden_BH, backend):
        return _counted("score_head", reference.score_head(hidden_BH, weight_KH, values_K, bias_K, temperature))
    probs_BK, stats_3B, logits_BK = ops.head(hidden_BH, weight_KH, values_K, bias_K, temperature)
    return ScoreHead(probs_BK, stats_3B[0], stats_3B[1], stats_3B[2], logits_BK)


@overload
def score_from_logits(
    logits_BV: Float[Tensor, "B V"],
    token_ids_K: Int[Tensor, " K"],
    values_K: Real[Tensor, " K"],
    temperature: float = 1.0,
    *,
    with_mass: Literal[False] = False,
    backend: Backend = "auto",
) -> ScoreHead: ...
@overload
def score_from_logits(
    logits_BV: Float[Tensor, "B V"],
    token_ids_K: Int[Tensor, " K"],
    values_K: Real[Tensor, " K"],
    temperature: float = 1.0,
    *,
    with_mass: Literal[True],
    backend: Backend = "auto",
) -> ScoreHeadMass: ...
def score_from_logits(
    logits_BV: Float[Tensor, "B V"],
    token_ids_K: Int[Tensor, " K"],
    values_K: Real[Tensor, " K"],
    temperature: float = 1.0,
    *,
    with_mass: bool = False,
    backend: Backend = "auto",
) -> ScoreHead | ScoreHeadMass:
    """Turns full-vocabulary logits into score distributions, reading only the K columns; differentiable in the logits.

    Args:
        logits_BV: float32, bfloat16 or float16; any strides.
        token_ids_K: the levels' tokens. On a GPU an id outside the vocabulary gives NaN.
        values_K: what each level is worth, in rubric units.
        temperature: divides the K logits; the mass stays at temperature 1.
        with_mass: also return the logarithm of the probability that the K tokens hold together. Reads all of V.
        backend: as in `score_head`.

    Returns:
        As `score_head`; with the mass, `log_mass_B` besides.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that doesn't fit.
        RuntimeError: CUDA input without an importable triton.
    """
    checks.check_backend(backend)
    temperature = checks.check_temperature(temperature)
    checks.check_vocabulary(logits_BV, token_ids_K)
    checks.check_values(values_K, token_ids_K.shape[0], logits_BV)
    if not _takes_kernels("score_from_logits", logits_BV, backend):
        return _counted(
            "score_from_logits",
            reference.score_from_logits(logits_BV, token_ids_K, values_K, temperature, with_mass=with_mass),
        )
    probs_BK, stats_3B, logits_BK, mass_3B = ops.from_logits(
        logits_BV, token_ids_K, values_K, temperature, with_mass=with_mass
    )
    head = ScoreHead(probs_BK, stats_3B[0], stats_3B[1], stats_3B[2], logits_BK)
    return ScoreHeadMass(*head, mass_3B[0]) if with_mass else head


def score_head_kl(
    hidden_BH: Float[Tensor, "B H"],
    weight_KH: Float[Tensor, "K H"],
    target_probs_BK: Float[Tensor, "B K"],
    bias_K: Float[Tensor, " K"] | None = None,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Float32[Tensor, "*B"]:
    """Distils a target distribution into the head: KL(target ‖ softmax(logits)), differentiable as `score_head` is.

    Loss and gradient of the logits come from one pass over the hidden states; nothing of size V is ever made. The
    target is a constant. It is not normalised: rows that sum to another mass than 1 scale their gradient by it.

    Args:
        hidden_BH: as in `score_head`.
        weight_KH: as in `score_head`.
        target_probs_BK: probabilities; 0·log 0 counts as 0.
        bias_K: as in `score_head`.
        temperature: divides the logits, not the target.
        reduction: "mean" over rows (0 for an empty batch), "sum", or "none" for loss_B.
        backend: as in `score_head`.

    Returns:
        The loss in nats, float32.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that doesn't fit.
        RuntimeError: CUDA input without an importable triton.
    """
    checks.check_backend(backend)
    checks.check_reduction(reduction)
    temperature = checks.check_temperature(temperature)
    checks.check_head(hidden_BH, weight_KH, bias_K)
    checks.check_target(target_probs_BK, hidden_BH.shape[0], weight_KH.shape[0], hidden_BH)
    if not _takes_kernels("score_head_kl", hidden_BH, backend):
        return _counted(
            "score_head_kl",
            reference.score_head_kl(hidden_BH, weight_KH, target_probs_BK, bias_K, temperature, reduction=reduction),
        )
    loss_B, _ = ops.head_kl(hidden_BH, weight_KH, target_probs_BK, bias_K, temperature)
    return reference.reduce_loss(loss_B, reduction)


def _takes_kernels(name: str, beside: Tensor, backend: Backend) -> bool:
    """Whether the kernels run. CUDA never falls back: a slow path taken in silence is a bug that nobody sees."""
    device = beside.device.type
    if backend == "auto":
        backend = "triton" if device in launch.KERNEL_DEVICES else "reference"
    if backend == "triton" and device not in ("cuda", "cpu"):
        raise ValueError(f"{name}: backend='triton' can't run on {device}; move the input to CUDA or pass 'reference'")
    return backend == "triton"


def _counted(name: str, result: Result) -> Result:
    """Counts an operation that plain torch has done; what a compiled graph does isn't seen from here."""
    if not torch.compiler.is_compiling():
        launch.backend_calls["reference", name] += 1
    return result
