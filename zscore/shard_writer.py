"""Fills output shards one after the other, and makes what is added to a sample."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tarfile
from collections import deque
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, Self

from zscore.errors import OutputError, TableError, UsageError
from zscore.file_copy import write_all
from zscore.lane import Lane
from zscore.store import FULL
from zscore.stores import ShardFault
from zscore.tar import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from zscore.passages import Passage
    from zscore.sources import Source
    from zscore.store import Store
    from zscore.tar_copy import Carrier

SCORES_SUFFIX = "zscore.json"
# Full shards that wait for their names, or their uploads: each takes a descriptor and, before an upload, local disk.
UNFINISHED = 2
# How the tar reader shows bytes of a name that aren't UTF-8.
NOT_UTF8 = re.compile(r"\\x[89a-f][0-9a-f]")
# Like GNU tar and Python's tarfile: archives end on a multiple of 20 blocks.
RECORD = 20 * BLOCK
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
SHARD_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]I?)?(B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ShardSize:
    """When an output shard is full."""

    samples: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`10000` samples, or at least `500MB` (KB, MB, GB; KiB, MiB, GiB).

        Raises:
            UsageError: neither.
        """
        found = SHARD_SIZE.fullmatch(text.strip())
        size = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
        in_bytes = found is not None and bool(found[2] or found[3])
        if not found or float(found[1]) <= 0 or (in_bytes and size < 1):
            raise UsageError(f"--shard-size '{text}': give samples (10000) or bytes (500MB, 1GiB)")
        if not in_bytes:
            if "." in found[1]:
                raise UsageError(f"--shard-size '{text}': samples are counted in whole numbers")
            return cls(samples=int(found[1]))
        return cls(bytes=size)

    def is_full(self, samples: int, size: int) -> bool:
        """Whether the next sample begins a new shard."""
        return (self.samples is not None and samples >= self.samples) or (self.bytes is not None and size >= self.bytes)


@dataclass(frozen=True, slots=True)
class Written:
    """A finished output shard."""

    name: str
    samples: int
    size: int
    source: str
    """Where its last sample comes from."""
    index: int


class ShardWriter:
    """Writes PREFIX-000000.tar and so on; use as a context, which drops a shard that was begun if it ends in an error.

    A thread writes, in order, so that the caller reads on meanwhile; another gives full shards their names, which for
    an object store means uploading them.

    Args:
        store: folder of the shards.
        prefix: of their names.
        number: of the first one.
        size: when one is full.
        on_shard: called (in a thread) with every shard once it is there under its name.
    """

    def __init__(
        self, store: Store, prefix: str, number: int, size: ShardSize, on_shard: Callable[[Written], None]
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._number = number
        self._limit = size
        self._on_shard = on_shard
        self._samples = 0
        self._size = 0
        self._last: tuple[Source, Passage] | None = None
        self._writing = Lane("zscore-write")
        self._closing = Lane("zscore-close")
        self._unfinished: list[contextlib.ExitStack] = []
        """Full shards that aren't there under their name yet."""
        self._marks = deque[Event]()
        # Only the writing thread touches these two, and the marks.
        self._file = contextlib.ExitStack()
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Nothing is open before the first sample."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the last shard, or drop it."""
        if kind is None:
            self._end_shard()
        self._writing.stop(drop=kind is not None)
        self._closing.stop()
        failure = error or self._writing.error or self._closing.error
        if failure is not None:
            # Drops what isn't finished; the store puts its own errors into words here.
            with contextlib.ExitStack() as files:
                for file in (*self._unfinished, self._file):
                    files.push(file)
                raise failure

    def add(self, source: Source, passage: Passage, carrier: Carrier, row: dict[str, Any] | None) -> None:
        """Append a sample, in a new shard where the current one is full, and its scores if there is a `row`.

        The carrier must stay open until `drain`.
        """
        self._closing.check()
        member = b"" if row is None else score_member(source, passage, row)
        # Readers take neighbours of one key for one sample; keys may repeat, so those don't become neighbours.
        follows_itself = self._last is not None and self._last[1].key == passage.key
        if self._samples and (follows_itself or self._limit.is_full(self._samples, self._size)):
            self._end_shard()
        if not self._samples:
            self._writing.do(self._open, shard_name(self._prefix, self._number))
        self._writing.do(self._append, source, passage, carrier, member)
        if not carrier.can_wait:
            self.drain()
        self._writing.check()
        self._size += passage.size + len(member)
        self._samples += 1
        self._last = source, passage

    def drain(self) -> None:
        """Wait until everything is written that was added; what failed is raised by the next `add`, or at the end."""
        self._writing.wait()

    def _end_shard(self) -> None:
        if self._last is None or not self._samples:
            return
        end = bytes(2 * BLOCK + -(self._size + 2 * BLOCK) % RECORD)
        source, passage = self._last
        name = shard_name(self._prefix, self._number)
        shard = Written(name, self._samples, self._size + len(end), source.shard.name, passage.index)
        self._writing.do(self._close, shard, end)
        self._number += 1
        self._samples, self._size = 0, 0

    def _open(self, name: str) -> None:
        self._descriptor = self._file.enter_context(self._store.write(name)).fileno()

    def _append(self, source: Source, passage: Passage, carrier: Carrier, member: bytes) -> None:
        try:
            carrier.copy(passage, self._descriptor)
            write_all(self._descriptor, member)
        except ShardFault as fault:
            raise TableError(f"{_named(source, passage)} can't be copied: {fault.failure.error}") from fault
        except OSError as error:
            if error.errno in FULL:
                raise  # the store says what to do
            raise OutputError(f"{_named(source, passage)} can't be copied: {error.strerror or error}") from error

    def _close(self, shard: Written, end: bytes) -> None:
        write_all(self._descriptor, end)
        file = self._file.pop_all()
        self._unfinished.append(file)
        self._closing.do(self._commit, file, shard)
        self._marks.append(self._closing.mark())
        if len(self._marks) > UNFINISHED:
            self._marks.popleft().wait()

    def _commit(self, file: contextlib.ExitStack, shard: Written) -> None:
        file.close()
        self._unfinished.remove(file)
        self._on_shard(shard)


def _named(source: Source, passage: Passage) -> str:
    return f"kept sample {passage.index} of {source.shard.name}"


def shard_name(prefix: str, number: int) -> str:
    """Name of an output shard."""
    return f"{prefix}-{number:06d}.tar"


def score_member(source: Source, passage: Passage, row: dict[str, Any]) -> bytes:
    """A tar member KEY.zscore.json with one row's scores; the same row gives the same bytes.

    Raises:
        TableError: the sample has such a member, or a name that it can't share.
    """
    where = f"sample {passage.index} ('{passage.key}') of {source.shard.name}"
    if SCORES_SUFFIX in passage.suffixes:
        raise TableError(f"{where} has a .{SCORES_SUFFIX} member already: leave --add-scores out")
    if NOT_UTF8.search(passage.key):
        raise TableError(f"{where} has a name that isn't UTF-8: leave --add-scores out")
    data = json.dumps({name: _plain(value) for name, value in row.items()}, default=str).encode()
    header = tarfile.TarInfo(f"{passage.key}.{SCORES_SUFFIX}")
    header.size = len(data)
    return header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % BLOCK)


def _plain(value: Any) -> Any:
    """For JSON: float32's noise rounded off, no NaN."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return [_plain(item) for item in value] if isinstance(value, list) else value
