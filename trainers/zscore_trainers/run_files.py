"""The small files of a run, such that a power cut or a full disk leaves nothing behind that a resume stumbles over.

Settings and the mark of a whole checkpoint are there in full or not at all. The log is only ever appended to, so its
last line may be half written; it is cut off before more is written, and passed over where the log is read.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from zscore.store import sync

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_whole(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that is on the disk, and in its place, when this returns."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content))
    sync(temporary)
    temporary.replace(file)
    sync(file.parent)


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
