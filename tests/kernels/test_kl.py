"""`score_head_kl`: the kernels in Triton's interpreter and the reference, both against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.oracle import Case, check_kl
from zscore_kernels import launch, reference, score_head, score_head_kl

pytest.importorskip("triton")

BACKENDS = ("triton", "reference")


def run(backend, reduction="none"):
    return partial(score_head_kl, backend=backend, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 9, 16, 33, 64])
def test_against_float64(backend, classes):
    check_kl(Case(rows=2, width=45, classes=classes), run(backend))


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 100), classes=st.integers(2, 20), temperature=st.floats(0.25, 4))
def test_any_shape(rows, width, classes, temperature):
    check_kl(Case(rows=rows, width=width, classes=classes, temperature=temperature), run("triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    check_kl(Case(dtype=dtype, weight_dtype=dtype, bias=False), run("triton"))


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [(1.0, 0.0, 0.0), (0.0, 0.5, 0.5)])
def test_extreme_logits_and_one_hot_targets(backend, target):
    hidden_BH = torch.ones(2, 1, requires_grad=True)
    weight_KH = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    target_BK = torch.tensor([target, target])
    loss = score_head_kl(hidden_BH, weight_KH, target_BK, reduction="none", backend=backend)
    log_q = torch.tensor([0.0, -2e4, -1e4])
    wanted = torch.xlogy(target_BK, target_BK).sum(1) - target_BK @ log_q
    torch.testing.assert_close(loss, wanted)
    (gradient,) = torch.autograd.grad(loss.sum(), weight_KH)
    torch.testing.assert_close(gradient.squeeze(1), 2 * (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(target)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forbidden_class_costs_nothing_unless_wanted(backend):
    hidden_BH, weight_KH = torch.ones(1, 1), torch.zeros(3, 1)
    bias_K = torch.tensor([0.0, 0.0, -torch.inf])
    free = score_head_kl(hidden_BH, weight_KH, torch.tensor([[0.5, 0.5, 0.0]]), bias_K, backend=backend)
    assert free.item() == pytest.approx(0.0, abs=1e-6)
    wanted = score_head_kl(hidden_BH, weight_KH, torch.tensor([[0.5, 0.0, 0.5]]), bias_K, backend=backend)
    assert wanted.item() == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_has_no_loss(backend, reduction):
    hidden_BH, weight_KH, _, bias_K = Case(rows=0).tensors()
    loss = score_head_kl(hidden_BH, weight_KH, torch.empty(0, 9), bias_K, reduction=reduction, backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum().item() == 0
    loss.sum().backward()
    assert not weight_KH.grad.any()
    assert not bias_K.grad.any()


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
