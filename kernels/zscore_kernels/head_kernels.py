"""The Triton kernels from hidden states to scores, and back; `launch.py` is their only caller.

Shape suffixes: R rows of a tile, K score classes, P classes padded to a power of two, A and C the two powers of two
that K is cut into (9 = 8 + 1), L lanes, V neighbouring columns of a lane, N columns of a tile.

Why sums are spelled out: a score may not depend on the batch that it came in, so no order of additions may be left
to a tile size, to the autotuner or to the compiler's choice of layout.
- A logit is LANES chains of fused multiply-adds, each over its own columns in rising order, then a sum over the lanes.
  The chains are elementwise: no tile height, layout or dtype can reorder them.
- Sums over lanes and over classes are trees of additions of two, see `pairwise_sum`.
- `tl.fma` is explicit and the launcher forbids other contractions: one rounding a step, on every target.
- `tl.dot` is not used: its order belongs to the tensor cores, and it would round fp32 to TF32 unless told not to.

`tl.sum` and `tl.max` are avoided because they are compiled functions themselves, which the interpreter can only run
where triton was imported under TRITON_INTERPRET=1; `tl.reduce` is a builtin and works either way.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN201, ANN202, PLR0913, PLR0917
# The compiler reads a kernel's annotations as types of its own, so there are none but tl.constexpr.

import triton
import triton.language as tl

# Columns that a lane reads in one load: 16 bytes of fp32, 8 of bf16. Wider loads would tie the lanes to the dtype.
VEC = tl.constexpr(4)


@triton.jit
def add(a, b):
    """Sum of two, for `tl.reduce`."""
    return a + b


@triton.jit
def larger(a, b):
    """Larger of two, for `tl.reduce`."""
    return tl.maximum(a, b)


@triton.jit
def pairwise_sum(x_RN):
    """Sums rows of N numbers, N a power of two up to 4,096: neighbours first, then neighbouring sums.

    Every reduction has two operands, so its order is the source's and not the layout's. A plain reduction over N is
    not: triton 3.6 sums nine probabilities in another order for one row than for eight.
    """
    for _ in tl.static_range(12):
        if x_RN.shape[1] > 1:
            x_RN = tl.reduce(tl.reshape(x_RN, (x_RN.shape[0], x_RN.shape[1] // 2, 2)), 2, add)
    return tl.reshape(x_RN, (x_RN.shape[0],))


@triton.jit
def _multiply_add(x_RLV, w_ALV, acc_RAL):
    """Adds the VEC columns of each lane to its chain, lowest column first."""
    R: tl.constexpr = x_RLV.shape[0]
    A: tl.constexpr = w_ALV.shape[0]
    L: tl.constexpr = x_RLV.shape[1]
    x_even, x_odd = tl.split(tl.reshape(x_RLV, (R, L, 2, 2)))
    w_even, w_odd = tl.split(tl.reshape(w_ALV, (A, L, 2, 2)))
    x0, x2 = tl.split(x_even)
    x1, x3 = tl.split(x_odd)
    w0, w2 = tl.split(w_even)
    w1, w3 = tl.split(w_odd)
    acc_RAL = tl.fma(x0[:, None, :], w0[None, :, :], acc_RAL)
    acc_RAL = tl.fma(x1[:, None, :], w1[None, :, :], acc_RAL)
    acc_RAL = tl.fma(x2[:, None, :], w2[None, :, :], acc_RAL)
    return tl.fma(x3[:, None, :], w3[None, :, :], acc_RAL)


@triton.jit
def _sum_lanes(acc_RAL):
    R: tl.constexpr = acc_RAL.shape[0]
    A: tl.constexpr = acc_RAL.shape[1]
    return tl.reshape(pairwise_sum(tl.reshape(acc_RAL, (R * A, acc_RAL.shape[2]))), (R, A))


@triton.jit
def _repeat_to(z_RA, P: tl.constexpr):
    """Repeats A columns until there are P: column j of a group of A stands at every j + i·A."""
    R: tl.constexpr = z_RA.shape[0]
    A: tl.constexpr = z_RA.shape[1]
    return tl.reshape(tl.broadcast_to(z_RA[:, None, :], (R, P // A, A)), (R, P))


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows_R,
    num_rows,
    hidden_stride,
    temperature,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Logits of ROWS rows, (hidden·weight + bias) / temperature; minus infinity in the padding beyond K.

    K > 16 runs in GROUPS of 16 classes, each reading the rows again (from cache): such heads are bound by arithmetic,
    and one pass would need K accumulators a row in registers.
    """
    p_P = tl.arange(0, P)
    cols_LV = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    in_batch = (rows_R < num_rows)[:, None, None]
    # A stride counted in units of UNIT columns tells the compiler that rows start aligned, without specialising on it.
    row_ptrs = hidden_ptr + (rows_R * (hidden_stride.to(tl.int64) * UNIT))[:, None, None]
    z_RP = tl.full((ROWS, P), 0.0, tl.float32)
    for group in range(GROUPS):
        first = group * (MAIN + TAIL)
        main_A = first + tl.arange(0, MAIN)
        acc_RAL = tl.full((ROWS, MAIN, LANES), 0.0, tl.float32)
        if TAIL > 0:
            tail_C = first + MAIN + tl.arange(0, TAIL)
            acc_RCL = tl.full((ROWS, TAIL, LANES), 0.0, tl.float32)
        # Two steps unrolled keep the next columns' loads in flight while these are multiplied.
        for start in tl.range(0, H, LANES * VEC, loop_unroll_factor=2):
            h = (start + cols_LV)[None, :, :]
            x = tl.load(row_ptrs + h, mask=in_batch & (h < H), other=0.0, eviction_policy="evict_first")
            x_RLV = x.to(tl.float32)
            w_mask = (main_A < K)[:, None, None] & (h < H)
            w_ptrs = weight_ptr + main_A[:, None, None] * H + h
            w = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_last")
            acc_RAL = _multiply_add(x_RLV, w.to(tl.float32), acc_RAL)
            if TAIL > 0:
                w_mask = (tail_C < K)[:, None, None] & (h < H)
                w_ptrs = weight_ptr + tail_C[:, None, None] * H + h
                w = tl.load(w_ptrs, mask=w_mask, other=0.0, eviction_policy="evict_last")
                acc_RCL = _multiply_add(x_RLV, w.to(tl.float32), acc_RCL)
        in_main = (p_P >= first) & (p_P < first + MAIN)
        z_RP = tl.where(in_main[None, :], _repeat_to(_sum_lanes(acc_RAL), P), z_RP)
        if TAIL > 0:
            in_tail = (p_P >= first + MAIN) & (p_P < first + MAIN + TAIL)
            z_RP = tl.where(in_tail[None, :], _repeat_to(_sum_lanes(acc_RCL), P), z_RP)
    if HAS_BIAS:
        z_RP += tl.load(bias_ptr + p_P, mask=p_P < K, other=0.0).to(tl.float32)[None, :]
    return tl.where((p_P < K)[None, :], tl.div_rn(z_RP, temperature), float("-inf"))


@triton.jit
def softmax(z_RP):
    """Probabilities and their logarithms; 0 and 0 where the logit is minus infinity, as it is in the padding."""
    shifted_RP = z_RP - tl.reduce(z_RP, 1, larger)[:, None]
    e_RP = tl.exp(shifted_RP)
    total_R = pairwise_sum(e_RP)
    log_probs_RP = tl.where(z_RP == float("-inf"), 0.0, shifted_RP - tl.log(total_R)[:, None])
    return tl.div_rn(e_RP, total_R[:, None]), log_probs_RP


@triton.jit
def store_head(z_RP, values_ptr, probs_ptr, stats_ptr, logits_ptr, rows_R, num_rows, K: tl.constexpr):
    """Softmax, expectation, variance and entropy of a tile of logits, stored."""
    p_P = tl.arange(0, z_RP.shape[1])
    probs_RP, log_probs_RP = softmax(z_RP)
    values_P = tl.load(values_ptr + p_P, mask=p_P < K, other=0.0).to(tl.float32)
    mean_R = pairwise_sum(probs_RP * values_P[None, :])
    # About the mean, not as a difference of moments: that cancels to nothing for a confident head.
    gap_RP = values_P[None, :] - mean_R[:, None]
    var_R = pairwise_sum(probs_RP * gap_RP * gap_RP)
    entropy_R = pairwise_sum(-probs_RP * log_probs_RP)
    in_batch = rows_R < num_rows
    at_RP = rows_R[:, None] * K + p_P[None, :]
    mask_RP = in_batch[:, None] & (p_P < K)[None, :]
    tl.store(probs_ptr + at_RP, probs_RP, mask=mask_RP)
    tl.store(logits_ptr + at_RP, z_RP, mask=mask_RP)
    tl.store(stats_ptr + rows_R, mean_R, mask=in_batch)
    tl.store(stats_ptr + num_rows.to(tl.int64) + rows_R, var_R, mask=in_batch)
    tl.store(stats_ptr + 2 * num_rows.to(tl.int64) + rows_R, entropy_R, mask=in_batch)


@triton.jit(do_not_specialize=["num_rows", "hidden_stride"], do_not_specialize_on_alignment=["bias_ptr", "values_ptr"])
def head_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    values_ptr,
    probs_ptr,
    stats_ptr,
    logits_ptr,
    num_rows,
    hidden_stride,
    temperature,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Hidden states → distribution, mean, variance, entropy: every byte of hidden is read once (K ≤ 16)."""
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    z_RP = _logits(
        hidden_ptr, weight_ptr, bias_ptr, rows_R, num_rows, hidden_stride, temperature,
        H, K, P, MAIN, TAIL, GROUPS, ROWS, LANES, UNIT, HAS_BIAS,
    )  # fmt: skip
    store_head(z_RP, values_ptr, probs_ptr, stats_ptr, logits_ptr, rows_R, num_rows, K)


@triton.jit(do_not_specialize=["num_rows", "hidden_stride"], do_not_specialize_on_alignment=["bias_ptr", "target_ptr"])
def kl_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    loss_ptr,
    grad_ptr,
    num_rows,
    hidden_stride,
    temperature,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """KL(target ‖ q) of each row and, in the same pass, its gradient with respect to hidden·weight + bias."""
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    z_RP = _logits(
        hidden_ptr, weight_ptr, bias_ptr, rows_R, num_rows, hidden_stride, temperature,
        H, K, P, MAIN, TAIL, GROUPS, ROWS, LANES, UNIT, HAS_BIAS,
    )  # fmt: skip
    probs_RP, log_probs_RP = softmax(z_RP)
    p_P = tl.arange(0, P)
    at_RP = rows_R[:, None] * K + p_P[None, :]
    mask_RP = (rows_R < num_rows)[:, None] & (p_P < K)[None, :]
    target_RP = tl.load(target_ptr + at_RP, mask=mask_RP, other=0.0).to(tl.float32)
    # 0·log 0 is 0: a class without target costs nothing; one with, where the bias forbids it, costs infinity.
    log_target_RP = tl.log(tl.where(target_RP == 0.0, 1.0, target_RP))
    log_probs_RP = tl.where((z_RP == float("-inf")) & (target_RP > 0.0), float("-inf"), log_probs_RP)
    loss_RP = target_RP * (log_target_RP - log_probs_RP)
    mass_R = pairwise_sum(target_RP)
    grad_RP = tl.div_rn(probs_RP * mass_R[:, None] - target_RP, temperature)
    tl.store(loss_ptr + rows_R, pairwise_sum(loss_RP), mask=rows_R < num_rows)
    tl.store(grad_ptr + at_RP, grad_RP, mask=mask_RP)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["values_ptr"])
def score_gradient_kernel(
    logits_ptr,
    values_ptr,
    grad_probs_ptr,
    grad_stats_ptr,
    grad_logits_ptr,
    out_ptr,
    num_rows,
    temperature,
    K: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
):
    """Gradients of all outputs → gradient before the temperature: one softmax backward for all (kernels/README.md)."""
    rows_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows_R < num_rows
    p_P = tl.arange(0, P)
    at_RP = rows_R[:, None] * K + p_P[None, :]
    mask_RP = in_batch[:, None] & (p_P < K)[None, :]
    grad_RP = tl.full((ROWS, P), 0.0, tl.float32)
    if HAS_PROBS or HAS_STATS:
        z_RP = tl.load(logits_ptr + at_RP, mask=mask_RP, other=0.0)
        probs_RP, log_probs_RP = softmax(tl.where((p_P < K)[None, :], z_RP, float("-inf")))
        pull_RP = tl.full((ROWS, P), 0.0, tl.float32)
        if HAS_PROBS:
            pull_RP += tl.load(grad_probs_ptr + at_RP, mask=mask_RP, other=0.0)
        if HAS_STATS:
            values_P = tl.load(values_ptr + p_P, mask=p_P < K, other=0.0).to(tl.float32)
            gap_RP = values_P[None, :] - pairwise_sum(probs_RP * values_P[None, :])[:, None]
            stat_ptrs = grad_stats_ptr + rows_R
            grad_mean_R = tl.load(stat_ptrs, mask=in_batch, other=0.0)
            grad_var_R = tl.load(stat_ptrs + num_rows.to(tl.int64), mask=in_batch, other=0.0)
            grad_entropy_R = tl.load(stat_ptrs + 2 * num_rows.to(tl.int64), mask=in_batch, other=0.0)
            pull_RP += (grad_mean_R[:, None] + grad_var_R[:, None] * gap_RP) * gap_RP
            pull_RP -= grad_entropy_R[:, None] * log_probs_RP
        grad_RP = probs_RP * (pull_RP - pairwise_sum(probs_RP * pull_RP)[:, None])
    if HAS_LOGITS:
        grad_RP += tl.load(grad_logits_ptr + at_RP, mask=mask_RP, other=0.0)
    tl.store(out_ptr + at_RP, tl.div_rn(grad_RP, temperature), mask=mask_RP)


@triton.jit(do_not_specialize=["num_rows"])
def hidden_gradient_kernel(
    grad_ptr, weight_ptr, out_ptr, num_rows, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Gradient of hidden: a chain of K multiply-adds for each element, in class order."""
    # Tiles of one row or column, not vectors: the compiler then keeps the layout of the wide loads all the way through.
    rows_R1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    h_1N = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    acc_RN = tl.full((ROWS, COLS), 0.0, tl.float32)
    for k in range(K):
        grad_R1 = tl.load(grad_ptr + rows_R1 * K + k, mask=rows_R1 < num_rows, other=0.0)
        w_1N = tl.load(weight_ptr + k * H + h_1N, mask=h_1N < H, other=0.0).to(tl.float32)
        acc_RN = tl.fma(grad_R1, w_1N, acc_RN)
    mask_RN = (rows_R1 < num_rows) & (h_1N < H)
    tl.store(out_ptr + rows_R1 * H + h_1N, acc_RN.to(out_ptr.dtype.element_ty), mask=mask_RN)


@triton.jit(do_not_specialize=["num_rows", "hidden_stride", "rows_per_split"])
def weight_partial_kernel(
    grad_ptr,
    hidden_ptr,
    partial_ptr,
    num_rows,
    hidden_stride,
    rows_per_split,
    H: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    COLS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """First stage of the gradient of weight: each program sums its own run of rows, one row after the other.

    The second stage adds the runs in order. No atomics: the same batch gives the same bits every time.
    """
    split = tl.program_id(0).to(tl.int64)
    h_1N = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    first = tl.program_id(2) * (MAIN + TAIL)
    main_A1 = first + tl.arange(0, MAIN)[:, None]
    acc_AN = tl.full((MAIN, COLS), 0.0, tl.float32)
    if TAIL > 0:
        tail_C1 = first + MAIN + tl.arange(0, TAIL)[:, None]
        acc_CN = tl.full((TAIL, COLS), 0.0, tl.float32)
    stride = hidden_stride.to(tl.int64) * UNIT
    for step in tl.range(0, rows_per_split, loop_unroll_factor=4):
        row_11 = tl.full((1, 1), 0, tl.int64) + split * rows_per_split + step
        in_batch = row_11 < num_rows
        x_1N = tl.load(hidden_ptr + row_11 * stride + h_1N, mask=in_batch & (h_1N < H), other=0.0).to(tl.float32)
        grad_A1 = tl.load(grad_ptr + row_11 * K + main_A1, mask=in_batch & (main_A1 < K), other=0.0)
        acc_AN = tl.fma(grad_A1, x_1N, acc_AN)
        if TAIL > 0:
            grad_C1 = tl.load(grad_ptr + row_11 * K + tail_C1, mask=in_batch & (tail_C1 < K), other=0.0)
            acc_CN = tl.fma(grad_C1, x_1N, acc_CN)
    out_ptrs = partial_ptr + split * (K * H) + h_1N
    tl.store(out_ptrs + main_A1 * H, acc_AN, mask=(main_A1 < K) & (h_1N < H))
    if TAIL > 0:
        tl.store(out_ptrs + tail_C1 * H, acc_CN, mask=(tail_C1 < K) & (h_1N < H))


@triton.jit(do_not_specialize=["num_splits"])
def weight_gather_kernel(partial_ptr, out_ptr, num_splits, SIZE: tl.constexpr, COLS: tl.constexpr):
    """Second stage of the gradient of weight: adds the partial sums in the order of their rows."""
    n_N = tl.program_id(0) * COLS + tl.arange(0, COLS)
    acc_N = tl.full((COLS,), 0.0, tl.float32)
    partial_ptrs = partial_ptr + n_N
    for _ in tl.range(0, num_splits, loop_unroll_factor=4):
        acc_N += tl.load(partial_ptrs, mask=n_N < SIZE, other=0.0)
        partial_ptrs += SIZE
    tl.store(out_ptr + n_N, acc_N.to(out_ptr.dtype.element_ty), mask=n_N < SIZE)
