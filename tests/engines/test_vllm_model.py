"""The model's parts without an engine: pooler, head, pixel rows. They import vLLM (hence the marker)."""

import importlib.metadata
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engines.pooling import H, K, Request, imported_model, step
from zscore.demo.student import untrained_student
from zscore.distribution import EXTRA
from zscore.engines import vllm_plugin

vllm_only = pytest.mark.vllm


@pytest.fixture(scope="module")
def model():
    return imported_model()


@pytest.fixture
def pooler(model):
    torch.manual_seed(0)
    head = model.LevelHead(range(K), [float(level) for level in range(K)], H)
    head.fill(torch.randn(K, H))
    return model.ProbePooler(head)


def expected(pooler, request):
    return pooler.head(request.hidden[list(request.probes)]).flatten()


@vllm_only
def test_whole_prompts_of_a_batch_get_their_own_rows(pooler):
    requests = [Request(1, 9, (2, 5, 8)), Request(2, 4, (3,)), Request(3, 12, (0, 11))]
    outputs = step(pooler, requests, [9, 4, 12])
    for request, output in zip(requests, outputs, strict=True):
        assert output.shape == (len(request.probes) * (K + EXTRA),)
        torch.testing.assert_close(output, expected(pooler, request), rtol=0, atol=0)


@vllm_only
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("boundary", range(1, 20))
def test_boundary_at_every_position(pooler, boundary, neighbours):
    """The probe window is 12 … 19; reading back from the last row would give a neighbour's rows here."""
    request = Request(1, 20, (12, 15, 17, 19))
    before, after = Request(2, 30, (3, 29)), Request(3, 30, (3, 29))
    batch = [before, request, after] if neighbours else [request]
    first = step(pooler, batch, [7, boundary, 2] if neighbours else [boundary])
    assert first == [None] * len(batch)
    second = step(pooler, batch, [5, 20 - boundary, 4] if neighbours else [20 - boundary])
    torch.testing.assert_close(second[1 if neighbours else 0], expected(pooler, request), rtol=0, atol=0)
    assert request.state.hidden_states_cache == []


@vllm_only
def test_one_token_at_a_time(pooler):
    request = Request(1, 20, (12, 15, 17, 19))
    outputs = [step(pooler, [request], [1])[0] for _ in range(20)]
    assert outputs[:-1] == [None] * 19
    torch.testing.assert_close(outputs[-1], expected(pooler, request), rtol=0, atol=0)


@vllm_only
@pytest.mark.parametrize("stopped", [5, 13, 16, 19])
def test_preempted_request_starts_over(pooler, stopped):
    request = Request(1, 20, (12, 15, 17, 19))
    step(pooler, [request], [stopped])
    request.done = 0
    step(pooler, [request], [14])
    (output,) = step(pooler, [request], [6])
    torch.testing.assert_close(output, expected(pooler, request), rtol=0, atol=0)


@vllm_only
def test_prefix_cache_hit_past_a_probe_is_an_error_never_a_number(pooler):
    request = Request(1, 20, (12, 15, 17, 19))
    request.done = 16  # as a cache hit does
    with pytest.raises(RuntimeError, match="2 probes lie before this chunk, but 0 were seen"):
        step(pooler, [request], [4])


@vllm_only
def test_held_rows_are_copies(pooler):
    """vLLM overwrites the hidden states' buffer in the next step."""
    request = Request(1, 20, (12, 15, 17, 19))
    want = expected(pooler, request)
    buffer = request.hidden.clone()
    original, request.hidden = request.hidden, buffer
    step(pooler, [request], [16])
    buffer[:16] = 0
    (output,) = step(pooler, [request], [4])
    request.hidden = original
    torch.testing.assert_close(output, want, rtol=0, atol=0)


@vllm_only
def test_requests_without_probes_read_the_last_token(pooler):
    """vLLM's own warm-up passes none."""
    request = Request(1, 6, ())
    (output,) = step(pooler, [request], [6])
    torch.testing.assert_close(output, pooler.head(request.hidden[5:]).flatten(), rtol=0, atol=0)


@vllm_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_keeps_its_rows_as_they_are_stored(model, dtype):
    weight = torch.randn(100, H).to(dtype)
    head = model.LevelHead((7, 3, 99), (1.0, 2.0, 3.0), H)
    head.fill(weight)
    assert head.weight_KH.dtype is dtype
    assert torch.equal(head.weight_KH, weight[[7, 3, 99]])
    assert head.weight_KH.untyped_storage().nbytes() == 3 * H * dtype.itemsize, "it holds the whole projection"
    assert head.state_dict() == {}  # nothing for a weight loader to miss
    assert dict(head.named_buffers())["weight_KH"] is head.weight_KH  # moves with the model


@vllm_only
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_give_the_bits_of_a_float32_copy(model, hidden_dtype):
    head = model.LevelHead(range(K), [float(level) for level in range(K)], H)
    head.fill(torch.randn(K, H, dtype=torch.bfloat16))
    hidden = torch.randn(6, H).to(hidden_dtype)
    narrow = head(hidden)
    head.fill(head.weight_KH.float())
    assert torch.equal(head(hidden), narrow)


@vllm_only
def test_head_takes_float64_rows_as_float32(model):
    weight = torch.randn(4, H, dtype=torch.float64)
    head = model.LevelHead((0, 1), (1.0, 2.0), H)
    head.fill(weight)
    assert torch.equal(head.weight_KH, weight[:2].float())


@vllm_only
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_head_refuses_what_it_can_not_score_with(model, dtype):
    """float8 among it: without the scale beside them its numbers mean nothing."""
    with pytest.raises(ValueError, match=f"stored as {dtype}"):
        model.LevelHead((0, 1), (1.0, 2.0), H).fill(torch.zeros(4, H).to(dtype))


@vllm_only
def test_the_pooler_follows_the_device(pooler, monkeypatch):
    """Where the kernels are the choice of the device, they run: nothing here picks the reference."""
    from zscore_kernels import backend_calls, launch

    monkeypatch.setattr(launch, "KERNEL_DEVICES", ("cuda", "cpu"))
    before = backend_calls.copy()
    step(pooler, [Request(1, 9, (2, 5, 8))], [9])
    assert backend_calls - before == {("interpreter", "head_kernel"): 1}


@vllm_only
def test_pixel_rows_are_those_of_the_image_processor(model):
    """Order channel, time, row, column; float32 bit for bit, in each value that a byte can have."""
    from transformers import AutoImageProcessor

    from zscore.patches import PixelOptions, patchify

    processor = AutoImageProcessor.from_pretrained(untrained_student())
    ramp = np.arange(256 * 320 * 3, dtype=np.uint32).reshape(256, 320, 3)
    picture = (ramp * 2_654_435_761 >> 13).astype(np.uint8)
    want = processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
    patches = torch.from_numpy(patchify(picture, PixelOptions()))
    mean, std = model.pixel_scale(processor)
    assert len(np.unique(picture)) == 256
    for dtype in (torch.float32, torch.bfloat16):
        rows = model.pixel_rows(patches.flatten(1), mean.unsqueeze(1), std.unsqueeze(1), 2, dtype)
        assert torch.equal(rows, want.to(dtype))


@vllm_only
@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"do_rescale": True, "do_normalize": True}, 127.5, 63.75),
        ({"do_rescale": True, "do_normalize": False}, 0.0, 255.0),
        ({"do_rescale": False, "do_normalize": True}, 0.5, 0.25),
    ],
)
def test_pixel_scale_follows_the_processor(model, settings, mean, std):
    processor = types.SimpleNamespace(rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.25] * 3, **settings)
    got_mean, got_std = model.pixel_scale(processor)
    torch.testing.assert_close(got_mean, torch.full((3,), mean))
    torch.testing.assert_close(got_std, torch.full((3,), std))


def test_plugin_is_an_entry_point_and_imports_nothing_heavy():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="zscore")
    assert entry.value == "zscore.engines.vllm_plugin:register"
    code = f"import sys, {vllm_plugin.__name__}; print(sorted({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plugin_registers_by_name_once(monkeypatch):
    registered: dict[str, str] = {}
    registry = types.SimpleNamespace(get_supported_archs=registered.keys, register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()
    assert registered == {vllm_plugin.ARCHITECTURE: "zscore.engines.vllm_model:LevelProbeModel"}
