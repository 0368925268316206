"""What decode workers leave behind: no orphans, no tracebacks, no files, no memory."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.test_workers import OPTIONS, collect, open_files, picture, slow, until, warm
from zscore import workers
from zscore.images import load
from zscore.records import Failure, Pixels
from zscore.workers import DecodePool

# The parent's end

ORPHANS = """
import os, sys, threading, time
from zscore.patches import PixelOptions
from zscore.workers import DecodePool

def main():
    pool = DecodePool(PixelOptions(), workers=2)
    data = open(sys.argv[1], "rb").read()
    pool.submit(0, data)
    pool.results(None)
    for tag in range(4):
        pool.submit(tag, data)
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(20)  # with a copy of the pipes
        os._exit(0)
    print(*pool.pids, flush=True)
    time.sleep(60)

if sys.argv[2] != "main":
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
else:
    main()
"""


def script(tmp_path: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a user's script, which has no `if __name__` guard, in a group of its own."""
    (tmp_path / "script.py").write_text(textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("place", ["main", "thread", "fork"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, place):
    (tmp_path / "slow.png").write_bytes(slow())
    with script(tmp_path, ORPHANS, str(tmp_path / "slow.png"), place) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: all(gone(pid) for pid in pids), 8.0 if place == "fork" else 3.0)
        if place == "fork":
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_workers_outlive_the_thread_that_started_them():
    """The kernel's parent-death signal means the thread."""
    pools: list[DecodePool] = []
    thread = threading.Thread(target=lambda: pools.append(DecodePool(OPTIONS, workers=1)))
    thread.start()
    thread.join()
    with pools[0] as pool:
        (pid,) = pool.pids
        warm(pool)
        time.sleep(0.2)
        warm(pool)
        assert pool.pids == [pid]


INTERRUPTED = """
import sys
from zscore.patches import PixelOptions
from zscore.workers import DecodePool
data = open(sys.argv[1], "rb").read()
try:
    with DecodePool(PixelOptions(), workers=2) as pool:
        print("started", flush=True)
        while True:
            while pool.in_flight < 4:
                pool.submit(0, data)
            pool.results(None)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("delay", [0.0, 0.05, 1.0])
def test_control_c_prints_nothing_from_the_workers(tmp_path, delay):
    """At once (Python still starts in the workers), and in the midst of work."""
    (tmp_path / "picture.jpg").write_bytes(picture(0))
    with script(tmp_path, INTERRUPTED, str(tmp_path / "picture.jpg")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert errors == ""
    assert process.returncode == 130


def test_a_worker_ignores_an_interrupt():
    with DecodePool(OPTIONS, workers=1) as pool:
        warm(pool)
        pids = pool.pids
        os.kill(pids[0], signal.SIGINT)
        warm(pool)
        assert pool.pids == pids


# What it costs


def test_leaving_the_pool_ends_its_processes_and_closes_its_files():
    before = open_files()
    with DecodePool(OPTIONS, workers=2) as pool:
        warm(pool)
        pids = pool.pids
        for tag in range(6):
            pool.submit(tag, picture(tag))
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert open_files() == before
    pool.close()


def test_a_worker_is_small_polite_and_free_of_torch():
    with DecodePool(OPTIONS, workers=1) as pool:
        warm(pool)
        (pid,) = pool.pids
        process = psutil.Process(pid)
        maps = Path(f"/proc/{pid}/maps").read_text()
        for heavy in ("libtorch", "arrow", "polars", "tokenizers"):
            assert heavy not in maps
        assert process.nice() >= min(19, os.nice(0) + 10)
        assert process.num_threads() == 2  # the decoder and the reader of the jobs pipe; no BLAS threads
        assert process.memory_info().rss < 80e6


def test_a_workers_memory_does_not_grow():
    with DecodePool(OPTIONS, workers=1) as pool:
        data = picture(0, "JPEG", (512, 512))
        rss = []
        for _ in range(3):
            for tag in range(60):
                pool.submit(tag, data)
            collect(pool, 60)
            rss.append(psutil.Process(pool.pids[0]).memory_info().rss)
        assert rss[-1] - rss[0] < 4e6


def test_a_huge_picture_leaves_no_memory_behind():
    with DecodePool(OPTIONS, workers=1) as pool:
        warm(pool)
        process = psutil.Process(pool.pids[0])
        before = process.memory_info().rss
        pool.submit(0, picture(0, "BMP", (3000, 3000)))
        assert isinstance(collect(pool, 1)[0].outcome, Pixels)
        warm(pool)
        assert process.memory_info().rss - before < 16e6
        assert all(os.fstat(slot).st_size <= workers._KEEP_BYTES for slot in pool._workers[0]._slots)


def test_the_terminal_stays_clean(capfd):
    """libtiff prints by itself, past Python's warnings; here, of a strip that claims 256 MB."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        file, "TIFF", compression="tiff_lzw"
    )
    entry = file.getvalue().index(struct.pack("<HH", 279, 4))  # StripByteCounts
    damaged = bytearray(file.getvalue())
    damaged[entry + 8 : entry + 12] = struct.pack("<I", 1 << 28)
    assert isinstance(load(bytes(damaged), OPTIONS), Failure)
    assert "TIFFFillStrip" in capfd.readouterr().err
    with DecodePool(OPTIONS, workers=1) as pool:
        pool.submit(0, bytes(damaged))
        assert isinstance(collect(pool, 1)[0].outcome, Failure)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_closed_pool_takes_nothing():
    pool = DecodePool(OPTIONS, workers=1)
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.submit(0, picture(0))
    assert pool.results() == []
