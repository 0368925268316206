"""`score_from_logits`: the kernels in Triton's interpreter and the reference, both against float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.oracle import check_from_logits
from zscore_kernels import launch, reference, score_from_logits

pytest.importorskip("triton")

BACKENDS = ("triton", "reference")


def random_logits(rows, width, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(rows + 31 * width)
    return (torch.randn((rows, width), generator=generator) * scale).to(dtype).requires_grad_()


def random_ids(classes, width):
    return torch.randperm(width, generator=torch.Generator().manual_seed(classes))[:classes]


def run(backend, mass):
    return partial(score_from_logits, backend=backend, with_mass=mass)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize(("rows", "width", "classes"), [(3, 50, 9), (9, 203, 2), (1, 64, 64), (2, 4100, 5)])
def test_against_float64(backend, mass, rows, width, classes):
    check_from_logits(random_logits(rows, width), random_ids(classes, width), 1.3, run(backend, mass), mass=mass)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 4), width=st.integers(20, 300), classes=st.integers(2, 20), mass=st.booleans(),
    temperature=st.floats(0.25, 4),
)  # fmt: skip
def test_any_shape(rows, width, classes, mass, temperature):
    logits_BV, ids_K = random_logits(rows, width), random_ids(classes, width)
    check_from_logits(logits_BV, ids_K, temperature, run("triton", mass), mass=mass)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mass", [False, True])
def test_narrow_dtypes(dtype, mass):
    check_from_logits(random_logits(2, 60, dtype), random_ids(9, 60), 1.0, run("triton", mass), mass=mass)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [False, True])
def test_equal_ids_share_their_columns_gradient(backend, mass):
    check_from_logits(random_logits(2, 12), torch.tensor([3, 7, 3, 0, 7]), 1.3, run(backend, mass), mass=mass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_mass_used(backend):
    logits_BV = random_logits(2, 30)
    ids_K = random_ids(4, 30)
    log_mass_B = score_from_logits(logits_BV, ids_K, torch.arange(4.0), with_mass=True, backend=backend).log_mass_B
    (gradient_BV,) = torch.autograd.grad(log_mass_B.sum(), logits_BV)
    wanted_BV = -logits_BV.detach().softmax(1)
    wanted_BV[:, ids_K] += logits_BV.detach()[:, ids_K].softmax(1)
    torch.testing.assert_close(gradient_BV, wanted_BV, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_and_masked_tokens(backend, scale):
    logits_BV = torch.full((2, 40), scale)
    logits_BV[:, 20:] = -torch.inf  # tokens that a grammar forbids
    logits_BV[:, 3] = 0.0
    logits_BV.requires_grad_()
    head = score_from_logits(logits_BV, torch.tensor([3, 4, 5]), torch.arange(3.0), with_mass=True, backend=backend)
    assert all(torch.isfinite(output).all() for output in head)
    inside = torch.tensor([0.0, scale, scale]).double().logsumexp(0)
    outside = torch.tensor([0.0, *[scale] * 19]).double().logsumexp(0)
    torch.testing.assert_close(head.log_mass_B.double(), (inside - outside).expand(2), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(sum(output.sum() for output in head), logits_BV)
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 20:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [False, True])
def test_views_need_no_copy_to_be_right(backend, mass):
    """The last position of [B, S, V], transposed storage, and a row that stands for all rows."""
    base = random_logits(6, 44).detach()
    views = (base.view(2, 3, 44)[:, -1], base.T.contiguous().T, base[:1].expand(5, 44), base[:, 1:40])
    for view in views:
        check_from_logits(view.requires_grad_(), torch.tensor([1, 30, 2]), 1.3, run(backend, mass), mass=mass)


@pytest.mark.parametrize("mass", [False, True])
def test_nothing_is_read_beyond_the_vocabulary(mass):
    poisoned = torch.full((4, 100), torch.nan)
    poisoned[:3, :61] = random_logits(3, 61).detach()
    check_from_logits(poisoned[:3, :61].requires_grad_(), random_ids(5, 61), 1.0, run("triton", mass), mass=mass)


@pytest.fixture
def loaded(monkeypatch):
    """Addresses of all elements that the interpreter really loads: those under a mask."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load
    addresses = set()

    def record(self, ptrs, mask, *rest):
        addresses.update(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].tolist())
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", record)
    return addresses


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5, 9, 17, 33, 63, 64])
def test_without_the_mass_nothing_but_the_k_columns_is_read(loaded, classes, backward):
    """Masked lanes too: what they read is thrown away, and would still cost a sector of memory a row."""
    logits_BV = random_logits(3, 70)
    ids_K = torch.randperm(66, generator=torch.Generator().manual_seed(classes))[:classes] + 3
    head = score_from_logits(logits_BV, ids_K, torch.arange(float(classes)), backend="triton")
    if backward:
        sum(output.sum() for output in head).backward()
    elements = [(address - logits_BV.data_ptr()) // 4 for address in loaded]
    read = {element for element in elements if 0 <= element < logits_BV.numel()}
    assert read == {70 * row + column for row in range(3) for column in ids_K.tolist()}


def test_an_unknown_id_gives_nan_where_it_can_not_be_refused():
    probs_BK, *_ = launch.from_logits_forward(
        random_logits(2, 10).detach(), torch.tensor([1, 10, 2]), torch.arange(3.0), 1.0, with_mass=False
    )
    assert probs_BK.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mass", [False, True])
def test_empty_batch(backend, mass):
    logits_BV = torch.empty(0, 30, requires_grad=True)
    head = score_from_logits(logits_BV, torch.tensor([1, 2]), torch.arange(2.0), with_mass=mass, backend=backend)
    assert [output.shape[0] for output in head] == [0] * (6 if mass else 5)
    sum(output.sum() for output in head).backward()
    assert logits_BV.grad.shape == (0, 30)


def test_reference_gradcheck():
    logits_BV = random_logits(2, 7).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: tuple(
            reference.score_from_logits(logits, torch.tensor([1, 4, 5]), torch.arange(3.0), 0.7, with_mass=True)
        ),
        [logits_BV],
    )
