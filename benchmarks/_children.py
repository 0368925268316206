"""Runs each side of a benchmark in a process of its own, and says what it took."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Took:
    """One run."""

    seconds: float
    cpu_seconds: float
    peak_rss_mb: float
    """As the kernel counts it: file pages that happen to be mapped included."""
    peak_anonymous_mb: float
    """What the process itself holds; sampled every 20 ms."""


def timed(arguments: Sequence[str]) -> Took:
    """Run `python ARGUMENTS`.

    Raises:
        SystemExit: it fails.
    """
    start = time.perf_counter()
    process = psutil.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    peak = [0, 0]

    def watch() -> None:
        while True:
            try:
                memory = process.memory_info()
            except psutil.Error:
                return
            if not memory.rss:
                return
            peak[0] = max(peak[0], memory.rss)
            peak[1] = max(peak[1], memory.rss - memory.shared)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu = 0.0
    while process.poll() is None:
        try:
            times = process.cpu_times()
            cpu = times.user + times.system
        except psutil.Error:
            break
        time.sleep(0.05)
    code = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    if code:
        raise SystemExit(f"{arguments} failed with {code}")
    return Took(seconds, cpu, peak[0] / 1e6, peak[1] / 1e6)


def summary(runs: Sequence[Took]) -> dict[str, Any]:
    """Medians over the rounds, and the largest peaks."""
    return {
        "seconds": round(statistics.median(run.seconds for run in runs), 2),
        "seconds_by_round": [round(run.seconds, 2) for run in runs],
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs), 2),
        "peak_rss_mb": round(max(run.peak_rss_mb for run in runs)),
        "peak_anonymous_mb": round(max(run.peak_anonymous_mb for run in runs)),
    }


def ratios(one: Sequence[Took], other: Sequence[Took]) -> dict[str, Any]:
    """How many times as long `one` takes as `other`, round by round."""
    found = [left.seconds / right.seconds for left, right in zip(one, other, strict=True)]
    return {"median": round(statistics.median(found), 2), "by_round": [round(ratio, 2) for ratio in found]}
