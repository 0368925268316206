"""What is tested twice: by tests/kernels in the interpreter and in plain torch, by tests/gpu as compiled code.

One list of cases and one set of checks, so that the GPU can't be tested for less than the CPU.

Shape suffixes: B rows, H hidden size, K score classes, V vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch

from tests.kernels.oracle import Case, LogitsCase, check_head, check_kl, check_logits
from zscore_kernels import backend_calls, score_from_logits, score_head, score_head_kl

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Where(NamedTuple):
    """A device and what to ask for there."""

    device: str
    backend: str

    def head(self, *arguments, **options):
        return score_head(*arguments, **options, backend=self.backend)

    def kl(self, *arguments, reduction="none", **options):
        return score_head_kl(*arguments, **options, reduction=reduction, backend=self.backend)

    def from_logits(self, *arguments, **options):
        return score_from_logits(*arguments, **options, backend=self.backend)

    def tensor(self, data, *, grad=False):
        return torch.tensor(data, device=self.device, requires_grad=grad)


KERNELS = Where("cpu", "triton")
REFERENCE = Where("cpu", "reference")
GPU = Where("cuda", "auto")
CUDA = partial(Case, device="cuda")

CLASSES = (2, 3, 5, 8, 9, 12, 16, 17, 33, 64)
HEADS = [
    *(Case(rows=1, width=33, classes=classes) for classes in CLASSES),
    *(Case(rows=1, width=width, classes=3) for width in (1, 4, 511, 1028)),
    *(
        Case(rows=1, width=20, classes=3, dtype=dtype, weight_dtype=weight_dtype, bias=False)
        for dtype, weight_dtype in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, BF16), (FP16, FP32))
    ),
]
TALL = [Case(rows=9, width=48, classes=classes) for classes in (2, 9, 31)]
LOSSES = [
    *(Case(rows=2, width=45, classes=classes) for classes in CLASSES),
    *(Case(dtype=dtype, weight_dtype=dtype, bias=False) for dtype in (BF16, FP16)),
]
LOGITS = [
    *(LogitsCase(*shape) for shape in ((3, 50, 9), (9, 203, 2), (1, 64, 64), (2, 4100, 5))),
    *(LogitsCase(2, 70, classes) for classes in CLASSES),
    *(LogitsCase(2, 60, 9, dtype=dtype, temperature=1.0) for dtype in (BF16, FP16)),
    LogitsCase(2, 12, ids=(3, 7, 3, 0, 7)),  # equal ids share their column's gradient
]
LOGITS += [replace(case, mass=True) for case in LOGITS]
EXTREME_HEADS = [(1e4, -1e4, 0.0), (-1e4, -1e4, -1e4), (1e4, 1e4, 1e4), (0.0, -90.0, -104.0)]
EXTREME_TARGETS = [(1.0, 0.0, 0.0), (0.0, 0.5, 0.5)]
EXTREME_LOGITS = [1e4, -1e4]
POISONED = [(0, 3, 48, 9), (256, 2, 33, 17)]
"""Rows up to which a tile is one row; rows, width and classes."""
VIEWS = ("unaligned columns of a wider tensor", "every other row", "every other column", "transposed")


@contextmanager
def uncounted():
    """Whatever runs inside, for comparison on a CPU, leaves no trace in `backend_calls`."""
    before = backend_calls.copy()
    try:
        yield
    finally:
        backend_calls.clear()
        backend_calls.update(before)


def same_bits(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def right_head(where, case, place=None):
    check_head(replace(case, device=where.device), where.head, place)


def right_kl(where, case, place=None):
    check_kl(replace(case, device=where.device), where.kl, place)


def right_logits(where, case, place=None):
    check_logits(replace(case, device=where.device), where.from_logits, place)


def extreme_head(where, logits):
    hidden_BH = torch.eye(3, device=where.device)[:2].requires_grad_()
    weight_KH = where.tensor(logits)[:, None].repeat(1, 3).requires_grad_()
    head = where.head(hidden_BH, weight_KH, where.tensor([1.0, 2.0, 3.0]))
    for name, output in head._asdict().items():
        assert torch.isfinite(output).all(), name
    wanted = torch.tensor(logits, dtype=torch.float64).softmax(0)
    torch.testing.assert_close(head.probs_BK[0].cpu().double(), wanted, rtol=1e-5, atol=1e-37)
    if logits[0] == 1e4 != logits[1]:
        assert head.entropy_B.tolist() == [0.0, 0.0]
        assert head.var_B.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad([output.sum() for output in head], [hidden_BH, weight_KH])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def extreme_kl(where, target):
    """Logits of ±10⁴ and one-hot targets: a loss of tens of thousands, and the gradient that belongs to it."""
    hidden_BH = torch.ones(2, 1, device=where.device, requires_grad=True)
    weight_KH = where.tensor([[1e4], [-1e4], [0.0]], grad=True)
    target_BK = where.tensor([target, target])
    loss_B = where.kl(hidden_BH, weight_KH, target_BK)
    wanted_B = torch.xlogy(target_BK, target_BK).sum(1) - target_BK @ where.tensor([0.0, -2e4, -1e4])
    torch.testing.assert_close(loss_B, wanted_B)
    (gradient,) = torch.autograd.grad(loss_B.sum(), weight_KH)
    wanted = 2 * (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(target))
    torch.testing.assert_close(gradient.squeeze(1).cpu(), wanted)


def forbidden_class(where):
    """A class that the bias forbids costs nothing unless the target wants it."""
    hidden_BH, weight_KH = torch.ones(1, 1, device=where.device), torch.zeros(3, 1, device=where.device)
    bias_K = where.tensor([0.0, 0.0, -torch.inf])
    free = where.kl(hidden_BH, weight_KH, where.tensor([[0.5, 0.5, 0.0]]), bias_K)
    assert free.item() == pytest.approx(0.0, abs=1e-6)
    assert where.kl(hidden_BH, weight_KH, where.tensor([[0.5, 0.0, 0.5]]), bias_K).item() == torch.inf


def extreme_logits(where, scale):
    """Logits of ±10⁴ beside tokens that a grammar forbids."""
    logits_BV = torch.full((2, 40), scale, device=where.device)
    logits_BV[:, 20:] = -torch.inf
    logits_BV[:, 3] = 0.0
    logits_BV.requires_grad_()
    head = where.from_logits(logits_BV, where.tensor([3, 4, 5]), where.tensor([0.0, 1.0, 2.0]), with_mass=True)
    assert all(torch.isfinite(output).all() for output in head)
    inside = torch.tensor([0.0, scale, scale]).double().logsumexp(0)
    outside = torch.tensor([0.0, *[scale] * 19]).double().logsumexp(0)
    log_mass_B = head.log_mass_B.cpu().double()
    torch.testing.assert_close(log_mass_B, (inside - outside).expand(2), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(sum(output.sum() for output in head), logits_BV)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 20:].any()


def no_mass(where):
    """A row whose K tokens are all forbidden has no scores, but a mass: none. The row beside it is untouched."""
    logits_BV = torch.randn((2, 40), generator=torch.Generator().manual_seed(0)).to(where.device)
    logits_BV[0, [3, 4, 5]] = -torch.inf
    ids_K, values_K = where.tensor([3, 4, 5]), where.tensor([0.0, 1.0, 2.0])
    head = where.from_logits(logits_BV.requires_grad_(), ids_K, values_K, with_mass=True)
    assert head.probs_BK[0].isnan().all()
    assert head.log_mass_B[0].item() == -torch.inf
    same_bits(
        [output[1:] for output in head], where.from_logits(logits_BV.detach()[1:], ids_K, values_K, with_mass=True)
    )
    (gradient_BV,) = torch.autograd.grad(head.log_mass_B.sum(), logits_BV)
    wanted_BV = -logits_BV.detach().softmax(1)
    wanted_BV[1, [3, 4, 5]] += logits_BV.detach()[1, [3, 4, 5]].softmax(0)
    torch.testing.assert_close(gradient_BV, wanted_BV, rtol=1e-5, atol=1e-6)


def no_logits(where):
    """A row that is forbidden altogether has neither scores nor a mass."""
    logits_BV = torch.full((1, 40), -torch.inf, device=where.device)
    head = where.from_logits(logits_BV, where.tensor([3, 4]), where.tensor([0.0, 1.0]), with_mass=True)
    assert head.probs_BK.isnan().all()
    assert head.log_mass_B.isnan().all()


def empty_head(where):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=0, device=where.device).tensors()
    head = where.head(hidden_BH, weight_KH, values_K, bias_K)
    assert [tuple(output.shape) for output in head] == [(0, 9), (0,), (0,), (0,), (0, 9)]
    gradients = torch.autograd.grad(sum(output.sum() for output in head), [hidden_BH, weight_KH, bias_K])
    assert [gradient.shape for gradient in gradients] == [hidden_BH.shape, weight_KH.shape, bias_K.shape]
    assert not gradients[1].any()
    assert not gradients[2].any()


def empty_kl(where, reduction):
    hidden_BH, weight_KH, _, bias_K = Case(rows=0, device=where.device).tensors()
    loss = where.kl(hidden_BH, weight_KH, torch.empty(0, 9, device=where.device), bias_K, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum().item() == 0
    loss.sum().backward()
    assert not weight_KH.grad.any()
    assert not bias_K.grad.any()


def empty_logits(where, *, mass):
    logits_BV = torch.empty(0, 30, device=where.device, requires_grad=True)
    head = where.from_logits(logits_BV, where.tensor([1, 2]), where.tensor([0.0, 1.0]), with_mass=mass)
    assert [output.shape[0] for output in head] == [0] * (6 if mass else 5)
    sum(output.sum() for output in head).backward()
    assert logits_BV.grad.shape == (0, 30)


def view_of(matrix, name):
    """The same rows under other strides; what lies between them is NaN."""
    rows, width = matrix.shape
    if name == "unaligned columns of a wider tensor":
        view = matrix.new_full((rows, width + 7), torch.nan)[:, 5:-2]
    elif name == "every other row":
        view = matrix.new_full((2 * rows, width), torch.nan)[::2]
    elif name == "every other column":
        view = matrix.new_full((rows, 2 * width), torch.nan)[:, ::2]
    else:
        view = matrix.new_full((width, rows), torch.nan).T
    return view.copy_(matrix.detach()).requires_grad_(matrix.requires_grad)


def spread(tensor):
    """The same numbers with NaN (or an impossible id) between each two of the last axis."""
    other = torch.full_like(tensor, 10**9 if tensor.dtype == torch.int64 else torch.nan)
    return torch.stack((tensor.detach(), other), -1)[..., 0].requires_grad_(tensor.requires_grad)


def in_poison(tensor):
    """The same numbers with NaN (or an impossible id) behind every row, every column and the end."""
    poison = torch.nan if tensor.is_floating_point() else 10**9
    view = tensor.new_full([size + 16 for size in tensor.shape], poison)[tuple(slice(0, size) for size in tensor.shape)]
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def poison_outputs(monkeypatch):
    """Makes all memory that is to be written start as NaN."""

    def poisoned(allocate):
        def call(*arguments, **options):
            made = allocate(*arguments, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned_operations(where, monkeypatch, small_batch, rows, width, classes):
    """All three operations, forward and backward, with and without the mass, on poison and into it."""
    monkeypatch.setattr("zscore_kernels.launch.SMALL_BATCH", small_batch)
    poison_outputs(monkeypatch)
    right_head(where, Case(rows=rows, width=width, classes=classes), in_poison)
    right_kl(where, Case(rows=rows, width=width, classes=classes), in_poison)
    for mass in (False, True):
        right_logits(where, LogitsCase(rows, width, classes, mass=mass), in_poison)
