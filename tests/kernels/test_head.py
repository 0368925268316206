"""`score_head`: the kernels in Triton's interpreter and the reference, both against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import shared
from tests.kernels.oracle import Case, check_head
from zscore_kernels import launch, reference, score_head

pytest.importorskip("triton")

BACKENDS = ("triton", "reference")
WHERE = (shared.KERNELS, shared.REFERENCE)


def run(backend):
    return partial(score_head, backend=backend)


@pytest.fixture
def tall_tiles(monkeypatch):
    """Tiles of several rows, as large batches get them; one row a tile otherwise."""
    monkeypatch.setattr(launch, "SMALL_BATCH", 0)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", shared.HEADS, ids=str)
def test_against_float64(where, case):
    shared.right_head(where, case)


@pytest.mark.parametrize("case", shared.TALL, ids=str)
def test_tall_tiles(tall_tiles, case):
    shared.right_head(shared.KERNELS, case)


def test_reference_runs_in_float64_for_gradcheck():
    case = Case(rows=2, width=5, classes=3)
    hidden_BH, weight_KH, values_K, bias_K = (tensor.detach().double() for tensor in case.tensors())
    leaves = [tensor.requires_grad_() for tensor in (hidden_BH, weight_KH, bias_K)]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: tuple(reference.score_head(hidden, weight, values_K, bias, 0.7)), leaves
    )


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 150),
    classes=st.integers(2, 64),
    small_batch=st.sampled_from([0, 256]),
    bias=st.booleans(),
    temperature=st.floats(0.25, 4),
)
def test_any_shape(monkeypatch, rows, width, classes, small_batch, bias, temperature):
    monkeypatch.setattr(launch, "SMALL_BATCH", small_batch)
    check_head(Case(rows=rows, width=width, classes=classes, bias=bias, temperature=temperature), run("triton"))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("logits", shared.EXTREME_HEADS)
def test_extreme_logits(where, logits):
    shared.extreme_head(where, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_heads_keep_a_small_variance(backend):
    """A difference of moments would round 25·1e-7 away beside 25."""
    logits = torch.tensor([[0.0, -16.0]])
    head = score_head(torch.ones(1, 1), logits.T.contiguous(), torch.tensor([5.0, 6.0]), backend=backend)
    rare = torch.sigmoid(torch.tensor(-16.0, dtype=torch.float64)).item()
    assert head.var_B.item() == pytest.approx(rare * (1 - rare), rel=1e-5)
    assert head.entropy_B.item() == pytest.approx(-rare * torch.tensor(rare).log().item() + rare, rel=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_a_variance_has_a_square_root(backend, scale):
    """Every term is a probability times a square, in that rounding too: callers need no clamp."""
    hidden_BH, weight_KH, values_K, _ = Case(rows=8, width=16, scale=scale).tensors(grad=False)
    var_B = score_head(hidden_BH, weight_KH, values_K / 3, backend=backend).var_B
    assert (var_B >= 0).all()
    assert torch.isfinite(var_B.sqrt()).all()


@pytest.mark.parametrize("where", WHERE)
def test_empty_batch(where):
    shared.empty_head(where)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_row(backend):
    tensors = Case(rows=1).tensors(grad=False)
    shapes = [tuple(output.shape) for output in score_head(*tensors, backend=backend)]
    assert shapes == [(1, 9), (1,), (1,), (1,), (1, 9)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_outputs_is_differentiable(backend):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=2, width=10, classes=3).tensors()
    head = score_head(hidden_BH, weight_KH, values_K, bias_K, backend=backend)
    inputs = [hidden_BH, weight_KH, bias_K]
    for used in range(5):
        masked = sum(output.sum() * (index == used) for index, output in enumerate(head))
        for one, other in zip(
            torch.autograd.grad(head[used].sum(), inputs, retain_graph=True),
            torch.autograd.grad(masked, inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients_are_computed(backend):
    hidden_BH, weight_KH, values_K, bias_K = Case().tensors()
    head = score_head(hidden_BH.detach(), weight_KH, values_K, bias_K.detach(), backend=backend)
    head.mean_B.sum().backward()
    assert hidden_BH.grad is None
    assert weight_KH.grad is not None
