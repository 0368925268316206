"""What the score head accepts, refused before any launch: each error says the value, the limit and the fix.

Only shapes, dtypes, devices and host values are looked at; nothing here reads a tensor on a GPU, which would make the
caller wait for it.

Shape suffixes: B rows, H hidden size, K score classes, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, get_args

import torch

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["auto", "triton", "reference"]
Reduction = Literal["mean", "sum", "none"]

MIN_CLASSES: Final = 2
MAX_CLASSES: Final = 64
MAX_WIDTH: Final = 65_535 * 512
"""A CUDA grid has 65,535 tiles of 512 columns at most. K·H stays below 2^31 by it, where int32 offsets would wrap."""
MIN_TEMPERATURE: Final = 1e-12
"""Logits are divided by it before their maximum is subtracted: those up to 10²⁶ stay finite. Float32 logits of size 1
are 6e-8 apart, so that the softmax has long been a choice of the largest here."""
FLOAT32: Final = torch.finfo(torch.float32)
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def check_backend(backend: str) -> None:
    """Refuses a backend that doesn't exist."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown; take 'auto', 'triton' or 'reference'")


def check_reduction(reduction: str) -> None:
    """Refuses a reduction that doesn't exist."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction={reduction!r} is unknown; take 'mean', 'sum' or 'none'")


def check_temperature(temperature: float) -> float:
    """Refuses a temperature by which the kernels can't divide in float32."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature is a {type(temperature).__name__}; pass a float (a tensor: its .item())")
    try:
        number = float(temperature)
    except OverflowError:  # an int beyond float64, perhaps too long to print
        number = math.copysign(math.inf, 1 if temperature > 0 else -1)
    if not MIN_TEMPERATURE <= number <= FLOAT32.max:
        shown = temperature if math.isfinite(number) else number
        raise ValueError(
            f"temperature={shown} must be from {MIN_TEMPERATURE} to {FLOAT32.max}; 1.0 leaves the logits as they are"
        )
    return number


def check_head(hidden_BH: Tensor, weight_KH: Tensor, bias_K: Tensor | None) -> None:
    """Refuses hidden states, weight and bias that don't fit each other."""
    _check_matrix("hidden_BH", hidden_BH)
    _check_matrix("weight_KH", weight_KH)
    rows, width = weight_KH.shape
    if width != hidden_BH.shape[1]:
        raise ValueError(
            f"weight_KH has {width} columns and hidden_BH {hidden_BH.shape[1]}; both must be the hidden size H"
        )
    if width < 1:
        raise ValueError("hidden_BH has 0 columns; H must be at least 1")
    if width > MAX_WIDTH:
        raise ValueError(f"hidden_BH has {width} columns; H must be at most {MAX_WIDTH}; is it transposed?")
    _check_classes("weight_KH", rows)
    check_same_device(hidden_BH, weight_KH=weight_KH)
    if bias_K is not None:
        _check_vector("bias_K", bias_K, rows)
        _check_float("bias_K", bias_K)
        check_same_device(hidden_BH, bias_K=bias_K)


def check_values(values_K: Tensor, classes: int, beside: Tensor) -> None:
    """Refuses level values that don't fit K classes."""
    _check_vector("values_K", values_K, classes)
    if values_K.is_complex() or values_K.dtype == torch.bool:
        raise TypeError(f"values_K is {values_K.dtype}; pass the levels' values as float32")
    if values_K.requires_grad:
        raise ValueError("values_K requires grad; the levels' values are constants: pass values_K.detach()")
    check_same_device(beside, values_K=values_K)


def check_target(target_BK: Tensor, rows: int, classes: int, beside: Tensor) -> None:
    """Refuses target probabilities that don't fit B rows of K classes."""
    _check_matrix("target_probs_BK", target_BK)
    if tuple(target_BK.shape) != (rows, classes):
        raise ValueError(f"target_probs_BK has shape {tuple(target_BK.shape)}; it must be (B, K) = ({rows}, {classes})")
    if target_BK.requires_grad:
        raise ValueError("target_probs_BK requires grad; the target is a constant: pass target_probs_BK.detach()")
    check_same_device(beside, target_probs_BK=target_BK)


def check_vocabulary(logits_BV: Tensor, token_ids_K: Tensor) -> None:
    """Refuses full-vocabulary logits and token ids that don't fit each other.

    Ids in host memory are checked against V. Ids on a GPU are not (that would wait for it): one outside the
    vocabulary gives NaN.
    """
    _check_matrix("logits_BV", logits_BV)
    if not isinstance(token_ids_K, torch.Tensor):
        raise TypeError(f"token_ids_K is a {type(token_ids_K).__name__}; pass an int64 tensor")
    if token_ids_K.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids_K is {token_ids_K.dtype}; pass int64")
    if token_ids_K.dim() != 1:
        raise ValueError(f"token_ids_K has shape {tuple(token_ids_K.shape)}; it must be (K,)")
    _check_classes("token_ids_K", token_ids_K.shape[0])
    check_same_device(logits_BV, token_ids_K=token_ids_K)
    if token_ids_K.device.type != "cpu" or torch.compiler.is_compiling():
        return
    width = logits_BV.shape[1]
    for token in token_ids_K.tolist():
        if not 0 <= token < width:
            raise ValueError(f"token_ids_K holds {token}; ids must be from 0 to {width - 1} (V = {width})")


def check_same_device(beside: Tensor, **tensors: Tensor) -> None:
    """Refuses a tensor on another device than the first one."""
    for name, tensor in tensors.items():
        if tensor.device != beside.device:
            raise ValueError(f"{name} is on {tensor.device} and the input on {beside.device}; move {name} there")


def _check_matrix(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; pass a tensor")
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 2 dimensions")
    _check_float(name, tensor)


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; cast it to float32, bfloat16 or float16")


def _check_vector(name: str, tensor: Tensor, classes: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; pass a tensor of shape ({classes},)")
    if tuple(tensor.shape) != (classes,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (K,) = ({classes},)")


def _check_classes(name: str, classes: int) -> None:
    if not MIN_CLASSES <= classes <= MAX_CLASSES:
        raise ValueError(
            f"{name} has {classes} rows (score classes); K must be from {MIN_CLASSES} to {MAX_CLASSES}: split the head"
        )
