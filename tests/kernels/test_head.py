"""`score_head`: the kernels in Triton's interpreter and the reference, both against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.oracle import Case, check_head
from zscore_kernels import launch, reference, score_head

pytest.importorskip("triton")

BACKENDS = ("triton", "reference")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def run(backend):
    return partial(score_head, backend=backend)


@pytest.fixture
def tall_tiles(monkeypatch):
    """Tiles of several rows, as large batches get them; one row a tile otherwise."""
    monkeypatch.setattr(launch, "SMALL_BATCH", 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 3, 5, 8, 9, 16, 33, 64])
def test_every_number_of_classes(backend, classes):
    check_head(Case(rows=1, width=33, classes=classes), run(backend))


@pytest.mark.parametrize("classes", [2, 9, 31])
def test_tall_tiles(tall_tiles, classes):
    check_head(Case(rows=9, width=48, classes=classes), run("triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 4, 511, 1028])
def test_odd_widths(backend, width):
    check_head(Case(rows=1, width=width, classes=3), run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, BF16), (FP16, FP32)]
)
def test_dtypes_mix(backend, dtype, weight_dtype):
    check_head(Case(rows=1, width=20, classes=3, dtype=dtype, weight_dtype=weight_dtype, bias=False), run(backend))


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
    classes=st.integers(2, 20),
    small_batch=st.sampled_from([0, 256]),
    bias=st.booleans(),
    temperature=st.floats(0.25, 4),
)
def test_any_shape(monkeypatch, rows, width, classes, small_batch, bias, temperature):
    monkeypatch.setattr(launch, "SMALL_BATCH", small_batch)
    check_head(Case(rows=rows, width=width, classes=classes, bias=bias, temperature=temperature), run("triton"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logits", [(1e4, -1e4, 0.0), (-1e4, -1e4, -1e4), (1e4, 1e4, 1e4), (0.0, -90.0, -104.0)])
def test_extreme_logits(backend, logits):
    hidden_BH = torch.eye(3)[:2].requires_grad_()
    weight_KH = torch.tensor(logits)[:, None].repeat(1, 3).requires_grad_()
    values_K = torch.tensor([1.0, 2.0, 3.0])
    head = score_head(hidden_BH, weight_KH, values_K, backend=backend)
    for name, output in head._asdict().items():
        assert torch.isfinite(output).all(), name
    wanted = torch.tensor(logits, dtype=torch.float64).softmax(0)
    torch.testing.assert_close(head.probs_BK[0].double(), wanted, rtol=1e-5, atol=1e-37)
    if logits[0] == 1e4 != logits[1]:
        assert head.entropy_B.tolist() == [0.0, 0.0]
        assert head.var_B.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad([output.sum() for output in head], [hidden_BH, weight_KH])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


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
    hidden_BH, weight_KH, values_K, _ = Case(rows=40, width=16, scale=scale).tensors(grad=False)
    var_B = score_head(hidden_BH, weight_KH, values_K / 3, backend=backend).var_B
    assert (var_B >= 0).all()
    assert torch.isfinite(var_B.sqrt()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_batches(backend, rows):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=rows).tensors()
    head = score_head(hidden_BH, weight_KH, values_K, bias_K, backend=backend)
    assert [tuple(output.shape) for output in head] == [(rows, 9), (rows,), (rows,), (rows,), (rows, 9)]
    gradients = torch.autograd.grad(sum(output.sum() for output in head), [hidden_BH, weight_KH, bias_K])
    assert [gradient.shape for gradient in gradients] == [hidden_BH.shape, weight_KH.shape, bias_K.shape]
    if rows == 0:
        assert not gradients[1].any()
        assert not gradients[2].any()


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
