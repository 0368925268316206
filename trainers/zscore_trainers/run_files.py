"""The small files of a run, such that a power cut or a full disk leaves nothing behind that a resume stumbles over.

Settings and the mark of a whole checkpoint are there in full or not at all. The log is only ever appended to, so its
last line may be half written; it is cut off before more is written, and passed over where the log is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from zscore.errors import EngineError, UsageError
from zscore.store import sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class RunLock:
    """One run at a time in a folder. The kernel lets go of it with the process, however that ends."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._descriptor: int | None = None

    def take(self) -> None:
        """Make the folder, and hold it until `close`.

        Raises:
            UsageError: it can't be made or written, or another run holds it.
        """
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"--out {self._out} can't be made a folder to write to: {error.strerror}: give another"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            pid = os.pread(self._descriptor, 32, 0).decode() or "unknown"
            self.close()
            raise UsageError(f"--out {self._out} is in use by process {pid}: wait for it, or give another") from None
        except OSError as error:
            self.close()
            raise UsageError(f"--out {self._out} can't be locked: {error.strerror}: give another") from error

    def close(self) -> None:
        """Let go of it, where it is held."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # children may hold the file open, too
            os.close(self._descriptor)
            self._descriptor = None


def write_whole(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that is on the disk, and in its place, when this returns."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content))
    sync(temporary)
    temporary.replace(file)
    sync(file.parent)


@contextlib.contextmanager
def no_room(file: Path, note: str = "") -> Iterator[None]:
    """Turn what the system says where it can't write into a line that says what to do.

    Raises:
        EngineError: with the room that is left.
    """
    try:
        yield
    except OSError as error:
        raise EngineError(_unwritten(file, error.strerror or str(error), note)) from error
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (RuntimeError, CheckpointException) as error:  # torch's writers tell a full disk in their own way
        raise EngineError(_unwritten(file, (str(error).splitlines() or ["no reason"])[-1], note)) from error


def _unwritten(file: Path, why: str, note: str) -> str:
    free = shutil.disk_usage(file.parent if file.parent.exists() else file.parent.parent).free / 2**30
    return f"{file} can't be written ({why}): {free:.1f} GiB are free; make room and go on with --resume{note}"


def mend_log(file: Path) -> None:
    """Cut off last lines of a log that weren't written to their end."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    size = sum(map(len, lines))
    while lines and not (lines[-1].endswith(b"\n") and _row(lines[-1])):
        lines.pop()
    if sum(map(len, lines)) < size:
        os.truncate(file, sum(map(len, lines)))


def read_log(file: Path, last: int) -> dict[int, Mapping[str, float]]:
    """The log up to a step, without broken lines; of steps that were done twice, as they were the second time."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    found = {row.pop("step"): row for row in map(_row, lines) if row}
    return {step: found[step] for step in sorted(found) if step <= last}


def _row(line: bytes) -> dict[str, Any]:
    """A line of the log; empty where it can't be read."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found
