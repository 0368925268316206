"""What the kernels may be handed and must write: strides, views, poison beyond the edges, addresses past 2^31."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.oracle import Case, check, check_head, check_kl, exact, head
from zscore_kernels import launch, score_head, score_head_kl

pytest.importorskip("triton")

run = partial(score_head, backend="triton")


def views(hidden_BH):
    """The same rows under other strides."""
    rows, width = hidden_BH.shape
    wide = torch.full((rows, width + 7), torch.nan)
    wide[:, 5:-2] = hidden_BH
    spread = torch.full((2 * rows, width), torch.nan)
    spread[::2] = hidden_BH
    thin = torch.full((rows, 2 * width), torch.nan)
    thin[:, ::2] = hidden_BH
    return {
        "unaligned columns of a wider tensor": wide[:, 5:-2],
        "every other row": spread[::2],
        "every other column": thin[:, ::2],
        "transposed": hidden_BH.T.contiguous().T,
    }


@pytest.mark.parametrize("width", [40, 37])
def test_strides(width):
    case = Case(rows=2, width=width, classes=3)
    plain, *rest = case.tensors()
    exacts = [exact(tensor) for tensor in (plain, *rest)]
    wanted = head(*exacts, 1.3)
    for name, view in views(plain.detach()).items():
        view.requires_grad_()
        check(run(view, *rest, 1.3), wanted, (view, rest[0], rest[2]), (exacts[0], exacts[1], exacts[3]))
        assert view.requires_grad, name
        wanted = head(*exacts, 1.3)


def test_one_row_for_all():
    case = Case(rows=1, width=40)
    hidden_BH, *rest = case.tensors(grad=False)
    outputs = run(hidden_BH.expand(5, 40), *rest)
    for output, single in zip(outputs, run(hidden_BH, *rest), strict=True):
        assert torch.equal(output, single.expand(output.shape))


def test_strided_weight_bias_values_and_target():
    case = Case(rows=2, width=30, classes=5)
    hidden_BH, weight_KH, values_K, bias_K = case.tensors()
    weight_KH = torch.stack((weight_KH.detach(), torch.full_like(weight_KH, torch.nan)), -1)[..., 0].requires_grad_()
    bias_K = torch.stack((bias_K.detach(), torch.full_like(bias_K, torch.nan)), -1)[..., 0].requires_grad_()
    values_K = torch.stack((values_K, values_K * torch.nan), -1)[:, 0]
    exacts = [exact(tensor) for tensor in (hidden_BH, weight_KH, values_K, bias_K)]
    check(
        run(hidden_BH, weight_KH, values_K, bias_K), head(*exacts, 1.0),
        (hidden_BH, weight_KH, bias_K), (exacts[0], exacts[1], exacts[3]),
    )  # fmt: skip
    target_BK = case.target()
    loss = score_head_kl(hidden_BH, weight_KH, target_BK, backend="triton")
    assert torch.equal(loss, score_head_kl(hidden_BH, weight_KH, target_BK.T.contiguous().T, backend="triton"))


@pytest.mark.parametrize(("small_batch", "rows", "width", "classes"), [(0, 3, 48, 9), (256, 2, 33, 17)])
def test_everything_is_written_and_nothing_else_read(monkeypatch, small_batch, rows, width, classes):
    """Outputs start as NaN, and NaN follows every row, column and class of the input."""
    fresh = torch.Tensor.new_empty

    def poisoned(self, *arguments, **options):
        made = fresh(self, *arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)

    def in_poison(tensor):
        shape = [size + 16 for size in tensor.shape]
        wide = torch.full(shape, torch.nan)
        view = wide[tuple(slice(0, size) for size in tensor.shape)]
        view.copy_(tensor.detach())
        return view.requires_grad_(tensor.requires_grad)

    monkeypatch.setattr(launch, "SMALL_BATCH", small_batch)
    case = Case(rows=rows, width=width, classes=classes)
    tensors = case.tensors()
    inputs = [in_poison(tensor) for tensor in tensors]
    exacts = [exact(tensor) for tensor in tensors]
    check(run(*inputs, 1.3), head(*exacts, 1.3), (inputs[0], inputs[1], inputs[3]), (exacts[0], exacts[1], exacts[3]))
    check_kl(case, partial(score_head_kl, backend="triton", reduction="none"))


def test_integer_and_double_values():
    hidden_BH, weight_KH, _, _ = Case(classes=5).tensors(grad=False)
    wanted = run(hidden_BH, weight_KH, torch.arange(1.0, 6.0)).mean_B
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        assert torch.equal(run(hidden_BH, weight_KH, torch.arange(1, 6).to(dtype)).mean_B, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, inside the interpreter
def test_a_nan_stays_in_its_row():
    hidden_BH, *rest = Case(rows=4, width=30).tensors(grad=False)
    clean = run(hidden_BH, *rest)
    hidden_BH[2, 7] = torch.nan
    dirty = run(hidden_BH, *rest)
    for before, after in zip(clean, dirty, strict=True):
        assert after[2].isnan().all()
        assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


def test_row_addresses_are_64_bit():
    """A row stride of 2^30 elements: the third row starts past 2^31. Only the pages touched take memory."""
    try:
        storage = torch.empty(2 * 2**30 + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space isn't to be had")
    hidden_BH = storage.as_strided((3, 8), (2**30, 1))
    hidden_BH.copy_(Case(rows=3, width=8).tensors(grad=False)[0])
    _, *rest = Case(rows=3, width=8).tensors(grad=False)
    for output, wanted in zip(run(hidden_BH, *rest), run(hidden_BH.clone(), *rest), strict=True):
        assert torch.equal(output, wanted)


def test_weight_gradient_over_several_runs_of_rows(monkeypatch):
    monkeypatch.setattr(launch, "MIN_ROWS_PER_SPLIT", 1)
    monkeypatch.setattr(launch, "MAX_SPLITS", 4)
    check_head(Case(rows=9, width=20, classes=3), run)
