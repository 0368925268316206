"""Files that a power cut or a full disk tore: a run goes on from what was whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from zscore.errors import EngineError
from zscore_trainers.engine import DONE, Engine, EngineConfig
from zscore_trainers.run_files import mend_log, read_log, write_whole

WHOLE = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
TORN = ['{"step": 3, "lo', '{"step": 3, "loss": 0.5}', '{"step": 3, "lo\n', "\0\0\0\0", '{"step": 3, "p\xe9', "\n"]


class Quiet:
    def backward(self, policy, step):
        policy(torch.ones(1, 2)).sum().backward()
        return {"loss": 1.0 / (step + 1)}


def engine(out, steps=4):
    torch.manual_seed(0)
    return Engine(nn.Linear(2, 1), Quiet(), EngineConfig(steps=steps, save_every=1), out)


class TestLog:
    @pytest.mark.parametrize("torn", TORN)
    def test_what_was_not_written_to_its_end_is_cut_off(self, tmp_path, torn):
        file = tmp_path / "log.jsonl"
        file.write_bytes((WHOLE + torn).encode("latin-1"))
        assert set(read_log(file, 2)) == {1, 2}
        mend_log(file)
        assert file.read_text() == WHOLE

    def test_nothing_but_a_torn_line(self, tmp_path):
        file = tmp_path / "log.jsonl"
        file.write_text('{"st')
        mend_log(file)
        assert file.read_text() == ""
        assert read_log(file, 9) == {}

    def test_a_whole_log_and_none(self, tmp_path):
        file = tmp_path / "log.jsonl"
        mend_log(file)
        assert read_log(file, 9) == {}
        assert not file.exists()
        file.write_text(WHOLE)
        mend_log(file)
        assert file.read_text() == WHOLE
        assert read_log(file, 1) == {1: {"loss": 2.0}}

    def test_a_run_goes_on_behind_a_torn_line(self, tmp_path):
        engine(tmp_path).run(until=2)
        with (tmp_path / "log.jsonl").open("a") as log:
            log.write('{"step": 3, "lo')
        again = engine(tmp_path)
        assert again.resume()
        again.run()
        assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


class TestWriteWhole:
    def test_an_old_file_stays_where_the_new_one_cant_be_written(self, tmp_path, monkeypatch):
        file = tmp_path / "settings.json"
        write_whole(file, {"a": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(file, {"a": 2})
        assert json.loads(file.read_text()) == {"a": 1}

    def test_a_checkpoint_that_cant_be_marked_leaves_the_one_before(self, tmp_path, monkeypatch):
        first = engine(tmp_path)
        first.run(until=1)
        first.step = 2
        synced = os.fsync
        monkeypatch.setattr(os, "fsync", lambda number: full() if DONE in opened(number) else synced(number))
        with pytest.raises(EngineError, match="No space left.*make room.*; the last checkpoint is step-00000001"):
            first.save()
        again = engine(tmp_path)
        assert again.resume()
        assert again.step == 1

    def test_the_mark_is_on_the_disk_before_anything_is_deleted(self, tmp_path, monkeypatch):
        first = engine(tmp_path)
        first.run(until=1)
        first.step = 2
        done = []
        synced, removed = os.fsync, shutil.rmtree
        monkeypatch.setattr(os, "fsync", lambda number: (done.append(opened(number)), synced(number)))
        monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (done.append(f"- {path}"), removed(path, **how)))
        folder = first.save()
        marked, named, deleted = (
            done.index(name)
            for name in (f"{folder}/.{DONE}.tmp", str(folder), f"- {tmp_path}/checkpoints/step-00000001")
        )
        assert marked < named < deleted


def full(*_):
    raise OSError(28, "No space left on device")


def opened(number):
    return str(Path(f"/proc/self/fd/{number}").readlink())
