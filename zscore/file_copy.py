"""Bytes from one open file to another, in the kernel where the file systems can."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from zscore.records import Status
from zscore.stores import ShardFault

if TYPE_CHECKING:
    from collections.abc import Callable

    Copy = Callable[[int, int, int, int], int]

CHUNK = 1 << 20
# The file systems don't do it for these two files; another way does.
_UNSUPPORTED = frozenset(
    {
        *(errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY),
        *(errno.EPERM, errno.EACCES, errno.EBADF, errno.ETXTBSY),
    }
)


def write_all(target: int, data: bytes) -> None:
    """Write all of `data`, whatever a single call takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _in_kernel(source: int, target: int, start: int, count: int) -> int:
    return os.copy_file_range(source, target, count, start)


def _sendfile(source: int, target: int, start: int, count: int) -> int:
    return os.sendfile(target, source, start, count)


def _by_hand(source: int, target: int, start: int, count: int) -> int:
    data = os.pread(source, min(count, CHUNK), start)
    write_all(target, data)
    return len(data)


_ways: list[Copy] = [*([_in_kernel] if hasattr(os, "copy_file_range") else []), _sendfile, _by_hand]


def copy_range(source: int, target: int, start: int, count: int) -> None:
    """Append `count` bytes from `start` of one file to another, in the kernel where it can.

    Raises:
        ShardFault: the source ends before.
    """
    end = start + count
    for way in _ways:
        try:
            while start < end and (moved := way(source, target, start, end - start)):
                start += moved
        except OSError as error:
            if error.errno not in _UNSUPPORTED or way is _ways[-1]:
                raise
        # Some file systems move 0 bytes where they mean that they can't: only reading tells that this is the end.
        if start == end:
            return
    raise ShardFault(Status.TRUNCATED_SHARD, f"the shard was cut at byte {start} while it was read")
