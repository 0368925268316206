"""Addresses past 2^31 elements, of every kernel, in next to no memory.

Storage is mapped without being reserved, so that only the pages touched take memory and all others read as 0. Inputs
have rows (or columns) far apart; outputs, which are always dense, have so many rows that the last one starts past 2^31,
and of the grid only the last programs run.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from tests.kernels.oracle import Case, LogitsCase
from zscore_kernels import checks, launch, score_from_logits, score_head, score_head_kl

pytest.importorskip("triton")

STRIDES = pytest.mark.parametrize("stride", [2**30, 2**31 + 64])
"""Of which a multiple is beyond int32, and one that is beyond it by itself."""
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has its name from Python 3.13 on


def sparse(shape, dtype=torch.float32):
    """A dense tensor of zeros that takes address space only."""
    elements = int(torch.Size(shape).numel())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        pages = mmap.mmap(-1, elements * dtype.itemsize + 4096, flags=flags)
    except OSError:
        pytest.skip(f"{elements * dtype.itemsize / 2**30:.0f} GiB of address space aren't to be had")
    return torch.frombuffer(pages, dtype=dtype, count=elements).view(shape)


def far_rows(matrix, stride):
    """The same rows, so many elements apart."""
    rows, width = matrix.shape
    far = sparse(((rows - 1) * stride + width,), matrix.dtype).as_strided((rows, width), (stride, 1))
    return far.copy_(matrix.detach()).requires_grad_(matrix.requires_grad)


def far_columns(matrix, stride):
    return far_rows(matrix.detach().T, stride).T.requires_grad_(matrix.requires_grad)


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def with_gradients(outputs, *leaves):
    outputs = [output for output in outputs if output.requires_grad]
    return (*outputs, *torch.autograd.grad([output.sum() for output in outputs], leaves))


@pytest.fixture
def sparse_outputs(monkeypatch):
    """What is allocated past 2^28 elements takes address space only, and is zero already."""
    dense, zero = torch.Tensor.new_empty, torch.Tensor.zero_

    def new_empty(self, size, **options):
        far = size and torch.Size(size).numel() > 2**28
        return sparse(size, options.get("dtype", self.dtype)) if far else dense(self, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: new_empty(like, like.shape))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self if self.numel() > 2**28 else zero(self))


def shift_programs(monkeypatch, shifts):
    """Makes the programs of a small grid take themselves for later ones, so many further along each axis."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    program_id = InterpreterBuilder.create_get_program_id

    def shifted(self, axis):
        found = program_id(self, axis)
        return TensorHandle(found.data + shifts.get(axis, 0), found.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", shifted)


@pytest.fixture
def last_rows_only(monkeypatch, sparse_outputs):
    """Runs the last programs of a grid's first axis and no others; returns each kernel's arguments by its name."""
    run = launch._launch
    launched = {}

    def last(name, grid, *arguments, **options):
        launched[name] = arguments
        if name == "weight_gather_kernel":
            return  # its first axis is columns; rows are a loop over a pointer
        with monkeypatch.context() as patch:
            shift_programs(patch, {0: grid[0] - 1})
            run(name, (1, *grid[1:]), *arguments, **options)

    monkeypatch.setattr(launch, "_launch", last)
    return launched


# Inputs: rows and columns far apart.


@STRIDES
def test_rows_of_hidden(stride):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=3, width=8).tensors()
    far_BH = far_rows(hidden_BH, stride)
    wanted = with_gradients(score_head(hidden_BH, weight_KH, values_K, bias_K, backend="triton"), weight_KH)
    same(with_gradients(score_head(far_BH, weight_KH, values_K, bias_K, backend="triton"), weight_KH), wanted)


@STRIDES
def test_rows_of_hidden_in_the_loss(stride):
    hidden_BH, weight_KH, _, bias_K = Case(rows=3, width=8).tensors()
    far_BH, target_BK = far_rows(hidden_BH, stride), Case(rows=3).target()

    def run(hidden_BH):
        loss_B = score_head_kl(hidden_BH, weight_KH, target_BK, bias_K, reduction="none", backend="triton")
        return with_gradients((loss_B,), hidden_BH, weight_KH, bias_K)

    same(run(far_BH), run(hidden_BH))


@STRIDES
@pytest.mark.parametrize("far", [far_rows, far_columns])
def test_rows_and_columns_of_logits(far, stride):
    logits_BV, ids_K, values_K = LogitsCase(3, 4, classes=3).tensors()
    wanted = score_from_logits(logits_BV, ids_K, values_K, backend="triton")
    same(score_from_logits(far(logits_BV, stride), ids_K, values_K, backend="triton"), wanted)


@STRIDES
def test_rows_of_logits_with_the_mass(stride):
    logits_BV, ids_K, values_K = LogitsCase(3, 8, classes=3).tensors()

    def run(logits_BV):
        head = score_from_logits(logits_BV, ids_K, values_K, with_mass=True, backend="triton")
        return with_gradients(head, logits_BV)

    same(run(far_rows(logits_BV, stride)), run(logits_BV))


# Outputs: so many rows that the last one lies past 2^31 elements, of the three statistics as of two classes.

ROWS = 2**30 + 3


def last_row(head):
    return [output[-1:] for output in head]


def far_down(row_1N, dtype=torch.float32):
    """ROWS rows of zeros, but for the last one."""
    rows_BN = sparse((ROWS, row_1N.shape[1]), dtype)
    rows_BN[-1] = row_1N[0]
    return rows_BN


def test_outputs_of_the_head(last_rows_only):
    hidden_BH, weight_KH, values_K, _ = Case(rows=1, width=4, classes=2).tensors(grad=False)
    found = score_head(hidden_BH.expand(ROWS, 4), weight_KH, values_K, backend="triton")
    same(last_row(found), score_head(hidden_BH, weight_KH, values_K, backend="triton"))


def test_outputs_of_the_loss(last_rows_only):
    hidden_BH, weight_KH, _, _ = Case(rows=1, width=4, classes=2).tensors(grad=False)
    target_BK = torch.tensor([[0.25, 0.75]])
    found = launch.kl_forward(hidden_BH.expand(ROWS, 4), weight_KH, far_down(target_BK), None, 1.3)
    same(last_row(found), launch.kl_forward(hidden_BH, weight_KH, target_BK, None, 1.3))


def test_score_gradient(last_rows_only):
    values_K, generator = torch.tensor([1.0, 3.0]), torch.Generator().manual_seed(0)
    logits_BK, probs_BK, upstream_BK = (torch.randn((1, 2), generator=generator) for _ in range(3))
    stats_31 = torch.randn((3, 1), generator=generator)
    far_3B = sparse((3, ROWS))
    far_3B[:, -1:] = stats_31
    grads = (far_down(probs_BK), far_3B, far_down(upstream_BK))
    found = launch.score_gradient(far_down(logits_BK), values_K, grads, 1.3)
    same(last_row([found]), [launch.score_gradient(logits_BK, values_K, (probs_BK, stats_31, upstream_BK), 1.3)])


def test_hidden_gradient(last_rows_only):
    weight_KH = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    found_BH = launch.hidden_gradient(far_down(torch.tensor([[7.0, 11.0]])), weight_KH, torch.bfloat16)
    assert found_BH[-1].tolist() == [40.0, 69.0]


@pytest.mark.parametrize("first", [0, checks.MAX_WIDTH - 512])
def test_hidden_gradient_of_the_widest_weight(sparse_outputs, monkeypatch, first):
    """The first and the last columns of the last class: the largest address that the checks let through."""
    weight_KH = sparse((checks.MAX_CLASSES, checks.MAX_WIDTH), torch.bfloat16)
    weight_KH[-1, first : first + 512] = 3.0
    run = launch._launch
    monkeypatch.setattr(launch, "_launch", lambda name, grid, *rest, **more: run(name, (1, 1), *rest, **more))
    shift_programs(monkeypatch, {1: first // 512})
    grad_BK = torch.zeros(1, checks.MAX_CLASSES)
    grad_BK[0, -1] = 5.0
    found_BH = launch.hidden_gradient(grad_BK, weight_KH, torch.float32)
    assert found_BH[0, first : first + 512].tolist() == [15.0] * 512


def test_weight_gradient(last_rows_only, monkeypatch):
    """The gradients of the logits and the partial sums."""
    monkeypatch.setattr(launch, "MAX_SPLITS", 2**27)
    monkeypatch.setattr(launch, "MIN_ROWS_PER_SPLIT", 1)
    launch.weight_gradient(far_down(torch.tensor([[7.0, 11.0]])), torch.ones(1, 32).expand(ROWS, 32), torch.float32)
    partial_SKH = last_rows_only["weight_partial_kernel"][2]
    assert partial_SKH.numel() > 2**31
    assert partial_SKH[-1].tolist() == [[7.0] * 32, [11.0] * 32]


@pytest.mark.parametrize("mass", [False, True])
def test_outputs_of_the_vocabulary(last_rows_only, mass):
    logits_BV, ids_K, values_K = LogitsCase(1, 4, classes=2, dtype=torch.bfloat16).tensors()
    arguments = (ids_K, values_K, 1.3)
    wanted = score_from_logits(logits_BV.detach(), *arguments, with_mass=mass, backend="triton")
    far_BV = far_down(logits_BV.detach(), torch.bfloat16)
    same(last_row(score_from_logits(far_BV, *arguments, with_mass=mass, backend="triton")), wanted)


@pytest.mark.parametrize("mass", [False, True])
def test_gradient_of_the_vocabulary(last_rows_only, mass):
    logits_BV, ids_K, _ = LogitsCase(1, 4, classes=2, dtype=torch.bfloat16).tensors()
    logits_BV, grad_BK = logits_BV.detach(), torch.tensor([[0.5, -2.0]])
    row_max, row_log = logits_BV.float().max(), (logits_BV.float() - logits_BV.float().max()).exp().sum().log()
    mass_31 = torch.stack((torch.zeros(()), row_max, row_log))[:, None]
    far_3B, far_B = sparse((3, ROWS)), sparse((ROWS,))
    far_3B[:, -1:], far_B[-1] = mass_31, 0.7
    wanted = launch.from_logits_gradient(logits_BV, ids_K, grad_BK, mass_31, torch.tensor([0.7]) if mass else None)
    far_BV = far_down(logits_BV, torch.bfloat16)
    found = launch.from_logits_gradient(far_BV, ids_K, far_down(grad_BK), far_3B, far_B if mass else None)
    assert wanted.any()
    same(last_row([found]), [wanted])
