"""`kill -9` at random moments: the same command always finishes, and its rows are those of an undisturbed run.

Each run is a process of its own, forked from a server that has imported torch and transformers already (an import
takes ten times as long as such a run). What is killed is what a user would kill: the main process, decode workers
still attached.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.tiny import write_rubric, write_shards
from zscore.demo.student import untrained_student

SHARDS, SAMPLES, KILLS = 8, 6, 50


def serve(arguments, log):
    """In the forked process: the command line, as typed."""
    sys.argv = ["zscore", *arguments]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from zscore.cli import main

    main()


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    write_shards(folder / "in", SHARDS, SAMPLES, broken=frozenset({9, 30}))
    rubric = write_rubric(folder)

    def arguments(out):
        flags = {"--out": out, "--model": untrained_student(), "--rubric": rubric, "--max-pixels": 4096, "--workers": 1}
        pairs = [str(part) for pair in flags.items() for part in pair]
        return ["score", str(folder / "in"), "--engine", "transformers", "--max-failed", "1", *pairs]

    return arguments


def rows(path):
    return pq.read_table(path).to_pylist()


def check_final_name(out: Path, wanted):
    """At any moment the final name shows nothing or the whole table."""
    if out.exists():
        assert rows(out) == wanted


@pytest.mark.timeout(2400)  # half a minute's work on two idle cores, many times that on busy ones
def test_fifty_kills_lose_nothing_and_double_nothing(server, command, tmp_path):
    log = tmp_path / "log"
    whole, out = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    started = time.monotonic()
    first = server.Process(target=serve, args=(command(whole), log))
    first.start()
    first.join(600)
    assert first.exitcode == 0, log.read_text()
    duration = time.monotonic() - started
    wanted = rows(whole)
    assert len(wanted) == SHARDS * SAMPLES

    rng = random.Random(20_26)
    kills = completed = 0
    while kills < KILLS:
        process = server.Process(target=serve, args=(command(out), log))
        process.start()
        process.join(rng.uniform(0.0, duration / 2))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, log.read_text()[-3000:]
            completed += 1
        check_final_name(out, wanted)
        if process.exitcode == 0:
            out.unlink()  # begin again: kills have to hit every phase
    process = server.Process(target=serve, args=(command(out), log))
    process.start()
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert rows(out) == wanted
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["log", "scores.parquet", "whole.parquet"]


def test_a_killed_run_leaves_no_worker_behind(server, command, tmp_path):
    process = server.Process(target=serve, args=(command(tmp_path / "s.parquet"), tmp_path / "log"))
    process.start()
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not children and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
