"""Passes some samples of a tar on as they lie: header blocks, long-name and pax blocks, contents and padding, raw.

    shard → Carrier → TarReader (`zscore.tar`) → Passages → the bytes of each wanted sample, into a file descriptor

A carrier feeds the tar reader and notices where members begin. That of a local tar reads headers only and lets the
kernel copy the rest; anything else (remote, gzipped) goes by as a stream, and what is wanted of it is set aside.
Samples are counted and keyed exactly as in `zscore.samples`, since a row names its sample by that number.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from zscore.records import Status
from zscore.samples import split_name
from zscore.stores import ShardFault, is_remote
from zscore.streams import open_stream
from zscore.tar import BLOCK, Kind, TarReader

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from zscore.streams import Stream

    Copy = Callable[[int, int, int, int], int]

# Headers of small neighbours come with one read; a picture's header comes alone, so more would be read for nothing.
WINDOW = 4096
CHUNK = 1 << 20
# A wanted sample of a stream waits here until it is whole.
SPOOL_BYTES = 64 << 20
GZIP_MAGIC = b"\x1f\x8b"
_FILE, _SPARSE, _FOLDER = Kind.FILE, Kind.SPARSE, Kind.FOLDER
# The file systems don't do it for these two files; another way does.
_UNSUPPORTED = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF})


class Passage:
    """One wanted sample and where its bytes lie."""

    __slots__ = ("index", "key", "spans", "suffixes")

    def __init__(self, index: int, key: str) -> None:
        self.index = index
        self.key = key
        self.suffixes: set[str] = set()
        self.spans: list[tuple[int, int]] = []
        """Of its members, headers included; neighbours are joined."""

    def add(self, start: int, end: int) -> None:
        """Append a member."""
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], end)
        else:
            self.spans.append((start, end))

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(end - start for start, end in self.spans)


class Carrier(Protocol):
    """What the tar reader reads from."""

    first: int | None
    """Where the first read since it was set to None began: the first header block of a member."""

    @property
    def position(self) -> int:
        """Bytes read and skipped so far."""

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns how many there were."""

    def keep(self) -> None:
        """The member whose header was just read will be copied."""

    def copy(self, passage: Passage, target: int) -> None:
        """Append the bytes of a wanted sample to a file descriptor."""


class Passages:
    """Iterates over the wanted samples of one shard.

    Args:
        carrier: of the shard.
        wanted: numbers of the samples that are yielded; all others are passed over.
        stand_ins: suffixes for which a link counts as a file of the sample (see `zscore.samples`).

    Raises:
        ShardFault: while iterating: the tar ends early, is damaged, or has a global header.
    """

    def __init__(self, carrier: Carrier, wanted: Collection[int], stand_ins: Collection[str]) -> None:
        self._carrier = carrier
        self._wanted = wanted
        self._stand_ins = stand_ins
        self.samples = 0
        """Begun so far; all of the shard's at the end."""

    def __iter__(self) -> Iterator[Passage]:
        """Yields each wanted sample once it is whole; copy it before the next is asked for."""
        carrier, wanted, stand_ins = self._carrier, self._wanted, self._stand_ins
        tar = TarReader(carrier)  # type: ignore[arg-type]  # reads, skips and knows its position: all that it uses
        run: Passage | None = None
        begun = -1
        while True:
            carrier.first = None
            more = tar.advance()
            start = carrier.position if carrier.first is None else carrier.first
            if begun >= 0:
                assert run is not None
                run.add(begun, start)
                begun = -1
            if not more:
                break
            if (split := split_name(tar.name)) is None or (kind := tar.kind) is _FOLDER:
                continue
            key, suffix = split
            if kind is not _FILE and kind is not _SPARSE and suffix not in stand_ins:
                continue
            if run is None or key != run.key or suffix in run.suffixes:
                if run is not None and run.index in wanted:
                    yield run
                run = Passage(self.samples, key)
                self.samples += 1
            run.suffixes.add(suffix)
            if run.index in wanted:
                carrier.keep()
                begun = start
        if run is not None and run.index in wanted:
            yield run


class LocalCarrier:
    """A tar on this machine."""

    def __init__(self, descriptor: int) -> None:
        self.first: int | None = None
        self.position = 0
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._window = b""
        self._base = 0

    def read(self, count: int) -> bytes:
        """See `Carrier`."""
        position = self.position
        if self.first is None:
            self.first = position
        at = position - self._base
        data = self._window[at : at + count] if at >= 0 else b""
        if len(data) < count:
            self._window = os.pread(self._descriptor, max(count, WINDOW), position)
            self._base = position
            data = self._window[:count]
        self.position = position + len(data)
        _refuse_global(data, self.position)
        return data

    def skip(self, count: int) -> int:
        """See `Carrier`."""
        passed = max(0, min(count, self._size - self.position))
        self.position += passed
        return passed

    def keep(self) -> None:
        """Nothing to do: the bytes stay where they are."""

    def copy(self, passage: Passage, target: int) -> None:
        """See `Carrier`."""
        for start, end in passage.spans:
            copy_range(self._descriptor, target, start, end - start)


class StreamCarrier:
    """A tar that can only be read forward."""

    def __init__(self, stream: Stream) -> None:
        self.first: int | None = None
        self._stream = stream
        self._kept = False
        self._header: list[bytes] = []
        self._aside = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, prefix="zscore-")  # noqa: SIM115

    @property
    def position(self) -> int:
        """See `Carrier`."""
        return self._stream.position

    def read(self, count: int) -> bytes:
        """See `Carrier`."""
        if self.first is None:
            self.first = self._stream.position
            self._kept = False
            self._header = []
        data = self._stream.read(count)
        self._header.append(data)
        _refuse_global(data, self._stream.position)
        return data

    def skip(self, count: int) -> int:
        """See `Carrier`."""
        if not self._kept:
            return self._stream.skip(count)
        left = count
        while left > 0 and (data := self._stream.read(min(left, CHUNK))):
            self._aside.write(data)
            left -= len(data)
        return count - left

    def keep(self) -> None:
        """See `Carrier`: the contents, which come next, are set aside behind the header."""
        self._kept = True
        self._aside.writelines(self._header)

    def copy(self, passage: Passage, target: int) -> None:
        """See `Carrier`: all that is set aside is this sample."""
        assert self._aside.tell() == passage.size, "set aside something else than the sample"
        self._aside.seek(0)
        while data := self._aside.read(CHUNK):
            write_all(target, data)
        self._aside.seek(0)
        self._aside.truncate()

    def close(self) -> None:
        """Drop what is set aside."""
        self._aside.close()


@contextmanager
def open_carrier(url: str) -> Iterator[Carrier]:
    """The carrier for a path or fsspec url.

    Raises:
        ShardFault: it can't be opened.
    """
    descriptor = None if is_remote(url) else _plain_tar(url)
    if descriptor is not None:
        try:
            yield LocalCarrier(descriptor)
        finally:
            os.close(descriptor)
        return
    with open_stream(url) as stream:
        carrier = StreamCarrier(stream)
        try:
            yield carrier
        finally:
            carrier.close()


def _plain_tar(path: str) -> int | None:
    """Descriptor of a regular file that isn't gzipped; None for others, and for those that can't be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # open_stream says why, in its words
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.pread(descriptor, 2, 0) != GZIP_MAGIC:
        return descriptor
    os.close(descriptor)
    return None


def _refuse_global(data: bytes, position: int) -> None:
    """A pax header for all that follows can't be passed on with a part of what follows."""
    if len(data) >= BLOCK and data[-356] == 0x67 and data[-255:-250] == b"ustar":  # type g, magic
        text = f"a global pax header at byte {position - BLOCK} holds for all samples behind it: pack the shard again"
        raise ShardFault(Status.BAD_SHARD, text)


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
            continue
        break
    if start < end:
        raise ShardFault(Status.TRUNCATED_SHARD, f"the shard was cut at byte {start} while it was read")
