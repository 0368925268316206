"""benchmarks/score_head.py where it can't measure, and how it judges where it can."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "score_head.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, with nothing of it or its helpers left behind."""
    monkeypatch.syspath_prepend(PATH.parent)
    for name in ("_common", "_gpu_timing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("score_head_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_one_line(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["score_head.py"])
    benchmark.main()
    assert capsys.readouterr().out.splitlines() == [
        "score_head: no CUDA device here; this benchmark times a GPU kernel, run it on a machine with one"
    ]


def test_the_interpreter_is_never_timed(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["score_head.py"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1 would time Triton's interpreter; unset it"):
        benchmark.main()


def measured(empty_us=1.6, copy=4000.0, peak=90.0, **changes):
    """Figures that reach every target, but for the changes."""
    times = {"zscore": 2.0, "compile": 3.0, "compile bf16": 2.5, "full vocabulary": 30.0} | changes
    return {
        "empty_us": empty_us,
        "copy_gb_s": copy,
        "rows": [
            {"rows": size, "gb_s": 3500.0, **{name: time and {"gpu_us": time} for name, time in times.items()}}
            for size in (1, 256, 16_384)
        ],
        "training": [{"rows": 256, "without_v_mib": 100.0, "zscore": peak and {"peak_mib": peak}}],
    }


def test_verdicts(benchmark):
    def reached(**changes):
        return {name: verdict["reached"] for name, verdict in benchmark.verdicts(measured(**changes)).items()}

    assert set(reached()) == set(benchmark.TARGETS)
    assert all(reached().values())
    assert reached(empty_us=1.5)["empty"] is False
    assert reached(copy=4400.0)["bandwidth"] is False
    assert reached(compile=1.9)["compile"] is False
    assert reached(**{"compile bf16": 1.9})["compile"] is False
    assert reached(**{"full vocabulary": 19.0})["full"] is False
    assert reached(peak=101.0)["memory"] is False


def test_what_was_not_measured_is_neither_reached_nor_missed(benchmark):
    def verdict(name, **changes):
        return benchmark.verdicts(measured(**changes))[name]

    nothing = {"worst": None, "reached": None}
    assert verdict("full", **{"full vocabulary": None}) == nothing
    assert verdict("compile", **{"compile bf16": None}) == nothing, "half of it isn't it"
    assert verdict("memory", peak=None) == nothing
    for name in ("empty", "bandwidth", "full", "compile"):
        assert verdict(name, zscore=None) == nothing


def test_plain_torch_gives_the_five_outputs(benchmark):
    from zscore_kernels import reference

    logits, values = torch.randn(4, 9).double(), torch.linspace(1, 5, 9).double()
    wanted = reference.score_from_logits(logits, torch.arange(9), values)
    for one, other in zip(benchmark.of_logits(logits, values), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def stubbed(benchmark, monkeypatch):
    """Without a GPU: every call is made once and takes 2 µs."""

    def once(figure):
        def called(call):
            call()
            return figure

        return called

    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(benchmark, "graph_us", once(2.0))
    monkeypatch.setattr(benchmark, "host_us", once(9.0))
    monkeypatch.setattr(benchmark, "peak_mib", once(1.0))
    monkeypatch.setattr(benchmark, "empty_kernel", lambda: lambda: None)
    monkeypatch.setattr(benchmark, "copy_gb_s", lambda: 4000.0)
    monkeypatch.setattr(benchmark, "free_bytes", lambda: 10**9)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return benchmark


ARGUMENTS = argparse.Namespace(classes=9, width=64, vocabulary=500, rows=[1, 3, 256], training_rows=[2, 5])


def test_a_whole_run(stubbed, capsys):
    saved = []
    result = stubbed.run(ARGUMENTS, lambda found: saved.append(json.loads(json.dumps(found))))
    assert [(len(found["rows"]), len(found["training"])) for found in saved] == [
        (1, 0), (2, 0), (3, 0), (3, 1), (3, 2),
    ]  # fmt: skip
    assert saved[-1] == json.loads(json.dumps(result))
    assert all(row[way] == {"gpu_us": 2.0, "host_us": 9.0} for row in result["rows"] for way in stubbed.WAYS)
    assert all(row[way] == {"gpu_us": 2.0, "peak_mib": 1.0} for row in result["training"] for way in stubbed.STEPS)
    assert set(result["off_float64"]) == set(stubbed.EXACT)
    assert all(0 < off < stubbed.LIMIT for off in result["off_float64"].values())
    stubbed.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert f"| 256 | {' | '.join(['2.0 (9.0)'] * 6)} | " in lines[5]
    assert "| 5 | 2.0 µs, 1.0 MiB | 2.0 µs, 1.0 MiB | 2.0 µs, 1.0 MiB |" in lines
    assert "reached       B ≤ 256: at most 1.3 times an empty kernel: 1.00" in lines
    assert "not measured  B ≥ 16,384: at least 0.8 of the copy bandwidth" in lines
    assert "MISSED        B = 256: at least 10 times the full-vocabulary path: 1.00" in lines


def test_the_record_names_machine_and_date(stubbed, monkeypatch, tmp_path, capsys):
    report = stubbed.report
    monkeypatch.setattr(stubbed, "report", lambda *arguments: report(*arguments, results=tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmarks/score_head.py", "--rows", "1"])
    stubbed.save({"rows": []})
    record = json.loads((tmp_path / "score_head.json").read_text())
    assert set(record) == {"benchmark", "command", "date", "hardware", "versions", "result"}
    assert record["command"].endswith("benchmarks/score_head.py --rows 1")
    assert capsys.readouterr().out == ""


def test_what_runs_out_of_memory_is_left_out(stubbed, monkeypatch):
    def full(call):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stubbed, "graph_us", full)
    head = stubbed.Head.random(9, 64, 500)
    assert stubbed.measure(head, 2, 64) == {"rows": 2, "gb_s": None} | dict.fromkeys(stubbed.WAYS)
    assert [stubbed.train(head, 2, 64)[step] for step in stubbed.STEPS] == [None] * 3
    result = {"empty_us": 1.0, "empty_host_us": 1.0, "copy_gb_s": 1.0}
    result |= {"rows": [stubbed.measure(head, 256, 64)], "training": [stubbed.train(head, 2, 64)]}
    result["targets"] = stubbed.verdicts(result)
    stubbed.show(result)


@pytest.mark.parametrize(
    ("rows", "gigabytes", "forward", "training"),
    [(32_768, 141, True, True), (65_536, 141, False, False), (40_000, 141, True, False)],
)
def test_what_fits_an_h200(stubbed, monkeypatch, rows, gigabytes, forward, training):
    """The full path over 248,320 tokens: 10 bytes a logit, and 16 where it is trained."""
    monkeypatch.setattr(stubbed, "free_bytes", lambda: gigabytes * 10**9)
    assert stubbed.fits("full vocabulary", rows, 248_320, stubbed.FORWARD_BYTES) is forward
    assert stubbed.fits("full vocabulary", rows, 248_320, stubbed.TRAINING_BYTES) is training
    assert stubbed.fits("zscore", rows, 248_320, stubbed.TRAINING_BYTES)


@pytest.mark.parametrize("output", range(5))
@pytest.mark.parametrize("way", ["zscore", "eager", "compile"])
def test_a_way_that_is_wrong_is_not_timed(stubbed, monkeypatch, way, output):
    """In any of its outputs, at any of the sizes."""
    right = stubbed.ways

    def wrong(head):
        def call(hidden_BH):
            found = list(right(head)[way](hidden_BH))
            if len(hidden_BH) == 256:
                found[output] = found[output] * (1 + 1e-3)
            return found

        return right(head) | {way: call}

    monkeypatch.setattr(stubbed, "ways", wrong)
    with pytest.raises(SystemExit, match=rf"{way}'s {stubbed.OUTPUTS[output]} is off by .* at B = 256 \(limit 1e-05\)"):
        stubbed.off_float64(stubbed.Head.random(9, 64, 500), 64)


@pytest.mark.parametrize(("call_us", "calls"), [(1.5, 200), (100.0, 200), (1000.0, 49), (80_000.0, 1)])
def test_calls_of_a_replay(benchmark, monkeypatch, call_us, calls):
    """A replay takes 10 µs besides its calls; small kernels are all timed over the same 200."""
    timing = sys.modules["_gpu_timing"]
    captured = []
    monkeypatch.setattr(timing, "warm", lambda call: call())
    monkeypatch.setattr(timing, "captured", lambda call, number: captured.append(number) or number)
    monkeypatch.setattr(timing, "replay_ms", lambda number, times: (number * call_us + 10) / 1e3)
    assert benchmark.graph_us(lambda: None) == pytest.approx(call_us, abs=0.21, rel=1e-3)
    assert captured == [1, calls]
