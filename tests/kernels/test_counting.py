"""`backend_calls`: what ran, where, counted only once it has; and who follows the choice that it proves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.oracle import Case
from tests.kernels.shared import uncounted
from zscore.distribution import score_probes
from zscore_kernels import backend_calls, launch, score_from_logits, score_head, score_head_kl

pytest.importorskip("triton")

IDS = torch.tensor([1, 7, 4])


@pytest.fixture
def counted():
    before = backend_calls.copy()
    return lambda: dict(backend_calls - before)


def interpreted(*names):
    return {("interpreter", name): 1 for name in names}


def test_the_reference(counted):
    hidden_BH, weight_KH, values_K, _ = Case(classes=3).tensors()
    score_head(hidden_BH, weight_KH, values_K)
    score_head(hidden_BH, weight_KH, values_K, backend="reference").mean_B.sum().backward()
    score_head_kl(hidden_BH, weight_KH, Case(classes=3).target())
    score_from_logits(hidden_BH, IDS, values_K)
    assert counted() == {
        ("reference", "score_head"): 2, ("reference", "score_head_kl"): 1, ("reference", "score_from_logits"): 1,
    }  # fmt: skip


def test_every_kernel_forward_and_backward(counted):
    hidden_BH, weight_KH, values_K, _ = Case(classes=3).tensors()
    mean_B = score_head(hidden_BH, weight_KH, values_K, backend="triton").mean_B
    assert counted() == interpreted("head_kernel")
    mean_B.sum().backward()
    projected = ("hidden_gradient_kernel", "weight_partial_kernel", "weight_gather_kernel")
    assert counted() == interpreted("head_kernel", "score_gradient_kernel", *projected)


def test_every_kernel_of_the_loss(counted):
    hidden_BH, weight_KH, _, _ = Case(classes=3).tensors()
    score_head_kl(hidden_BH, weight_KH, Case(classes=3).target(), backend="triton").backward()
    projected = ("hidden_gradient_kernel", "weight_partial_kernel", "weight_gather_kernel")
    assert counted() == interpreted("kl_kernel", *projected)


@pytest.mark.parametrize("mass", [False, True])
def test_every_kernel_of_the_vocabulary(counted, mass):
    logits_BV = torch.zeros(2, 20, requires_grad=True)
    head = score_from_logits(logits_BV, IDS, torch.arange(3.0), with_mass=mass, backend="triton")
    sum(output.sum() for output in head).backward()
    names = ("from_logits_kernel", "score_gradient_kernel", "column_gradient_kernel")
    assert counted() == interpreted(*names, *(("mass_gradient_kernel",) if mass else ()))


@pytest.mark.parametrize("rows", [0, 2])
def test_an_empty_batch_launches_nothing(counted, rows):
    hidden_BH, weight_KH, values_K, _ = Case(rows=rows, width=8, classes=3).tensors()
    score_head_kl(hidden_BH, weight_KH, Case(rows=rows, classes=3).target(), backend="triton").backward()
    for mass in (False, True):
        head = score_from_logits(hidden_BH, IDS, values_K, with_mass=mass, backend="triton")
        sum(
            output.sum() for output in (*head, *score_head(hidden_BH, weight_KH, values_K, backend="triton"))
        ).backward()
    assert bool(counted()) == bool(rows)


def test_a_launch_that_fails_is_not_counted(counted, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("out of resources")

    monkeypatch.setattr(launch, "kernel", lambda name, beside: Broken())
    hidden_BH, weight_KH, values_K, _ = Case(classes=3).tensors(grad=False)
    with pytest.raises(RuntimeError, match="out of resources"):
        score_head(hidden_BH, weight_KH, values_K, backend="triton")
    assert counted() == {}


def test_a_reference_that_fails_is_not_counted(counted, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("zscore_kernels.reference.score_head", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_head(*Case().tensors(grad=False))
    assert counted() == {}


def test_what_runs_for_comparison_is_not_counted(counted):
    """A test on a GPU may compute on the CPU what it expects, and is judged by its calls on the GPU alone."""
    hidden_BH, weight_KH, values_K, _ = Case(classes=3).tensors(grad=False)
    score_head(hidden_BH, weight_KH, values_K, backend="triton")
    with pytest.raises(RuntimeError, match="half-way"), uncounted():
        score_head(hidden_BH, weight_KH, values_K)
        raise RuntimeError("half-way")
    assert counted() == interpreted("head_kernel")


def test_what_triton_s_own_switch_interprets_is_not_called_compiled():
    """Under TRITON_INTERPRET=1 the kernels that tensors on CUDA get are interpreted: on the host, by numpy."""
    script = (
        "import torch, zscore_kernels as z\n"
        "z.launch.kernel = lambda name, beside: z.launch._compiled()[name]\n"  # as on CUDA
        "z.score_head(torch.ones(1, 4), torch.zeros(2, 4), torch.tensor([1.0, 3.0]), backend='triton')\n"
        "assert z.backend_calls == {('interpreter', 'head_kernel'): 1}, z.backend_calls\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_scores_follow_the_device(counted, monkeypatch):
    """`score_probes` leaves the choice to the operation: no backend of its own, no reference called directly."""
    hidden_BH, weight_KH, values_K, _ = Case(classes=5).tensors(grad=False)
    wanted = score_probes(hidden_BH, weight_KH, values_K)
    assert counted() == {("reference", "score_head"): 1}
    monkeypatch.setattr(launch, "KERNEL_DEVICES", ("cuda", "cpu"))
    found = score_probes(hidden_BH, weight_KH, values_K)
    assert counted() == {("reference", "score_head"): 1, ("interpreter", "head_kernel"): 1}
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
