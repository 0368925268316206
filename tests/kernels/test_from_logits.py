"""`score_from_logits`: the kernels in Triton's interpreter and the reference, both against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import shared
from tests.kernels.oracle import LogitsCase
from zscore_kernels import launch, reference, score_from_logits

pytest.importorskip("triton")

BACKENDS = ("triton", "reference")
WHERE = (shared.KERNELS, shared.REFERENCE)


def random_logits(rows, width):
    return LogitsCase(rows, width).tensors()[0]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", shared.LOGITS, ids=str)
def test_against_float64(where, case):
    shared.right_logits(where, case)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 4), width=st.integers(64, 300), classes=st.integers(2, 64), mass=st.booleans(),
    temperature=st.floats(0.25, 4),
)  # fmt: skip
def test_any_shape(rows, width, classes, mass, temperature):
    shared.right_logits(shared.KERNELS, LogitsCase(rows, width, classes, mass=mass, temperature=temperature))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_mass_used(backend):
    logits_BV = random_logits(2, 30)
    ids_K = torch.tensor([4, 29, 0, 7])
    log_mass_B = score_from_logits(logits_BV, ids_K, torch.arange(4.0), with_mass=True, backend=backend).log_mass_B
    (gradient_BV,) = torch.autograd.grad(log_mass_B.sum(), logits_BV)
    wanted_BV = -logits_BV.detach().softmax(1)
    wanted_BV[:, ids_K] += logits_BV.detach()[:, ids_K].softmax(1)
    torch.testing.assert_close(gradient_BV, wanted_BV, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("scale", shared.EXTREME_LOGITS)
def test_extreme_logits_and_masked_tokens(where, scale):
    shared.extreme_logits(where, scale)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")  # numpy's, of ∞ − ∞
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("check", [shared.no_mass, shared.no_logits])
def test_forbidden_rows(where, check):
    check(where)


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


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("mass", [False, True])
def test_empty_batch(where, mass):
    shared.empty_logits(where, mass=mass)


def test_reference_gradcheck():
    logits_BV = random_logits(2, 7).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: tuple(
            reference.score_from_logits(logits, torch.tensor([1, 4, 5]), torch.arange(3.0), 0.7, with_mass=True)
        ),
        [logits_BV],
    )
