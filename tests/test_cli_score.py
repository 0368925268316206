"""`zscore score` as a process: what is printed where, and with which exit code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

from tests.tiny import write_rubric, write_shards
from zscore.demo.student import untrained_student
from zscore.demo.trained import demo_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_shards(folder / "in", 2, 3, broken=frozenset({4}))
    write_rubric(folder)
    return folder


def zscore(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "zscore", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False
    )


FAST = ("--engine", "transformers", "--rubric", "tiny.toml", "--max-pixels", 4096, "--workers", 1)


def test_a_run_its_summary_and_its_exit_codes(folder, tmp_path):
    out = tmp_path / "s.parquet"
    first = zscore("score", "in", "--out", out, *FAST, cwd=folder)
    assert first.returncode == 3, first.stderr
    assert "NO MODEL GIVEN" in first.stderr
    assert "16.7% of the rows failed, over --max-failed 5.0%" in first.stderr
    assert "bad_image" in first.stdout
    assert "6 rows in" in first.stdout
    assert pl.read_parquet(out).height == 6
    again = zscore("score", "in", "--out", out, *FAST, "--max-failed", 0.5, "--quiet", cwd=folder)
    assert (again.returncode, again.stdout) == (0, "")
    with_model = zscore(
        "score", "in", "--out", out, *FAST, "--max-failed", 0.5, cwd=folder, ZSCORE_MODEL=str(demo_student())
    )
    assert "NO MODEL GIVEN" not in with_model.stderr
    assert "nothing to do" in with_model.stdout


def test_dry_run_writes_nothing(folder, tmp_path):
    done = zscore("score", "in", "--out", tmp_path / "s.parquet", *FAST, "--dry-run", cwd=folder, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    for words in ("2 (", "6", "transformers", "tiny: left, right", "joint"):
        assert words in done.stdout
    assert "s.parquet: new" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_the_output_would_go_through(folder, tmp_path):
    command = ("score", "in", "--out", tmp_path / "s.parquet", *FAST, "--max-failed", 1)
    assert zscore(*command, "--limit", 4, cwd=folder).returncode == 0
    before = sorted(tmp_path.rglob("*"))

    def outlook(*more):
        done = zscore(*command, *more, "--dry-run", cwd=folder, COLUMNS="200")
        assert sorted(tmp_path.rglob("*")) == before
        return done.stdout + done.stderr

    assert "complete: nothing to do" in outlook("--limit", 4)
    assert "limit = 4, this run has None" in outlook()
    assert "scored anew" in outlook("--overwrite")
    assert "rows scored again" in outlook("--limit", 4, "--retry-failed")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("score", "nowhere"), 2, "nowhere"),
        (("score",), 2, "Missing argument"),
        (("score", "in", "--layuot", "joint"), 2, "--layout"),
        (("score", "in", "--layout", "both"), 2, "--layout 'both' isn't known: choose joint or separate"),
        (("score", "in", "--reasoning", "--layout", "joint"), 2, "--reasoning is a layout of its own"),
        (("score", "in", "--reasoning", "--samples", "0"), 2, "--samples 0: at least 1"),
        (("score", "in", "--samples", "2"), 2, "belong to --reasoning"),
        (("score", "in", "--reasoning", "--rubric", "q-align"), 2, "'q-align' has no [layouts.reasoning]"),
        (("score", "in", "--out", "s.csv"), 2, "'s.csv': tables are written as parquet"),
        (("score", "in", "--engine", "onnx"), 2, "--engine 'onnx' isn't known"),
        (("score", "in", "--rubric", "z-rewrad"), 2, "did you mean 'z-reward'"),
        (("score", "in", "--limit", "0"), 2, "--limit"),
        (("score", "in", "--max-failed", "1.5"), 2, "--max-failed"),
        (("score", "in", "--workers", "-1"), 2, "--workers -1"),
        (("score", "in", "--max-pixels", "7"), 2, "--max-pixels 7"),
        (("score", "in", "--model", "./none"), 1, "no model folder at './none'"),
        (("score", "in", "--out", "nosuch://x/y.parquet"), 2, "can't write to nosuch://x"),
        (("score", "in", "--out", "/proc/nope/s.parquet"), 1, "can't write /proc/nope"),
        (("scoer",), 2, "Did you mean 'score'"),
    ],
)
def test_a_wrong_call_is_one_clear_line(folder, arguments, code, says):
    done = zscore(*arguments, cwd=folder, ZSCORE_MODEL=str(untrained_student()))
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if not done.stderr.startswith("Usage"):
        assert len(done.stderr.splitlines()) <= 3


def test_ctrl_c_keeps_what_is_finished(folder, tmp_path):
    write_shards(tmp_path / "in", 6, 8)
    out = tmp_path / "s.parquet"
    command = [sys.executable, "-m", "zscore", "score", str(tmp_path / "in"), "--out", str(out), *map(str, FAST)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("s.parquet.parts/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert list(tmp_path.glob("s.parquet.parts/*.parquet"))
    done = zscore("score", tmp_path / "in", "--out", out, *FAST, cwd=folder)
    assert "resuming:" in done.stderr
    assert pl.read_parquet(out).height == 48


def test_a_terminal_gets_a_live_display(folder, tmp_path):
    main, side = pty.openpty()
    command = [sys.executable, "-m", "zscore", "score", "in", "--out", str(tmp_path / "s.parquet"), *map(str, FAST)]
    process = subprocess.Popen(
        command, cwd=folder, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(side)
    text = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the process has closed its end
            break
        if not piece:
            break
        text += piece
    os.close(main)
    assert process.wait(60) == 3
    assert b"\x1b[" in text
    assert b"6 rows in" in text
    assert b"Traceback" not in text
    assert b"Loading weights" not in text


def test_version_and_help_have_examples(folder):
    assert zscore("--version", cwd=folder).stdout.startswith("zscore 0.")
    text = zscore("score", "--help", cwd=folder).stdout
    assert "Examples:" in text
    assert "zscore score shards/ --out scores.parquet" in text
