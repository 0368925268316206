"""The score head on a GPU: compiled, graph-captured, never waiting for the host, and blind to the batch."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from tests.kernels.oracle import Case, LogitsCase, check_head, check_kl, check_logits
from tests.kernels.shared import BF16, CLASSES, CUDA, same_bits
from zscore_kernels import launch, score_from_logits, score_head, score_head_kl

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("classes", CLASSES)
def test_tall_tiles(classes):
    """Beyond SMALL_BATCH rows: tiles of several, which the shared cases don't fill."""
    check_head(CUDA(rows=300, width=1000, classes=classes), score_head)
    check_kl(CUDA(rows=300, width=500, classes=classes), partial(score_head_kl, reduction="none"))


@pytest.mark.parametrize("width", [1, 3, 37, 511, 512, 513, 4096, 5120])
def test_widths(width):
    check_head(CUDA(rows=5, width=width), score_head)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16, torch.float16])
def test_dtypes_mix(dtype, weight_dtype):
    check_head(CUDA(rows=300, width=256, dtype=dtype, weight_dtype=weight_dtype, bias=False), score_head)


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("width", [50_000, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_real_vocabularies(mass, width, dtype):
    ids = (3, width - 1, 3, 0, 77)
    check_logits(LogitsCase(5, width, ids=ids, dtype=dtype, mass=mass, device="cuda"), score_from_logits)


@pytest.mark.parametrize(("width", "classes"), [(4096, 9), (4096, 5), (1000, 9), (4097, 9), (2048, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_batch_invariance(width, classes, dtype):
    """The first 700 rows of a large batch, alone, in slices, permuted and in other places: forward and gradient."""
    tensors = CUDA(rows=20_000, width=width, classes=classes, dtype=dtype, weight_dtype=BF16).tensors(grad=False)
    hidden_BH, *rest = tensors

    def run(rows_BH):
        rows_BH = rows_BH.detach().requires_grad_()
        head = score_head(rows_BH, *rest, 1.3)
        (gradient_BH,) = torch.autograd.grad(sum(output.sum() for output in head), rows_BH)
        return (*head, gradient_BH.float())

    wanted = run(hidden_BH)
    order = torch.randperm(700, device="cuda")
    for pick in (slice(0, 1), slice(3, 4), slice(0, 256), slice(1, 258), slice(0, 700), order):
        same_bits(run(hidden_BH[pick]), [output[pick] for output in wanted])


def test_batch_invariance_of_the_other_operations():
    hidden_BH, weight_KH, values_K, _ = CUDA(rows=3000, width=1024, dtype=BF16).tensors(grad=False)
    target_BK = CUDA(rows=3000).target()
    ids_K = torch.arange(9, device="cuda") * 100

    def run(rows):
        return (
            score_head_kl(hidden_BH[rows], weight_KH, target_BK[rows], reduction="none"),
            *score_from_logits(hidden_BH[rows], ids_K, values_K),
            *score_from_logits(hidden_BH[rows], ids_K, values_K, with_mass=True),
        )

    wanted = run(slice(None))
    for rows in (slice(0, 1), slice(7, 200), torch.randperm(3000, device="cuda")):
        same_bits(run(rows), [output[rows] for output in wanted])


def test_the_same_batch_gives_the_same_gradients():
    hidden_BH, weight_KH, values_K, bias_K = CUDA(rows=10_000, width=512).tensors()

    def gradients():
        head = score_head(hidden_BH, weight_KH, values_K, bias_K)
        return torch.autograd.grad(head.mean_B.sum() + head.entropy_B.sum(), [hidden_BH, weight_KH, bias_K])

    same_bits(gradients(), gradients())


def test_unaligned_views_give_the_same_bits():
    hidden_BH, *rest = CUDA(rows=8, width=4096, dtype=BF16).tensors(grad=False)
    wide = torch.full((8, 4200), torch.nan, device="cuda", dtype=BF16)
    wanted = score_head(hidden_BH, *rest)
    for start in (0, 1, 8, 100):
        wide[:, start : start + 4096] = hidden_BH
        same_bits(score_head(wide[:, start : start + 4096], *rest), wanted)


@pytest.mark.parametrize("rows", [1, 1000])
def test_graph_capture(rows):
    """Forward and backward replayed on new data in the same buffers."""
    hidden_BH, weight_KH, values_K, bias_K = CUDA(rows=rows, width=1024, dtype=BF16).tensors()
    target_BK = CUDA(rows=rows).target()
    leaves = [hidden_BH, weight_KH, bias_K]

    def step():
        head = score_head(hidden_BH, weight_KH, values_K, bias_K)
        loss = score_head_kl(hidden_BH, weight_KH, target_BK, bias_K) + head.var_B.sum()
        gradients = torch.autograd.grad(loss, leaves)
        # Detached: a graph that outlives its step keeps the leaves' nodes, and with them the stream of the capture.
        return [output.detach() for output in (*head, loss, *gradients)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden_BH.copy_(hidden_BH.flip(1))
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")  # said by every call
def test_the_host_never_waits():
    hidden_BH, weight_KH, values_K, bias_K = CUDA(rows=40, width=256).tensors()
    target_BK = CUDA(rows=40).target()
    logits_BV = torch.randn(40, 1000, device="cuda", requires_grad=True)
    ids_K = torch.arange(9, device="cuda")

    def step():
        loss = score_head_kl(hidden_BH, weight_KH, target_BK, bias_K)
        loss = loss + score_head(hidden_BH, weight_KH, values_K, bias_K).mean_B.sum()
        loss = loss + score_from_logits(logits_BV, ids_K, values_K, with_mass=True).log_mass_B.sum()
        loss.backward()

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_memory_does_not_know_the_vocabulary():
    """Forward and backward take the gradient of hidden, the partial sums of weight's, and next to nothing else."""
    rows, width, classes = 4096, 4096, 9
    hidden_BH, weight_KH, _, _ = CUDA(rows=rows, width=width, dtype=BF16).tensors()
    target_BK = CUDA(rows=rows).target()
    score_head_kl(hidden_BH, weight_KH, target_BK).backward()
    hidden_BH.grad = weight_KH.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    score_head_kl(hidden_BH, weight_KH, target_BK).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < rows * width * 2 + launch.MAX_SPLITS * classes * width * 4 + 4e6


def test_torch_compile():
    hidden_BH, weight_KH, values_K, bias_K = CUDA(rows=50, width=256).tensors()

    def step(hidden_BH, weight_KH, bias_K):
        head = score_head(hidden_BH * 2, weight_KH, values_K, bias_K)
        return head.mean_B.sum() + head.entropy_B.sum()

    found = torch.compile(step, fullgraph=True)(hidden_BH, weight_KH, bias_K)
    wanted = step(hidden_BH, weight_KH, bias_K)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found, [hidden_BH, weight_KH, bias_K]),
        torch.autograd.grad(wanted, [hidden_BH, weight_KH, bias_K]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_without_triton_a_gpu_is_refused(monkeypatch):
    """Never the reference in silence."""
    hidden_BH, *rest = CUDA().tensors(grad=False)
    score_head(hidden_BH, *rest)
    monkeypatch.setitem(sys.modules, "triton", None)
    launch._compiled.cache_clear()
    with pytest.raises(RuntimeError, match="the score head's kernels need triton"):
        score_head(hidden_BH, *rest)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    check_head(Case(device="cuda:1"), score_head)
