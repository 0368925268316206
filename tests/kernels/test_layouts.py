"""What the kernels may be handed and must write: strides, views, poison beyond the edges, addresses past 2^31."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels import shared
from tests.kernels.oracle import Case, LogitsCase, check_head
from zscore_kernels import launch, score_head

pytest.importorskip("triton")

run = partial(score_head, backend="triton")
WHERE = (shared.KERNELS, shared.REFERENCE)


@pytest.mark.parametrize("name", shared.VIEWS)
@pytest.mark.parametrize("width", [40, 37])
@pytest.mark.parametrize("where", WHERE)
def test_strides(where, width, name):
    def place(tensor):
        return shared.view_of(tensor, name) if tensor.dim() == 2 else tensor

    shared.right_head(where, Case(rows=2, width=width, classes=3), place)
    shared.right_kl(where, Case(rows=2, width=width, classes=3), place)
    for mass in (False, True):
        shared.right_logits(where, LogitsCase(2, width, mass=mass), place)


@pytest.mark.parametrize("where", WHERE)
def test_every_argument_spread(where):
    """Weight, bias, values, target and ids too, with NaN between each two numbers."""
    shared.right_head(where, Case(rows=2, width=30, classes=5), shared.spread)
    shared.right_kl(where, Case(rows=2, width=30, classes=5), shared.spread)
    for mass in (False, True):
        shared.right_logits(where, LogitsCase(2, 30, mass=mass), shared.spread)


def test_one_row_for_all():
    case = Case(rows=1, width=40)
    hidden_BH, *rest = case.tensors(grad=False)
    outputs = run(hidden_BH.expand(5, 40), *rest)
    for output, single in zip(outputs, run(hidden_BH, *rest), strict=True):
        assert torch.equal(output, single.expand(output.shape))


def test_a_row_that_stands_for_all_vocabularies():
    row_1V, ids_K, values_K = LogitsCase(1, 40).tensors()
    run = partial(shared.KERNELS.from_logits, with_mass=True)
    outputs = run(row_1V.detach().expand(5, 40), ids_K, values_K)
    for output, single in zip(outputs, run(row_1V, ids_K, values_K), strict=True):
        assert torch.equal(output, single.expand(output.shape))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("small_batch", "rows", "width", "classes"), shared.POISONED)
def test_everything_is_written_and_nothing_else_read(where, monkeypatch, small_batch, rows, width, classes):
    shared.poisoned_operations(where, monkeypatch, small_batch, rows, width, classes)


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


def test_weight_gradient_over_several_runs_of_rows(monkeypatch):
    monkeypatch.setattr(launch, "MIN_ROWS_PER_SPLIT", 1)
    monkeypatch.setattr(launch, "MAX_SPLITS", 4)
    check_head(Case(rows=9, width=20, classes=3), run)
