"""Launches the Triton kernels: tiles, strides, outputs. On a CPU the same kernels run in Triton's interpreter.

The only module that loads the kernels, and triton with them, when the first one is launched: a CPU needs no triton.

Batch invariance, here: the tile is fixed by K, save its height (1 row for small batches, so that each row gets a
processor of its own), which no row's arithmetic can see. Nothing is specialised on B or on a stride, and input that
would change how loads are compiled (unaligned, inner stride other than 1) is copied first.

Shape suffixes: B rows, H hidden size, K score classes, V vocabulary, S runs of rows.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

backend_calls: Counter[tuple[str, str]] = Counter()
"""What has run, by path and name: ("triton", kernel) for each launch of a compiled kernel, ("interpreter", kernel) for
each in Triton's interpreter, ("reference", operation) for plain torch. Counted once it has succeeded."""

KERNEL_DEVICES: Final = ("cuda",)
"""Where backend="auto" takes the kernels."""
LANES: Final = 128
WARPS: Final = LANES // 32
"""One lane a thread: see head_kernels.py."""
SMALL_BATCH: Final = 256
"""Up to here a tile is one row; tiles of eight would occupy 16 of an H200's 132 processors at B = 128."""
COLS: Final = 512
"""Columns a tile in the gradients: four a thread."""
MAX_SPLITS: Final = 128
"""Runs of rows in the gradient of weight: enough to fill a GPU, and each costs K·H float32 of memory."""
MIN_ROWS_PER_SPLIT: Final = 32
VOCABULARY_COLS: Final = 4096
"""Columns a step over the vocabulary: 32 a thread, which keeps enough loads in flight for one row a program."""

# No contraction but the explicit tl.fma: the same roundings on every target.
_OPTIONS: Final = {"num_warps": WARPS, "enable_fp_fusion": False}


class Tile(NamedTuple):
    """How K classes are laid out; see head_kernels.py for the letters."""

    padded: int
    main: int
    tail: int
    groups: int
    rows: int

    @classmethod
    def of(cls, classes: int) -> Tile:
        """The tile for K classes."""
        padded = power_of_two(classes)
        if classes > 16:
            main, tail, groups = 8, 8, -(-classes // 16)
        else:
            main = min(8, padded if padded == classes else padded // 2)
            tail, groups = power_of_two(classes - main) if classes > main else 0, 1
        # Rows share each load of the weights. Eight rows of nine classes take 165 of 255 registers (bfloat16, sm_90,
        # triton 3.7.1; 194 with float32 weights), eight of sixteen 222 and, with float32 weights, more than there are.
        # At most LANES logits a tile: one for each thread of the softmax.
        rows = min(8 if main + tail <= 9 else 4, LANES // padded)
        return cls(padded, main, tail, groups, rows)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@cache
def _compiled() -> dict[str, Any]:
    """Every kernel by name, as triton.jit made it."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise RuntimeError(
            f"the score head's kernels need triton, which can't be imported ({error}); "
            "install triton>=3.6,<3.10 or pass backend='reference'"
        ) from error
    from zscore_kernels import head_kernels, vocabulary_kernels

    return {**vars(head_kernels), **vars(vocabulary_kernels)}


@cache
def _interpreted() -> dict[str, Any]:
    """Every kernel by name, to run in Triton's interpreter, wherever and however triton was imported first.

    TRITON_INTERPRET=1 does the same for a whole process, and only if set before triton is imported.
    """
    namespace = dict(_compiled())
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, found in _compiled().items():
        if isinstance(found, JITFunction):
            function = FunctionType(found.fn.__code__, namespace, name, found.fn.__defaults__)
            function.__annotations__ = found.fn.__annotations__
            interpreted = InterpretedFunction(function)
            # What a kernel calls is called directly: the interpreter would patch triton.language again for every call.
            namespace[name] = interpreted if name.endswith("_kernel") else interpreted.rewrite()
    # The interpreter sums with numpy where it knows the combine function, and element by element where it doesn't.
    namespace["add"] = getattr(tl.standard, "_sum_combine", namespace["add"])
    namespace["larger"] = getattr(tl.standard, "_elementwise_max", namespace["larger"])
    return namespace


def kernel(name: str, beside: Tensor) -> Any:
    """The kernel that runs on the device of `beside`."""
    return (_interpreted() if beside.device.type == "cpu" else _compiled())[name]


def _launch(name: str, grid: tuple[int, ...], *args: object, beside: Tensor, **constants: object) -> None:
    """Runs a kernel on the device of `beside`, and counts it once it is in the queue."""
    found = kernel(name, beside)
    with _on(beside):
        found[grid](*args, **constants, **_OPTIONS)
    # Not by the device: under TRITON_INTERPRET=1 tensors of a GPU are interpreted too, on the host.
    backend_calls["triton" if isinstance(found, _compiled_type()) else "interpreter", name] += 1


@cache
def _compiled_type() -> type:
    from triton.runtime.jit import JITFunction

    return JITFunction  # type: ignore[no-any-return]


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors say."""
    if tensor.device.type == "cpu" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def aligned_rows(matrix: Tensor) -> tuple[Tensor, int, int]:
    """The matrix as the kernels read it: inner stride 1, 16-byte base, rows aligned wherever their length allows it.

    Returns the matrix (copied if need be), its row stride in units, and the unit.
    """
    unit = 4 if matrix.shape[1] % 4 == 0 else 1
    if matrix.stride(1) != 1 or matrix.data_ptr() % 16 or matrix.stride(0) % unit:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix, matrix.stride(0) // unit, unit


def head_forward(
    hidden_BH: Tensor, weight_KH: Tensor, values_K: Tensor, bias_K: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns probs_BK, stats_3B (mean, variance, entropy) and logits_BK."""
    outputs = new_head(hidden_BH, weight_KH.shape[0])
    _project("head_kernel", hidden_BH, weight_KH, bias_K, (values_K.contiguous(), *outputs), temperature=temperature)
    return outputs


def kl_forward(
    hidden_BH: Tensor, weight_KH: Tensor, target_BK: Tensor, bias_K: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns loss_B and its gradient with respect to hidden·weight + bias, grad_BK."""
    outputs = new_loss(hidden_BH, target_BK)
    _project("kl_kernel", hidden_BH, weight_KH, bias_K, (target_BK.contiguous(), *outputs), temperature=temperature)
    return outputs


def new_head(beside: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs for the rows of `beside`: probs_BK, stats_3B, logits_BK."""
    rows = beside.shape[0]
    return (
        beside.new_empty((rows, classes), dtype=torch.float32),
        beside.new_empty((3, rows), dtype=torch.float32),
        beside.new_empty((rows, classes), dtype=torch.float32),
    )


def new_loss(beside: Tensor, target_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs for the rows of `beside`: loss_B, grad_BK."""
    return (
        beside.new_empty((target_BK.shape[0],), dtype=torch.float32),
        beside.new_empty(target_BK.shape, dtype=torch.float32),
    )


def new_mass(beside: Tensor, *, with_mass: bool) -> Tensor:
    """Output for the rows of `beside`: mass_3B, or nothing."""
    return beside.new_empty((3, beside.shape[0] if with_mass else 0), dtype=torch.float32)


def _project(
    kernel: str,
    hidden_BH: Tensor,
    weight_KH: Tensor,
    bias_K: Tensor | None,
    rest: tuple[Tensor, ...],
    *,
    temperature: float,
) -> None:
    rows, width = hidden_BH.shape
    if rows == 0:
        return
    hidden_BH, stride, unit = aligned_rows(hidden_BH)
    weight_KH, _, _ = aligned_rows(weight_KH.contiguous())
    classes = weight_KH.shape[0]
    tile = Tile.of(classes)
    height = 1 if rows <= SMALL_BATCH else tile.rows
    _launch(
        kernel, (-(-rows // height),),
        hidden_BH, weight_KH, weight_KH if bias_K is None else bias_K.contiguous(), *rest, rows, stride, temperature,
        beside=hidden_BH, H=width, K=classes, P=tile.padded, MAIN=tile.main, TAIL=tile.tail, GROUPS=tile.groups,
        ROWS=height, LANES=LANES, UNIT=unit, HAS_BIAS=bias_K is not None,
    )  # fmt: skip


def score_gradient(
    logits_BK: Tensor,
    values_K: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    temperature: float,
) -> Tensor:
    """Gradients of probs_BK, stats_3B and logits_BK (None: not used) → gradient before the temperature, grad_BK."""
    rows, classes = logits_BK.shape
    out_BK = torch.empty_like(logits_BK)
    if rows == 0:
        return out_BK
    tile = Tile.of(classes)
    height = LANES // tile.padded
    probs, stats, logits = (None if grad is None else grad.contiguous() for grad in grads)
    _launch(
        "score_gradient_kernel", (-(-rows // height),),
        logits_BK, values_K.contiguous(),
        *(out_BK if grad is None else grad for grad in (probs, stats, logits)), out_BK, rows, temperature,
        beside=logits_BK, K=classes, P=tile.padded, ROWS=height,
        HAS_PROBS=probs is not None, HAS_STATS=stats is not None, HAS_LOGITS=logits is not None,
    )  # fmt: skip
    return out_BK


def hidden_gradient(grad_BK: Tensor, weight_KH: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_BK · weight_KH, in the dtype of the hidden states."""
    rows, (classes, width) = grad_BK.shape[0], weight_KH.shape
    out_BH = grad_BK.new_empty((rows, width), dtype=dtype)
    if rows == 0:
        return out_BH
    height = 8
    _launch(
        "hidden_gradient_kernel", (-(-rows // height), -(-width // COLS)),
        grad_BK.contiguous(), aligned_rows(weight_KH.contiguous())[0], out_BH, rows,
        beside=grad_BK, H=width, K=classes, ROWS=height, COLS=COLS,
    )  # fmt: skip
    return out_BH


def weight_gradient(grad_BK: Tensor, hidden_BH: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_BKᵀ · hidden_BH in two stages: at most MAX_SPLITS runs of rows, then the runs in order."""
    (rows, width), classes = hidden_BH.shape, grad_BK.shape[1]
    out_KH = grad_BK.new_empty((classes, width), dtype=dtype)
    if rows == 0:
        return out_KH.zero_()
    hidden_BH, stride, unit = aligned_rows(hidden_BH)
    run = min(rows, max(MIN_ROWS_PER_SPLIT, -(-rows // MAX_SPLITS)))
    splits = -(-rows // run)
    tile = Tile.of(classes)
    partial_SKH = grad_BK.new_empty((splits, classes, width), dtype=torch.float32)
    _launch(
        "weight_partial_kernel", (splits, -(-width // COLS), tile.groups),
        grad_BK.contiguous(), hidden_BH, partial_SKH, rows, stride, run,
        beside=grad_BK, H=width, K=classes, MAIN=tile.main, TAIL=tile.tail, COLS=COLS, UNIT=unit,
    )  # fmt: skip
    size = classes * width
    _launch(
        "weight_gather_kernel", (-(-size // COLS),), partial_SKH, out_KH, splits,
        beside=grad_BK, SIZE=size, COLS=COLS,
    )  # fmt: skip
    return out_KH


def from_logits_forward(
    logits_BV: Tensor, token_ids_K: Tensor, values_K: Tensor, temperature: float, *, with_mass: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns probs_BK, stats_3B, logits_BK and mass_3B: log mass, then the row's maximum and log-sum about it."""
    (rows, width), classes = logits_BV.shape, token_ids_K.shape[0]
    outputs = new_head(logits_BV, classes)
    mass_3B = new_mass(logits_BV, with_mass=with_mass)
    if rows == 0:
        return *outputs, mass_3B
    # Without the mass nothing but K columns is read, so a copy to align the rows would cost more than the kernel.
    stride, unit = logits_BV.stride(0), 1
    if with_mass:
        logits_BV, stride, unit = aligned_rows(logits_BV)
    tile = Tile.of(classes)
    height = 1 if with_mass else LANES // tile.padded
    _launch(
        "from_logits_kernel", (-(-rows // height),),
        logits_BV, token_ids_K.contiguous(), values_K.contiguous(), *outputs, mass_3B,
        rows, stride, logits_BV.stride(1), temperature,
        beside=logits_BV, V=width, K=classes, P=tile.padded, ROWS=height, COLS=VOCABULARY_COLS, UNIT=unit,
        WITH_MASS=with_mass,
    )  # fmt: skip
    return *outputs, mass_3B


def from_logits_gradient(
    logits_BV: Tensor, token_ids_K: Tensor, grad_BK: Tensor, mass_3B: Tensor, grad_mass_B: Tensor | None
) -> Tensor:
    """Gradient of the full-vocabulary logits: zero outside the K columns, unless the mass has one."""
    (rows, width), classes = logits_BV.shape, token_ids_K.shape[0]
    with_mass = grad_mass_B is not None
    out_BV = torch.empty_like(logits_BV, memory_format=torch.contiguous_format)
    if not with_mass:
        out_BV.zero_()
    if rows == 0:
        return out_BV
    logits_BV, stride, unit = aligned_rows(logits_BV) if with_mass else (logits_BV, 0, 1)
    grad_mass_B = grad_BK if grad_mass_B is None else grad_mass_B.contiguous()
    if with_mass:
        _launch(
            "mass_gradient_kernel", (rows, -(-width // VOCABULARY_COLS)),
            logits_BV, mass_3B, grad_mass_B, out_BV, rows, stride,
            beside=grad_BK, V=width, COLS=VOCABULARY_COLS, UNIT=unit,
        )  # fmt: skip
    _launch(
        "column_gradient_kernel", (rows,),
        logits_BV, token_ids_K.contiguous(), grad_BK.contiguous(), mass_3B, grad_mass_B, out_BV, rows, stride,
        beside=grad_BK, V=width, K=classes, P=Tile.of(classes).padded, UNIT=unit, WITH_MASS=with_mass,
    )  # fmt: skip
    return out_BV
