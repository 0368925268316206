"""`score_head_kl`: the kernels in Triton's interpreter and the reference, both against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import shared
from tests.kernels.oracle import Case, check_kl
from zscore_kernels import launch, reference, score_head, score_head_kl

pytest.importorskip("triton")

BACKENDS = ("triton", "reference")
WHERE = (shared.KERNELS, shared.REFERENCE)


def run(backend, reduction="none"):
    return partial(score_head_kl, backend=backend, reduction=reduction)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", shared.LOSSES, ids=str)
def test_against_float64(where, case):
    shared.right_kl(where, case)


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 100), classes=st.integers(2, 64), temperature=st.floats(0.25, 4))
def test_any_shape(rows, width, classes, temperature):
    check_kl(Case(rows=rows, width=width, classes=classes, temperature=temperature), run("triton"))


def test_tall_tiles(monkeypatch):
    monkeypatch.setattr(launch, "SMALL_BATCH", 0)
    check_kl(Case(rows=9), run("triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(backend):
    hidden_BH, weight_KH, _, _ = Case(rows=4).tensors(grad=False)
    arguments = (hidden_BH, weight_KH, Case(rows=4).target())
    rows = run(backend)(*arguments)
    assert rows.shape == (4,)
    torch.testing.assert_close(run(backend, "sum")(*arguments), rows.sum())
    torch.testing.assert_close(run(backend, "mean")(*arguments), rows.mean())
    torch.testing.assert_close(score_head_kl(*arguments, backend=backend), rows.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_loss_and_no_gradient_at_the_target(backend):
    hidden_BH, weight_KH, values_K, bias_K = Case().tensors()
    target_BK = score_head(hidden_BH, weight_KH, values_K, bias_K, backend="reference").probs_BK.detach()
    loss = score_head_kl(hidden_BH, weight_KH, target_BK, bias_K, backend=backend)
    assert loss.abs() < 1e-6
    for gradient in torch.autograd.grad(loss, [hidden_BH, weight_KH, bias_K]):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("target", shared.EXTREME_TARGETS)
def test_extreme_logits_and_one_hot_targets(where, target):
    shared.extreme_kl(where, target)


@pytest.mark.parametrize("where", WHERE)
def test_a_forbidden_class_costs_nothing_unless_wanted(where):
    shared.forbidden_class(where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_has_no_loss(where, reduction):
    shared.empty_kl(where, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_mass_scales_loss_and_gradient(backend):
    """Two targets of mass 1 added give the sum of their gradients: what distillation over several teachers does."""
    hidden_BH, weight_KH, _, _ = Case().tensors()
    one_BK, other_BK = Case().target(), Case().target().roll(3, 1)

    def gradient(target_BK):
        loss = score_head_kl(hidden_BH, weight_KH, target_BK, reduction="sum", backend=backend)
        return torch.autograd.grad(loss, hidden_BH)[0]

    torch.testing.assert_close(gradient(one_BK + other_BK), gradient(one_BK) + gradient(other_BK))


def test_reference_gradcheck():
    hidden_BH, weight_KH, _, bias_K = (
        tensor.detach().double() for tensor in Case(rows=2, width=4, classes=3).tensors()
    )
    target_BK = Case(rows=2, classes=3).target()
    leaves = [tensor.requires_grad_() for tensor in (hidden_BH, weight_KH, bias_K)]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: reference.score_head_kl(hidden, weight, target_BK, bias, 0.7), leaves
    )
