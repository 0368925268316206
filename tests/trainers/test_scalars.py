"""TensorBoard's and wandb's figures are the log's; without the package only a run that asks for it is refused."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys

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
    assert not (tmp_path / "wandb").exists()
    with pytest.raises(UsageError, match=r"tensorboard=true needs the package: pip install 'zscore-reward\[tensorb"):
        engine(tmp_path)
    with pytest.raises(UsageError, match=r"wandb=pictures needs the package: pip install 'zscore-reward\[wandb"):
        engine(tmp_path, tensorboard=False, wandb="pictures")


def test_the_setting_has_a_name():
    assert load_recipe("tiny", ["tensorboard=true"]).engine.tensorboard
    assert not load_recipe("tiny").engine.tensorboard
    assert load_recipe("tiny", ["wandb=pictures"]).engine.wandb == "pictures"
    assert not load_recipe("tiny").engine.wandb


def records(file):
    """What a file of wandb's says: after seven bytes LevelDB's log, 32 KiB blocks of (crc, length, kind, part)."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield proto.Record.FromString(whole)
            whole = b""


def logged(out):
    """{(name, step): value} of all of wandb's files, and the names of its runs."""
    found, runs = {}, set()
    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.project, record.run.run_id))
            row = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
            found |= {(name, row["step"]): value for name, value in row.items() if "/" in name}
    return found, runs


def wandb_run(out, mode, cut):
    """What a run says that logs to wandb, in a process of its own: wandb starts a service and keeps it to the end."""
    code = """
import sys
from pathlib import Path
from tests.trainers.test_scalars import engine
started = engine(Path(sys.argv[1]), tensorboard=False, wandb="pictures")
started.resume()
started.run(lambda step, _: 1 / (int(sys.argv[2]) - step), lambda _: {"plcc_overall": 0.75})
"""
    without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = {"HOME": str(out), "NETRC": str(out / "none"), "WANDB_MODE": mode}
    command = [sys.executable, "-c", code, str(out), str(cut)]
    done = subprocess.run(command, env=without | home, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def test_wandb_keeps_them_and_a_resumed_run_is_the_same(tmp_path):
    pytest.importorskip("wandb")
    code, said = wandb_run(tmp_path, "offline", cut=3)
    assert (code, "ZeroDivisionError" in said) == (1, True), said
    code, said = wandb_run(tmp_path, "offline", cut=100)
    assert code == 0, said
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found, runs = logged(tmp_path)
    assert {step for _, step in found} == {1, 2, 3, 4}
    assert {name.split("/")[1]: value for (name, step), value in found.items() if step == 4} | {"step": 4} == rows[-1]
    assert found["held_out/plcc_overall", 4] == 0.75
    assert runs == {("pictures", (tmp_path / "wandb" / "run-id").read_text())}


def test_wandb_without_a_login(tmp_path):
    pytest.importorskip("wandb")
    code, said = wandb_run(tmp_path, "online", cut=100)
    assert code == 1
    wanted = r"UsageError: wandb=pictures: No API key .*; or keep its files here: WANDB_MODE=offline"
    assert re.search(wanted, said), said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own, of its compiled messages
def test_tensorboard_reads_them(tmp_path):
    pytest.importorskip("tensorboard")
    engine(tmp_path).run(evaluate=lambda _: {"plcc_overall": 0.5})
    found = read(tmp_path / "tensorboard")
    assert found["held_out/plcc_overall", 4] == 0.5
    assert math.isclose(found["training/loss", 3], 1 / 3, rel_tol=1e-6)
