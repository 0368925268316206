"""The Triton kernels from full-vocabulary logits to scores, and back; `launch.py` is their only caller.

Shape suffixes: R rows of a tile, K score classes, P and Q classes padded to a power of two, N columns of a block.

The score needs K columns of a row and reads no others. The in-set mass needs them all: one program reads its row
once, each of its N lanes keeping a running maximum and a running sum, so the order of additions depends on V alone.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202, PLR0913, PLR0917
# The compiler reads a kernel's annotations as types of its own, so there are none but tl.constexpr.

import triton
import triton.language as tl

from zscore_kernels.head_kernels import add, larger, pairwise_sum, softmax, store_head


@triton.jit
def _row_log_sum_exp(row_ptr, V: tl.constexpr, COLS: tl.constexpr):
    """Maximum of a row and the logarithm of the sum of exponentials about it.

    Kept apart: their sum would round away the digits that matter for logits in the thousands.
    """
    n_N = tl.arange(0, COLS)
    # The lowest finite number, not minus infinity: a masked token's -inf minus it is -inf, and not NaN.
    max_N = tl.full((COLS,), -3.4028234663852886e38, tl.float32)
    sum_N = tl.full((COLS,), 0.0, tl.float32)
    for start in tl.range(0, V, COLS, loop_unroll_factor=2):
        at_N = start + n_N
        x_N = tl.load(row_ptr + at_N, mask=at_N < V, other=float("-inf")).to(tl.float32)
        gap_N = x_N - max_N
        # One exponential a column: either the old sum shrinks to the new maximum, or the column to the old one.
        e_N = tl.exp(-tl.abs(gap_N))
        sum_N = tl.where(gap_N > 0.0, sum_N * e_N + 1.0, sum_N + e_N)
        max_N = tl.maximum(max_N, x_N)
    row_max = tl.reduce(max_N, 0, larger)
    sum_1N = (sum_N * tl.exp(max_N - row_max))[None, :]
    return row_max, tl.log(tl.reduce(pairwise_sum(sum_1N), 0, add))


@triton.jit(do_not_specialize=["num_rows", "row_stride", "col_stride"], do_not_specialize_on_alignment=["values_ptr"])
def from_logits_kernel(
    logits_ptr,
    ids_ptr,
    values_ptr,
    probs_ptr,
    stats_ptr,
    out_ptr,
    mass_ptr,
    num_rows,
    row_stride,
    col_stride,
    temperature,
    V: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
    WITH_MASS: tl.constexpr,
):
    """Gathers K columns of each row → distribution, mean, variance, entropy; and the in-set mass, one row a program."""
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows_R < num_rows
    p_P = tl.arange(0, P)
    # Padding has an id outside the vocabulary, so that it reads nothing.
    ids_P = tl.load(ids_ptr + p_P, mask=p_P < K, other=-1).to(tl.int64)
    # An id outside the vocabulary can't be refused without waiting for the GPU: it reads as NaN, never as a neighbour.
    known_P = (ids_P >= 0) & (ids_P < V)
    row_step = row_stride.to(tl.int64) * UNIT
    ptrs_RP = logits_ptr + rows_R[:, None] * row_step + (ids_P * col_stride)[None, :]
    raw_RP = tl.load(ptrs_RP, mask=in_batch[:, None] & known_P[None, :], other=0.0).to(tl.float32)
    raw_RP = tl.where(known_P[None, :], raw_RP, float("nan"))
    z_RP = tl.where((p_P < K)[None, :], tl.div_rn(raw_RP, temperature), float("-inf"))
    store_head(z_RP, values_ptr, probs_ptr, stats_ptr, out_ptr, rows_R, num_rows, K)
    if WITH_MASS:
        # The mass is the model's own, whatever the temperature of the scores.
        raw_RP = tl.where((p_P < K)[None, :], raw_RP, float("-inf"))
        set_max_R = tl.reduce(raw_RP, 1, larger)
        # Where all K are minus infinity, about 0: their sum is 0 and its logarithm minus infinity, and not NaN.
        about_R = tl.where(set_max_R == float("-inf"), 0.0, set_max_R)
        set_log_R = tl.log(pairwise_sum(tl.exp(raw_RP - about_R[:, None])))
        row = tl.program_id(0).to(tl.int64)
        row_max, row_log = _row_log_sum_exp(logits_ptr + row * row_step, V, COLS)
        base = num_rows.to(tl.int64)
        tl.store(mass_ptr + rows_R, (set_max_R - row_max) + (set_log_R - row_log), mask=in_batch)
        tl.store(mass_ptr + base + rows_R, tl.full((ROWS,), 0.0, tl.float32) + row_max, mask=in_batch)
        tl.store(mass_ptr + 2 * base + rows_R, tl.full((ROWS,), 0.0, tl.float32) + row_log, mask=in_batch)


@triton.jit(do_not_specialize=["num_rows", "row_stride"])
def mass_gradient_kernel(
    logits_ptr,
    mass_ptr,
    grad_mass_ptr,
    out_ptr,
    num_rows,
    row_stride,
    V: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The part of the mass's gradient that every column shares: minus its own probability."""
    row = tl.program_id(0).to(tl.int64)
    at_N = tl.program_id(1) * COLS + tl.arange(0, COLS)
    row_max = tl.load(mass_ptr + num_rows.to(tl.int64) + row)
    row_log = tl.load(mass_ptr + 2 * num_rows.to(tl.int64) + row)
    grad = tl.load(grad_mass_ptr + row)
    row_ptr = logits_ptr + row * (row_stride.to(tl.int64) * UNIT)
    x_N = tl.load(row_ptr + at_N, mask=at_N < V, other=float("-inf")).to(tl.float32)
    out_N = -grad * tl.exp(x_N - row_max - row_log)
    tl.store(out_ptr + row * V + at_N, out_N.to(out_ptr.dtype.element_ty), mask=at_N < V)


@triton.jit(do_not_specialize=["num_rows", "row_stride"])
def column_gradient_kernel(
    logits_ptr,
    ids_ptr,
    grad_ptr,
    mass_ptr,
    grad_mass_ptr,
    out_ptr,
    num_rows,
    row_stride,
    V: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    WITH_MASS: tl.constexpr,
):
    """Gradient of the K gathered columns of one row; equal ids share a column and only the first of them writes it."""
    row = tl.program_id(0).to(tl.int64)
    p_P = tl.arange(0, P)
    ids_P = tl.load(ids_ptr + p_P, mask=p_P < K, other=-1).to(tl.int64)
    known_P = (ids_P >= 0) & (ids_P < V)
    grad_P = tl.load(grad_ptr + row * K + p_P, mask=p_P < K, other=0.0)
    if WITH_MASS:
        row_ptr = logits_ptr + row * (row_stride.to(tl.int64) * UNIT)
        raw_P = tl.load(row_ptr + ids_P, mask=known_P, other=float("-inf")).to(tl.float32)
        probs_1P, _ = softmax(raw_P[None, :])
        # A forbidden class takes no part, not even where all are and the softmax is NaN.
        probs_P = tl.where(raw_P == float("-inf"), 0.0, tl.reshape(probs_1P, (P,)))
        grad_mass = tl.load(grad_mass_ptr + row)
        grad_P += grad_mass * probs_P
    # Row i of the table sums what falls to the column of class i.
    ids_Q = tl.load(ids_ptr + p_P, mask=p_P < K, other=-2).to(tl.int64)
    same_PQ = ids_P[:, None] == ids_Q[None, :]
    total_P = pairwise_sum(tl.where(same_PQ, grad_P[None, :], 0.0))
    earlier_P = tl.reduce(tl.where(same_PQ & (p_P[None, :] < p_P[:, None]), 1, 0), 1, add)
    if WITH_MASS:
        row_max = tl.load(mass_ptr + num_rows.to(tl.int64) + row)
        row_log = tl.load(mass_ptr + 2 * num_rows.to(tl.int64) + row)
        total_P -= grad_mass * tl.exp(raw_P - row_max - row_log)
    mask_P = known_P & (earlier_P == 0)
    tl.store(out_ptr + row * V + ids_P, total_P.to(out_ptr.dtype.element_ty), mask=mask_P)
