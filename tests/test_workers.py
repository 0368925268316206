"""Decode workers: real processes that are stopped, killed, orphaned and interrupted."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import signal
import time
from multiprocessing.connection import wait

import numpy as np
import psutil
import pytest
from PIL import Image

from zscore import images, workers
from zscore.errors import EngineError
from zscore.patches import PixelOptions
from zscore.records import Failure, Pixels, Status
from zscore.workers import Decoded, DecodePool

OPTIONS = PixelOptions()


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file, kind)
    return file.getvalue()


@functools.cache
def slow() -> bytes:
    """A small file of 49 million pixels, which takes most of a second."""
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def collect(pool: DecodePool, count: int, seconds: float = 60.0) -> dict[int, Decoded]:
    found: dict[int, Decoded] = {}
    end = time.monotonic() + seconds
    while len(found) < count:
        for decoded in pool.results(max(0.0, end - time.monotonic())):
            assert decoded.tag not in found
            found[decoded.tag] = decoded
        assert time.monotonic() < end, f"{len(found)} of {count} in {seconds} s"
    return found


def open_files() -> int:
    return psutil.Process().num_fds()


def warm(pool: DecodePool) -> None:
    """Let every worker answer once, so that what follows doesn't include its start."""
    for tag in range(pool.capacity):
        pool.submit(-1 - tag, picture(0))
    collect(pool, pool.capacity)


def stop_at_work(pool: DecodePool, tag: int) -> int:
    """Hand in a slow picture and freeze the (only) worker while it decodes it."""
    (pid,) = pool.pids
    pool.submit(tag, slow())
    until(lambda: pool.results() == [] and pool._workers[0].busy)
    os.kill(pid, signal.SIGSTOP)
    return pid


def same(outcome: Pixels | Failure, expected: Pixels | Failure) -> bool:
    if isinstance(outcome, Failure) or isinstance(expected, Failure):
        return outcome == expected
    return (
        np.array_equal(outcome.patches_NCPP, expected.patches_NCPP)
        and (outcome.grid, outcome.width, outcome.height) == (expected.grid, expected.width, expected.height)
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_outcome_is_that_of_decoding_here(count):
    options = PixelOptions(max_pixels=262_144)
    files = [picture(seed, kind, (50 + seed, 700 - seed)) for seed in range(12) for kind in ("JPEG", "PNG")]
    files += [b"", b"no picture", picture(1)[:300], picture(2, "PNG", (1, 900))]
    with DecodePool(options, workers=count) as pool:
        assert len(pool.pids) == len(pool.waitables) == count
        for tag, data in enumerate(files):
            pool.submit(tag, data)
        assert pool.in_flight == len(files)
        found = collect(pool, len(files))
        assert pool.in_flight == 0
    for tag, data in enumerate(files):
        assert same(found[tag].outcome, images.load(data, options))
        assert found[tag].sha256 == hashlib.sha256(data).hexdigest()


def test_patches_are_the_callers_own_and_stay():
    """The slot that they came through is used again by the next picture but one."""
    with DecodePool(OPTIONS, workers=1) as pool:
        for tag in range(8):
            pool.submit(tag, picture(tag))
        found = collect(pool, 8)
    for tag in range(8):
        outcome = found[tag].outcome
        assert isinstance(outcome, Pixels)
        assert outcome.patches_NCPP.flags.writeable
        assert same(outcome, images.load(picture(tag), OPTIONS))


def test_results_does_not_wait_unless_told_to():
    with DecodePool(OPTIONS, workers=1) as pool:
        assert pool.results() == []
        assert pool.results(None) == []  # nothing in flight: nothing to wait for
        warm(pool)
        os.kill(pool.pids[0], signal.SIGSTOP)
        pool.submit(0, picture(0))
        start = time.monotonic()
        assert pool.results() == []
        assert time.monotonic() - start < 0.2
        assert pool.results(0.3) == []
        assert 0.25 < time.monotonic() - start < 2
        os.kill(pool.pids[0], signal.SIGCONT)
        assert [decoded.tag for decoded in pool.results(None)] == [0]


def test_a_waitable_turns_readable_when_there_is_a_result():
    with DecodePool(OPTIONS, workers=2) as pool:
        warm(pool)
        assert wait(pool.waitables, 0) == []
        pool.submit(7, picture(7))
        assert wait(pool.waitables, 20)
        assert [decoded.tag for decoded in pool.results()] == [7]


def test_submitting_never_waits_for_a_stopped_worker():
    """Files far beyond a pipe's buffer."""
    with DecodePool(OPTIONS, workers=1) as pool:
        warm(pool)
        os.kill(pool.pids[0], signal.SIGSTOP)
        start = time.monotonic()
        for tag in range(10):
            pool.submit(tag, picture(tag, "BMP", (500, 500)))
        assert time.monotonic() - start < 5
        os.kill(pool.pids[0], signal.SIGCONT)
        assert len(collect(pool, 10)) == 10


def test_two_pictures_wait_in_a_worker_at_most():
    with DecodePool(OPTIONS, workers=2) as pool:
        assert pool.capacity == 4
        for tag in range(9):
            pool.submit(tag, picture(tag))
        assert [len(worker.jobs) for worker in pool._workers] == [2, 2]
        assert len(pool._backlog) == 5
        collect(pool, 9)


# Crashes


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGKILL, "decoder crashed (signal 9: Killed)"),
        (signal.SIGSEGV, "decoder crashed (signal 11: Segmentation fault)"),
        (signal.SIGABRT, "decoder crashed (signal 6: Aborted)"),
        (signal.SIGRTMIN + 1, "decoder crashed (signal 35: Real-time signal 1)"),
    ],
)
def test_a_crash_costs_one_picture(number, text):
    with DecodePool(OPTIONS, workers=1) as pool:
        warm(pool)
        pid = stop_at_work(pool, 0)
        for tag in range(1, 5):
            pool.submit(tag, picture(tag))
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        found = collect(pool, 5)
        assert found[0].outcome == Failure(Status.BAD_IMAGE, text)
        assert found[0].sha256 == hashlib.sha256(slow()).hexdigest()
        for tag in range(1, 5):
            assert same(found[tag].outcome, images.load(picture(tag), OPTIONS))
        assert pool.pids != [pid]
        assert not psutil.pid_exists(pid)


def test_a_worker_that_is_killed_before_it_takes_a_picture_up_costs_nothing():
    with DecodePool(OPTIONS, workers=1) as pool:
        for round_ in range(3):
            warm(pool)
            (pid,) = pool.pids
            os.kill(pid, signal.SIGSTOP)
            for tag in range(3):
                pool.submit(tag, picture(tag))
            os.kill(pid, signal.SIGKILL)
            for tag, decoded in collect(pool, 3).items():
                assert same(decoded.outcome, images.load(picture(tag), OPTIONS)), round_


def test_a_worker_that_dies_idle_costs_nothing():
    with DecodePool(OPTIONS, workers=2) as pool:
        warm(pool)
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pool.pids))
        for tag in range(6):
            pool.submit(tag, picture(tag))
        for tag, decoded in collect(pool, 6).items():
            assert same(decoded.outcome, images.load(picture(tag), OPTIONS))


def test_a_worker_that_dies_while_it_starts_is_replaced():
    with DecodePool(OPTIONS, workers=1) as pool:
        pool.submit(0, picture(0))
        os.kill(pool.pids[0], signal.SIGKILL)
        assert isinstance(collect(pool, 1)[0].outcome, Pixels)


def test_workers_that_never_start_are_an_error(monkeypatch, capfd):
    monkeypatch.setattr(workers, "_BOOT", "raise SystemExit('numpy is broken')")
    with (
        DecodePool(OPTIONS, workers=2) as pool,
        pytest.raises(EngineError, match=r"decode workers don't start \(exit code 1 for 3 in a row\)"),
    ):
        pool.submit(0, picture(0))
        pool.results(None)
    assert "numpy is broken" in capfd.readouterr().err


def test_no_more_processes_is_an_error(monkeypatch):
    def refuse(*_arguments, **_options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = open_files()
    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    with pytest.raises(EngineError, match="can't start a decode worker: .*temporarily unavailable"):
        DecodePool(OPTIONS, workers=2)
    assert open_files() == before


# Hangs


def test_a_picture_that_takes_too_long_is_given_up():
    """Frozen, so that its own alarm can't end the worker."""
    with DecodePool(OPTIONS, workers=1, timeout_s=10) as pool:
        warm(pool)
        pid = stop_at_work(pool, 0)
        pool.submit(1, picture(1))
        pool._workers[0]._since -= 10
        found = collect(pool, 2)
        assert found[0].outcome == Failure(Status.BAD_IMAGE, "decoding took longer than 10 s")
        assert isinstance(found[1].outcome, Pixels)
        assert pool.pids != [pid]


def test_a_worker_that_freezes_between_pictures_is_replaced_and_nothing_is_lost():
    with DecodePool(OPTIONS, workers=1, timeout_s=0.5) as pool:
        warm(pool)
        os.kill(pool.pids[0], signal.SIGSTOP)
        for tag in range(3):
            pool.submit(tag, picture(tag))
        assert all(isinstance(decoded.outcome, Pixels) for decoded in collect(pool, 3).values())


def test_a_worker_ends_itself_when_its_parent_does_not_look():
    with DecodePool(OPTIONS, workers=1, timeout_s=0.01) as pool:
        pool.submit(0, slow())
        until(lambda: psutil.Process(pool.pids[0]).status() == psutil.STATUS_ZOMBIE)
        assert collect(pool, 1)[0].outcome == Failure(Status.BAD_IMAGE, "decoding took longer than 0.01 s")


def test_a_parent_that_looks_late_finds_results_and_no_timeouts():
    with DecodePool(OPTIONS, workers=1, timeout_s=0.5) as pool:
        warm(pool)
        for tag in range(3):
            pool.submit(tag, picture(tag))
        time.sleep(2.5)
        assert all(isinstance(decoded.outcome, Pixels) for decoded in collect(pool, 3).values())
