"""benchmarks/score_head.py where it can't measure, and how it judges where it can."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "score_head.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("score_head_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_one_line(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["score_head.py"])
    benchmark.main()
    assert capsys.readouterr().out.splitlines() == [
        "score_head: no CUDA device here; this benchmark times a GPU kernel, run it on a machine with one"
    ]


def rows(**changes):
    """Figures that reach every target, but for the changes."""
    times = {"zscore": 2.0, "compile": 3.0, "compile bf16": 2.5, "full vocabulary": 30.0} | changes
    return [
        {"rows": size, "gb_s": 3500.0, **{name: time and {"gpu_us": time} for name, time in times.items()}}
        for size in (1, 256, 16_384)
    ]


def test_verdicts(benchmark):
    def reached(found, empty_us=1.6, copy=4000.0):
        return {name: verdict["reached"] for name, verdict in benchmark.verdicts(found, empty_us, copy).items()}

    assert all(reached(rows()).values())
    assert not reached(rows(), empty_us=1.5)["empty"]
    assert not reached(rows(), copy=4400.0)["bandwidth"]
    assert not reached(rows(compile=1.9))["compile"]
    assert not reached(rows(**{"full vocabulary": 19.0}))["full"]
    assert not reached(rows(**{"full vocabulary": None}))["full"], "what wasn't measured isn't reached"


def test_plain_torch_gives_the_five_outputs(benchmark):
    from zscore_kernels import reference

    logits, values = torch.randn(4, 9).double(), torch.linspace(1, 5, 9).double()
    wanted = reference.score_from_logits(logits, torch.arange(9), values)
    for one, other in zip(benchmark.of_logits(logits, values), wanted, strict=True):
        torch.testing.assert_close(one, other)
