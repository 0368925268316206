"""A row's result has the same bits whatever batch it is in and wherever it stands there; so has its gradient.

Here the reference and, in Triton's interpreter, the order that the kernels' source fixes; `test_compiled.py` looks at
what the compiler makes of it, `tests/gpu` at the real thing.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.oracle import Case
from tests.kernels.shared import same_bits
from zscore_kernels import launch, reference, score_from_logits, score_head, score_head_kl

pytest.importorskip("triton")


def results(backend, hidden_BH, weight_KH, values_K, bias_K):
    """Outputs and gradients of hidden, row by row."""
    hidden_BH = hidden_BH.detach().requires_grad_()
    head = score_head(hidden_BH, weight_KH, values_K, bias_K, 1.3, backend=backend)
    (gradient_BH,) = torch.autograd.grad(sum(output.sum() for output in head), hidden_BH)
    return (*head, gradient_BH)


@pytest.mark.parametrize(("backend", "rows", "width"), [("reference", 300, 1100), ("triton", 6, 40)])
def test_slices_permutations_and_other_batches(backend, rows, width):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=rows, width=width).tensors(grad=False)
    wanted = results(backend, hidden_BH, weight_KH, values_K, bias_K)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    for pick in (order, slice(0, 1), slice(rows // 2, rows), [2] * 3):
        found = results(backend, hidden_BH[pick], weight_KH, values_K, bias_K)
        same_bits(found, [output[pick] for output in wanted])


@pytest.mark.parametrize("classes", [2, 3, 9, 16, 17, 64])
def test_reference_for_every_number_of_classes(classes):
    hidden_BH, weight_KH, values_K, bias_K = Case(rows=37, width=65, classes=classes).tensors(grad=False)
    wanted = results("reference", hidden_BH, weight_KH, values_K, bias_K)
    for rows in (1, 2, 7, 36):
        found = results("reference", hidden_BH[-rows:], weight_KH, values_K, bias_K)
        same_bits(found, [output[-rows:] for output in wanted])


def test_reference_on_one_thread_and_on_several():
    tensors = Case(rows=257, width=1100).tensors(grad=False)
    wanted = results("reference", *tensors)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        same_bits(results("reference", *tensors), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("classes", [9, 17])
def test_tile_heights(monkeypatch, classes):
    """One row a tile and several: small and large batches."""
    tensors = Case(rows=5, width=520, classes=classes).tensors(grad=False)
    wanted = results("triton", *tensors)
    monkeypatch.setattr(launch, "SMALL_BATCH", 0)
    same_bits(results("triton", *tensors), wanted)


def test_layouts():
    """A view that must be copied first and one that need not be give the bits of the plain tensor."""
    hidden_BH, *rest = Case(rows=3, width=40).tensors(grad=False)
    wanted = results("triton", hidden_BH, *rest)
    wide = torch.zeros(3, 99)
    for start in (0, 1, 16):
        wide[:, start : start + 40] = hidden_BH
        same_bits(results("triton", wide[:, start : start + 40], *rest), wanted)
    same_bits(results("triton", hidden_BH.T.contiguous().T, *rest), wanted)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_other_operations(backend):
    hidden_BH, weight_KH, values_K, _ = Case(rows=4, width=30, classes=5).tensors(grad=False)
    target_BK = Case(rows=4, classes=5).target()
    ids_K = torch.tensor([4, 29, 0, 7, 8])

    def run(rows):
        return (
            score_head_kl(hidden_BH[rows], weight_KH, target_BK[rows], reduction="none", backend=backend),
            *score_from_logits(hidden_BH[rows], ids_K, values_K, 1.3, with_mass=True, backend=backend),
        )

    wanted = run(slice(None))
    for rows in ([3], [1, 2], [2, 0, 3]):
        same_bits(run(rows), [output[rows] for output in wanted])


def test_fold_sum_sums_any_length():
    for length in (1, 2, 3, 5, 31, 64, 1000):
        terms = torch.randn(2, length, dtype=torch.float64)
        torch.testing.assert_close(reference.fold_sum(terms), terms.sum(1))
