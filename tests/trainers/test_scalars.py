"""TensorBoard's figures are the log's; without the package only a run that asks for them is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from zscore.errors import UsageError
from zscore_trainers import scalars
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.recipes import load_recipe


class Quiet:
    """An algorithm that logs its step."""

    def backward(self, policy, step):
        policy(torch.ones(1, 2)).sum().backward()
        return {"loss": 1.0 / (step + 1)}


def engine(out, **changes):
    config = EngineConfig(**({"steps": 4, "save_every": 2, "evaluate_every": 2, "tensorboard": True} | changes))
    return Engine(nn.Linear(2, 1), Quiet(), config, out)


def read(folder):
    """{(name, step): value} of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {(name, one.step): one.value for name in events.Tags()["scalars"] for one in events.Scalars(name)}


class Recorder:
    """Stands in for torch's writer, where TensorBoard isn't installed."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.written, self.closed = folder, purge_step, [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def add_scalar(self, name, value, step):
        self.written.append((name, step, value))


@pytest.fixture
def recorders(monkeypatch):
    """All writers that were opened."""
    import sys
    import types

    made = []

    def build(folder, purge_step):
        made.append(Recorder(folder, purge_step))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=build))
    monkeypatch.setattr(scalars, "find_spec", lambda _: object())
    return made


def test_every_figure_of_the_log_is_written(recorders, tmp_path):
    engine(tmp_path).run(evaluate=lambda _: {"plcc_overall": 0.5, "hpa_overall": 0.75})
    (recorder,) = recorders
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    wanted = [(name, row["step"], value) for row in rows for name, value in row.items() if name != "step"]
    assert [(name.split("/")[1], step, value) for name, step, value in recorder.written] == wanted
    assert {name for name, step, _ in recorder.written if step == 2} >= {"held_out/plcc_overall", "training/loss"}
    assert (recorder.folder, recorder.purge_step, recorder.closed) == (tmp_path / "tensorboard", None, True)


def test_a_run_that_goes_on_hides_what_was_written_beyond_its_checkpoint(recorders, tmp_path):
    with pytest.raises(ZeroDivisionError):
        engine(tmp_path).run(lambda step, _: 1 / (3 - step))
    assert recorders[0].closed
    again = engine(tmp_path)
    assert again.resume()
    again.run()
    assert recorders[1].purge_step == 3
    assert [step for name, step, _ in recorders[1].written if name == "training/loss"] == [3, 4]


def test_it_may_be_asked_for_in_the_middle_of_a_run(recorders, tmp_path):
    with pytest.raises(ZeroDivisionError):
        engine(tmp_path, tensorboard=False).run(lambda step, _: 1 / (3 - step))
    assert recorders == []
    assert engine(tmp_path).resume()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(scalars, "find_spec", lambda _: None)
    engine(tmp_path, tensorboard=False).run()
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(UsageError, match=r"tensorboard=true needs the package: pip install 'zscore-reward\[tensorb"):
        engine(tmp_path)


def test_the_setting_has_a_name():
    assert load_recipe("tiny", ["tensorboard=true"]).engine.tensorboard
    assert not load_recipe("tiny").engine.tensorboard


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own, of its compiled messages
def test_tensorboard_reads_them(tmp_path):
    pytest.importorskip("tensorboard")
    engine(tmp_path).run(evaluate=lambda _: {"plcc_overall": 0.5})
    found = read(tmp_path / "tensorboard")
    assert found["held_out/plcc_overall", 4] == 0.5
    assert math.isclose(found["training/loss", 3], 1 / 3, rel_tol=1e-6)
