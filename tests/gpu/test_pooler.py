"""What scores in production on a GPU takes the compiled kernels: the packing, vLLM's head and vLLM's pooler."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.engines.pooling import H, K, Request, imported_model, step
from tests.kernels.oracle import Case, close, exact, head
from zscore.distribution import score_probes
from zscore_kernels import backend_calls

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM isn't installed")
    return imported_model()


@pytest.fixture
def level_head(model):
    torch.manual_seed(0)
    with torch.device("cuda"):  # as vLLM builds its models
        made = model.LevelHead(range(K), [float(level) for level in range(K)], H)
    made.fill(torch.randn(K, H).to(BF16))
    return made


def right(packed, hidden_BH, weight_KH, values_K):
    probs_BK, mean_B, var_B, entropy_B, _ = head(*(exact(one) for one in (hidden_BH, weight_KH, values_K)), None, 1.0)
    wanted = torch.cat((probs_BK, torch.stack((mean_B, var_B.sqrt(), entropy_B), 1)), 1)
    close("packed scores", packed, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_score_probes(rows, dtype):
    case = Case(rows=rows, width=512, dtype=dtype, weight_dtype=dtype, device="cuda")
    hidden_BH, weight_KH, values_K, _ = case.tensors(grad=False)
    before = backend_calls.copy()
    with torch.inference_mode():
        packed = score_probes(hidden_BH, weight_KH, values_K)
    assert backend_calls - before == {("triton", "head_kernel"): 1}
    right(packed, hidden_BH, weight_KH, values_K)


@pytest.mark.vllm
def test_level_head(level_head):
    assert level_head.weight_KH.device.type == "cuda"
    assert level_head.weight_KH.dtype is BF16
    hidden_BH = torch.randn(6, H, device="cuda").to(BF16)
    before = backend_calls.copy()
    packed = level_head(hidden_BH)
    assert backend_calls - before == {("triton", "head_kernel"): 1}
    right(packed, hidden_BH, level_head.weight_KH, level_head.values_K)


@pytest.mark.vllm
def test_pooler(model, level_head):
    """Three requests, one of them in two chunks: one launch a step that finishes any."""
    pooler = model.ProbePooler(level_head)
    requests = [Request(1, 9, (2, 5, 8), "cuda"), Request(2, 4, (3,), "cuda"), Request(3, 12, (0, 11), "cuda")]
    before = backend_calls.copy()
    assert step(pooler, [requests[2]], [7]) == [None]
    assert backend_calls == before
    outputs = step(pooler, requests, [9, 4, 5])
    assert backend_calls - before == {("triton", "head_kernel"): 1}
    for request, output in zip(requests, outputs, strict=True):
        hidden_DH = request.hidden[list(request.probes)]
        right(output.view(len(request.probes), -1), hidden_DH, level_head.weight_KH, level_head.values_K)
