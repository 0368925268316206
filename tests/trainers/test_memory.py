"""What a training step holds: the meter of the benchmarks, and that the vocabulary's size is only in the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zscore_trainers import vocabulary
from zscore_trainers.engine import Engine, EngineConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script, and leaves nothing of it or its helpers behind."""
    import importlib

    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        for module in ("_common", "_memory", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    yield load
    for module in ("_common", "_memory", "risd_memory", "gdso_two_pass"):
        sys.modules.pop(module, None)


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), max_size=12), data=st.data())
def test_the_peak_is_what_a_walk_over_all_moments_finds(sizes, data):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from _memory import peak
    finally:
        sys.path.remove(str(BENCHMARKS))
    held, changes, moments = [], [], [[]]
    for size in sizes:
        held.append(size)
        changes.append(size)
        moments.append(list(held))
        if data.draw(st.booleans()):
            changes.append(-held.pop(data.draw(st.integers(0, len(held) - 1))))
            moments.append(list(held))
    assert peak(changes) == (max(sum(moment) for moment in moments), 0)
    rest = max(sum(size for size in moment if size != 4) for moment in moments)
    assert peak(changes, aside=4) == (rest, max(moment.count(4) for moment in moments))


def test_tensors_are_counted_to_the_byte(benchmark):
    memory = benchmark("_memory")
    with memory.Tensors() as tensors:
        one = torch.zeros(1000)
        two = torch.zeros(3000)
        del one
        three = torch.zeros(500)
        del two, three
    assert tensors.changes == [4000, 12_000, -4000, 2000, -12_000, -2000]
    assert memory.peak(tensors.changes) == (16_000, 0)


def test_resident_memory_follows_what_is_touched_and_given_back(benchmark):
    resident = benchmark("_memory").Resident()
    resident.rest()
    bytes_of = torch.ones(25_000_000).nbytes
    # Some pages of it may have been resident before, on the allocator's free list.
    assert 0.99 * bytes_of < resident.peak() < 1.3 * bytes_of
    resident.rest()
    assert resident.peak() < 0.1 * bytes_of


def test_a_child_that_fails_ends_the_benchmark(benchmark):
    in_child = benchmark("_memory").in_child
    assert in_child(["-c", "print('words'); print('{\"a\": 1}')"]) == {"a": 1}
    with pytest.raises(SystemExit, match="failed with 3"):
        in_child(["-c", "raise SystemExit(3)"])


VOCABULARY, WIDTH = 20_011, 8
TABLE = VOCABULARY * WIDTH * 4


def test_the_mass_makes_one_tensor_of_the_table_s_size(benchmark):
    """Its gradient; a full-logits softmax of 64 positions would take eight tables' room."""
    memory = benchmark("_memory")
    hidden = torch.randn(64, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    with memory.Tensors() as tensors:
        vocabulary.log_partition(hidden, weight).sum().backward()
    rest, tables = memory.peak(tensors.changes, TABLE)
    assert tables == 1
    assert rest < 3 * 64 * vocabulary.SLICE * 4 < 64 * VOCABULARY * 4


class Distill:
    """An algorithm for a head alone."""

    def backward(self, policy, step):
        loss = vocabulary.log_partition(torch.ones(4, WIDTH), policy.weight).sum()
        loss.backward()
        return {"loss": float(loss.detach())}


def test_an_update_makes_no_copy_of_a_table(benchmark, tmp_path):
    """Gradient, and nothing else of its size: an optimizer that isn't fused makes two more."""
    memory = benchmark("_memory")
    tensors = memory.Tensors()
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    engine = Engine(head, Distill(), EngineConfig(steps=2), tmp_path)

    def watch(step, _):
        (tensors.start if step == 1 else tensors.stop)()

    engine.run(watch)
    assert memory.peak(tensors.changes, TABLE)[1] == 1


def test_both_ways_give_the_same_gradient(benchmark, tmp_path, capsys, monkeypatch):
    """What the benchmark compares computes the same thing, and only one of the two has logits of size T x V."""
    script = benchmark("risd_memory")
    found = {}
    for way in script.WAYS:
        folder = tmp_path / way
        folder.mkdir()
        script.child(folder, way, 4099, 4)
        found[way] = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, full = found.values()
    for name in ("loss", "gradient_norm"):
        assert ours[name] == pytest.approx(full[name], rel=1e-4)
    assert ours["tables"] == 2
    assert ours["rest_mb"] < full["rest_mb"]


def test_the_record_says_whether_the_bound_was_met(benchmark, monkeypatch, capsys):
    script = benchmark("risd_memory")
    rows = {"zscore": {"10": 30.0, "20": 31.0}, "full logits": {"10": 60.0, "20": 93.0}}
    kept = {}

    def measure(way, size, _):
        return {"rest_mb": rows[way][str(size)], "tables": 2, "table_mb": 1.0, "resident_mb": 40.0}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "report", lambda name, result: kept.update({name: result}))
    monkeypatch.setattr(sys, "argv", ["risd_memory.py", "--vocabularies", "10", "20"])
    script.main()
    result = kept["risd_memory"]
    assert result["rest_largest_over_smallest"] == {"zscore": 1.033, "full logits": 1.55}
    assert result["full_logits_over_zscore"] == [2.0, 3.0]
    assert result["reached"]
    assert "full logits" in capsys.readouterr().out


def test_gdso_ways_agree_and_two_passes_hold_less(benchmark, tmp_path):
    """The three ways of the benchmark are one gradient; two passes hold a quarter of the graphs."""
    script, memory = benchmark("gdso_two_pass"), benchmark("_memory")
    problem = script.Problem.drawn(tmp_path, 1)
    assert len(problem.batch.tokens_BT) == 2 * script.GROUP
    lengths = problem.outputs_NT.sum(-1)
    assert script.OUTPUT[0] <= lengths.min() <= lengths.max() <= script.OUTPUT[1]
    assert not (problem.outputs_NT & ~problem.batch.mask_BT.bool()).any()
    assert problem.outputs_NT.gather(1, problem.batch.probes_BD).all()
    gradients, peaks, values = {}, {}, {}
    for name, way in script.ways(problem, 4).items():
        with memory.Tensors() as tensors:
            values[name] = float(way())
        gradients[name], peaks[name] = script.gradient(problem), memory.peak(tensors.changes)[0]
    # A sum of terms of either sign; another width of padding sums them in another order.
    assert values["two_pass"] == pytest.approx(values["single"], abs=1e-4)
    for name in ("two_pass", "kept"):
        assert (gradients[name] - gradients["single"]).norm() < 1e-4 * gradients["single"].norm()
    assert peaks["two_pass"] < 0.5 * min(peaks["single"], peaks["kept"])


def test_ratios_are_taken_round_by_round_and_for_each_order(benchmark):
    seconds = {"two_pass": [(2.0, 1.0), (9.0, 4.0), (3.0, 3.0)], "single": [(1.0, 1.0), (3.0, 2.0), (2.0, 1.0)]}
    found = benchmark("gdso_two_pass").ratios(seconds, "single", 0)
    assert found == {"mean_of_medians": 2.375, "by_order": [1.75, 3.0], "by_round": [2.0, 3.0, 1.5]}
    assert benchmark("gdso_two_pass").ratios(seconds, "single", 1)["by_round"] == [1.0, 2.0, 3.0]


def test_micro_batches_are_the_batch_again(benchmark, tmp_path):
    script = benchmark("gdso_two_pass")
    whole = script.Problem.drawn(tmp_path, 1).batch
    parts, order = script.split(whole, 5)
    assert [len(part.tokens_BT) for part in parts] == [5, 5, 5, 1]
    assert sorted(order) == list(range(16))
    lengths = whole.mask_BT.sum(-1)[order]
    assert (lengths.diff() >= 0).all()
    assert [part.tokens_BT.shape[1] for part in parts] == [int(some.max()) for some in lengths.split(5)]
    rows = iter(order)
    for part in parts:
        pictures = part.pixels_NX.unflatten(0, (-1, script.PATCHES))
        for at, row in zip(range(len(part.tokens_BT)), rows, strict=False):
            length = int(whole.mask_BT[row].sum())
            assert torch.equal(part.tokens_BT[at, :length], whole.tokens_BT[row, :length])
            assert part.mask_BT[at].sum() == length
            assert torch.equal(pictures[at], whole.pixels_NX.unflatten(0, (-1, script.PATCHES))[row])
            assert torch.equal(part.probes_BD[at], whole.probes_BD[row])
