"""The cases and checks of tests/kernels, the same ones, as compiled code."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import shared
from tests.kernels.oracle import Case, LogitsCase
from tests.kernels.shared import GPU

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [*shared.HEADS, *shared.TALL], ids=str)
def test_head(case):
    shared.right_head(GPU, case)


@pytest.mark.parametrize("case", shared.LOSSES, ids=str)
def test_kl(case):
    shared.right_kl(GPU, case)


@pytest.mark.parametrize("case", shared.LOGITS, ids=str)
def test_from_logits(case):
    shared.right_logits(GPU, case)


@pytest.mark.parametrize("logits", shared.EXTREME_HEADS)
def test_extreme_logits(logits):
    shared.extreme_head(GPU, logits)


@pytest.mark.parametrize("target", shared.EXTREME_TARGETS)
def test_extreme_logits_and_one_hot_targets(target):
    shared.extreme_kl(GPU, target)


def test_a_forbidden_class():
    shared.forbidden_class(GPU)


@pytest.mark.parametrize("scale", shared.EXTREME_LOGITS)
def test_extreme_logits_and_masked_tokens(scale):
    shared.extreme_logits(GPU, scale)


@pytest.mark.parametrize("check", [shared.no_mass, shared.no_logits])
def test_forbidden_rows(check):
    check(GPU)


def test_empty_batches():
    """They launch nothing; the last call does, so that this test proves its path as all others do."""
    shared.empty_head(GPU)
    for reduction in ("mean", "sum", "none"):
        shared.empty_kl(GPU, reduction)
    for mass in (False, True):
        shared.empty_logits(GPU, mass=mass)
    shared.right_head(GPU, Case())


@pytest.mark.parametrize("name", shared.VIEWS)
@pytest.mark.parametrize("width", [40, 37])
def test_strides(width, name):
    def place(tensor):
        return shared.view_of(tensor, name) if tensor.dim() == 2 else tensor

    shared.right_head(GPU, Case(rows=2, width=width, classes=3), place)
    shared.right_kl(GPU, Case(rows=2, width=width, classes=3), place)
    for mass in (False, True):
        shared.right_logits(GPU, LogitsCase(2, width, mass=mass), place)


def test_every_argument_spread():
    shared.right_head(GPU, Case(rows=2, width=30, classes=5), shared.spread)
    shared.right_kl(GPU, Case(rows=2, width=30, classes=5), shared.spread)
    for mass in (False, True):
        shared.right_logits(GPU, LogitsCase(2, 30, mass=mass), shared.spread)


@pytest.mark.parametrize(("small_batch", "rows", "width", "classes"), [*shared.POISONED, (256, 300, 4097, 9)])
def test_everything_is_written_and_nothing_else_read(monkeypatch, small_batch, rows, width, classes):
    shared.poisoned_operations(GPU, monkeypatch, small_batch, rows, width, classes)


def test_an_unknown_id_gives_nan():
    """On a GPU it can't be refused without waiting for it."""
    ids_K = torch.tensor([1, 10, 2], device="cuda")
    head = GPU.from_logits(torch.zeros(2, 10, device="cuda"), ids_K, torch.arange(3.0, device="cuda"))
    assert head.probs_BK.isnan().all()
