"""Addresses past 2^31 elements on a GPU, of every kernel: whole batches, not only their last rows."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.oracle import Case, LogitsCase
from tests.kernels.shared import BF16, CUDA, same_bits
from zscore_kernels import score_from_logits, score_head, score_head_kl

pytestmark = pytest.mark.gpu
FAR = 2**31 + 64
ROWS = 2**31 // 4096 + 8
CLASSES = 64
"""With as many columns, outputs of 2^25 rows and a few pass 2^31 elements."""


@pytest.fixture(autouse=True)
def free_memory():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def needs(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, {free / 1e9:.0f} are free")


def far_rows(matrix):
    """The same rows, further apart than an int32 can say."""
    rows, width = matrix.shape
    storage = torch.empty((rows - 1) * FAR + width, dtype=matrix.dtype, device="cuda")
    far = storage.as_strided((rows, width), (FAR, 1))
    return far.copy_(matrix.detach()).requires_grad_(matrix.requires_grad)


def many_rows(matrix, rows=ROWS):
    """Zeros with the given rows at their end."""
    many = torch.zeros(rows, matrix.shape[1], dtype=matrix.dtype, device="cuda")
    many[-len(matrix) :] = matrix.detach()
    return many.requires_grad_(matrix.requires_grad)


def with_gradients(outputs, *leaves):
    return [*outputs, *torch.autograd.grad([output.sum() for output in outputs], leaves)]


def equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_rows_of_hidden():
    needs(12)
    hidden_BH, weight_KH, values_K, bias_K = CUDA(rows=3, width=8, dtype=BF16).tensors()
    target_BK = CUDA(rows=3).target()

    def run(hidden_BH):
        head = score_head(hidden_BH, weight_KH, values_K, bias_K)
        loss_B = score_head_kl(hidden_BH, weight_KH, target_BK, bias_K, reduction="none")
        return with_gradients([*head, loss_B], hidden_BH, weight_KH, bias_K)

    equal(run(far_rows(hidden_BH)), run(hidden_BH))


@pytest.mark.parametrize("mass", [False, True])
def test_rows_of_logits(mass):
    needs(12)
    logits_BV, ids_K, values_K = LogitsCase(3, 8, classes=3, dtype=BF16, device="cuda").tensors()

    def run(logits_BV):
        return with_gradients(score_from_logits(logits_BV, ids_K, values_K, with_mass=mass), logits_BV)

    equal(run(far_rows(logits_BV)), run(logits_BV))


def test_columns_of_logits():
    needs(12)
    logits_BV, ids_K, values_K = LogitsCase(3, 4, classes=3, dtype=BF16, device="cuda").tensors()
    far_BV = far_rows(logits_BV.detach().T).T
    same_bits(score_from_logits(far_BV, ids_K, values_K), score_from_logits(logits_BV.detach(), ids_K, values_K))


def test_many_hidden_states():
    """Forward, and a gradient of hidden of more than 2^31 elements."""
    hidden_BH, weight_KH, values_K, _ = CUDA(rows=4, width=4096, dtype=BF16).tensors(grad=False)
    needs(20)
    many_BH = many_rows(hidden_BH).requires_grad_()
    head = score_head(many_BH, weight_KH, values_K)
    same_bits([output[-4:] for output in head], score_head(hidden_BH, weight_KH, values_K))
    (gradient_BH,) = torch.autograd.grad(head.mean_B[-4:].sum(), many_BH)
    assert not gradient_BH[:-4].any()
    assert gradient_BH[-4:].any(1).all()


def test_many_hidden_states_in_the_loss():
    """The gradient of weight sums all rows: zeros but for four, whose terms come in the same order."""
    hidden_BH, weight_KH, _, _ = CUDA(rows=4, width=4096, dtype=BF16).tensors()
    needs(20)
    target_BK = CUDA(rows=4).target()
    wanted_B = score_head_kl(hidden_BH, weight_KH, target_BK, reduction="none")
    wanted = torch.autograd.grad(wanted_B.sum(), [hidden_BH, weight_KH])
    many_BH = many_rows(hidden_BH)
    loss_B = score_head_kl(many_BH, weight_KH, many_rows(target_BK), reduction="none")
    same_bits([loss_B[-4:]], [wanted_B])
    gradient_BH, gradient_KH = torch.autograd.grad(loss_B[-4:].sum(), [many_BH, weight_KH])
    equal([gradient_BH[-4:]], [wanted[0]])
    assert not gradient_BH[:-4].any()
    torch.testing.assert_close(gradient_KH, wanted[1])


@pytest.mark.parametrize("mass", [False, True])
def test_many_vocabularies(mass):
    needs(24)
    rows = 2**31 // 200_000 + 8
    case = LogitsCase(2, 200_000, ids=(5, 199_999, 7), dtype=BF16, mass=mass, device="cuda")
    logits_BV, ids_K, values_K = case.tensors()
    wanted = score_from_logits(logits_BV, ids_K, values_K, with_mass=mass)
    many_BV = many_rows(logits_BV, rows)
    found = [output[-2:] for output in score_from_logits(many_BV, ids_K, values_K, with_mass=mass)]
    same_bits(found, wanted)
    (gradient_BV,) = torch.autograd.grad([output.sum() for output in found], many_BV)
    (wanted_BV,) = torch.autograd.grad([output.sum() for output in wanted], logits_BV)
    equal([gradient_BV[-2:]], [wanted_BV])
    assert not gradient_BV[:-2].any()


@pytest.mark.parametrize("mass", [False, True])
def test_many_outputs(mass):
    """Probabilities, logits and their gradients of more than 2^31 elements."""
    needs(72)
    rows = 2**31 // CLASSES + 8
    case = LogitsCase(2, CLASSES, classes=CLASSES, dtype=BF16, mass=mass, device="cuda")
    logits_BV, ids_K, values_K = case.tensors()
    wanted = score_from_logits(logits_BV, ids_K, values_K, with_mass=mass)
    (wanted_BV,) = torch.autograd.grad([output.sum() for output in wanted], logits_BV)
    many_BV = many_rows(logits_BV, rows)
    head = score_from_logits(many_BV, ids_K, values_K, with_mass=mass)
    found = [output[-2:] for output in head]
    same_bits(found, wanted)
    (gradient_BV,) = torch.autograd.grad([output.sum() for output in found], many_BV)
    equal([gradient_BV[-2:]], [wanted_BV])


def test_many_outputs_of_the_head_and_the_loss():
    needs(72)
    rows = 2**31 // CLASSES + 8
    hidden_BH, weight_KH, values_K, _ = Case(rows=2, width=8, classes=CLASSES, dtype=BF16, device="cuda").tensors()
    target_BK = CUDA(rows=2, classes=CLASSES).target()
    many_BH = many_rows(hidden_BH, rows)
    found = [output[-2:] for output in score_head(many_BH, weight_KH, values_K)]
    wanted = score_head(hidden_BH, weight_KH, values_K)
    same_bits(found, wanted)
    many, few = (
        torch.autograd.grad([o.sum() for o in outputs], leaf)
        for outputs, leaf in ((found, many_BH), (wanted, hidden_BH))
    )
    equal([many[0][-2:]], few)
    del found, many
    torch.cuda.empty_cache()
    loss_B = score_head_kl(many_BH, weight_KH, many_rows(target_BK, rows), reduction="none")
    same_bits([loss_B[-2:]], [score_head_kl(hidden_BH, weight_KH, target_BK, reduction="none")])
