"""The compiled kernels, executed without a GPU: right, in bounds, and blind to the batch.

Bit for bit is the point here: triton 3.6 to 3.9 lay out a tile of one row differently from a tile of eight.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels import shared
from tests.kernels.oracle import Case, LogitsCase, check_head, check_kl
from tests.kernels.ptx import Memory, Program
from zscore_kernels import launch, score_head, score_head_kl

pytest.importorskip("triton")

from tests.kernels.compiled import compile_kernel, run_compiled


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(launch, "_launch", run_compiled)


def run_head(*arguments):
    return score_head(*arguments, backend="triton")


@pytest.mark.parametrize(
    ("small_batch", "case"),
    [
        (0, Case(rows=9, width=1040, classes=9, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)),
        (256, Case(rows=2, width=37, classes=17, dtype=torch.float16)),
    ],
)
def test_head(compiled, monkeypatch, small_batch, case):
    monkeypatch.setattr(launch, "SMALL_BATCH", small_batch)
    check_head(case, run_head)


def test_kl(compiled):
    case = Case(rows=3, width=100, classes=5)
    check_kl(case, lambda *arguments: score_head_kl(*arguments, reduction="none", backend="triton"))


@pytest.mark.parametrize("mass", [False, True])
def test_from_logits(compiled, mass):
    shared.right_logits(shared.KERNELS, LogitsCase(2, 5000, ids=(3, 4999, 3, 0, 77), mass=mass))


@pytest.mark.parametrize(("classes", "dtype"), [(3, torch.bfloat16), (9, torch.bfloat16), (33, torch.float32)])
def test_tile_heights_give_the_same_bits(compiled, monkeypatch, classes, dtype):
    rows = launch.Tile.of(classes).rows
    tensors = Case(rows=rows, width=132, classes=classes, dtype=dtype, weight_dtype=dtype).tensors(grad=False)
    wanted = run_head(*tensors, 1.3)
    monkeypatch.setattr(launch, "SMALL_BATCH", 0)
    for one, other in zip(run_head(*tensors, 1.3), wanted, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def stages(classes, dtype):
    hidden_BH, weight_KH = torch.empty(8, 4096, dtype=dtype), torch.empty(classes, 4096, dtype=torch.bfloat16)
    tile = launch.Tile.of(classes)
    out = torch.empty(8, classes)
    return compile_kernel(
        "head_kernel", (hidden_BH, weight_KH, weight_KH, out, out, out, out, 8, 1024, 1.0),
        {
            "H": 4096, "K": classes, "P": tile.padded, "MAIN": tile.main, "TAIL": tile.tail, "GROUPS": tile.groups,
            "ROWS": tile.rows, "LANES": launch.LANES, "UNIT": 4, "HAS_BIAS": False,
        },
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_cores_no_tf32_wide_loads(dtype):
    """fp32 stays fp32, and hidden is read 4 columns a thread."""
    asm = stages(3, dtype)
    assert "mma" not in asm["ptx"].replace("head_kernel", "")
    assert "tf32" not in asm["ptx"]
    wide = "evict_first.L2::cache_hint.v4.b32" if dtype == torch.float32 else "evict_first.L2::cache_hint.v2.b32"
    reads = [line for line in asm["ptx"].splitlines() if "ld.global" in line and "evict_first" in line]
    assert reads
    assert all(wide in line for line in reads)


def test_the_machine_sees_what_a_gpu_would_not():
    """An out-of-bounds load, an unwritten register and an unknown instruction are errors."""
    head = ".visible .entry k(\n.param .u64 k_param_0\n)\n.reqntid 32\n{\n"
    load = "ld.param.b64 %rd1, [k_param_0];\n"
    programs = {
        "out of bounds": load + "ld.global.b32 %r1, [%rd1+256];\n",
        "unaligned access": load + "ld.global.b32 %r1, [%rd1+2];\n",
        "read before it is written": load + "st.global.b32 [%rd1], %r7;\n",
        "unknown instruction": load + "tanh.approx.f32 %r1, 0f3F800000;\n",
    }
    for text, body in programs.items():
        memory = Memory()
        address = memory.add(np.zeros(4, np.float32))
        with pytest.raises(AssertionError, match=text):
            Program(head + body + "ret;\n}\n").run(memory, (1,), (address,))
