"""How much memory a piece of torch code takes, in a process of its own.

Two figures. *Tensors*: every allocation and release of torch's CPU allocator in order, as its profiler records them;
the sum's highest value is exact to the byte and the same in every run, but sees neither Python nor a library's own
buffers. *Resident*: the kernel's high-water mark against what was resident before, which sees all of these, and the
page size, the heap's gaps and what other code left to be used again.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tensors:
    """Records torch's allocations between `start` and `stop`."""

    def __init__(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.changes: list[int] = []
        """Bytes, in order: positive where a tensor's memory was allocated, negative where it was released."""

    def start(self) -> None:
        """Record from here on; what is released later but was allocated before doesn't count."""
        self._profiler.start()

    def stop(self) -> None:
        """Record no further."""
        self._profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        found = [event["args"] for event in events if event["name"] == "[memory]"]
        self.changes = [change["Bytes"] for change in sorted(found, key=lambda change: change["Ev Idx"])]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def peak(changes: Sequence[int], aside: int = 0) -> tuple[int, int]:
    """The highest sum of allocations, and the most of those left out that exist at a time.

    Args:
        changes: as `Tensors` records them.
        aside: size of the allocations that are left out of the sum, bytes; 0 leaves out none.
    """
    now = highest = count = most = 0
    for change in changes:
        if aside and abs(change) == aside:
            count += 1 if change > 0 else -1
            most = max(most, count)
        else:
            now += change
            highest = max(highest, now)
    return highest, most


class Resident:
    """Resident memory of this process from `rest` on."""

    def rest(self) -> None:
        """Hand freed memory back to the kernel, and start from what remains."""
        ctypes.CDLL(None).malloc_trim(0)
        # Not ru_maxrss, which a child takes over from the process that it was forked from.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def peak(self) -> int:
        """Bytes above what was there."""
        return _status("VmHWM") - self._before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found) * 1024


def in_child(arguments: Sequence[str]) -> dict[str, Any]:
    """What `python ARGUMENTS` prints as JSON on its last line.

    Raises:
        SystemExit: it fails.
    """
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{list(arguments)} failed with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
