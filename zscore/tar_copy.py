"""Passes some samples of a tar on as they lie: header blocks, long-name and pax blocks, contents and padding, raw.

    shard → Carrier → TarReader (`zscore.tar`) → `zscore.passages` → the bytes of each wanted sample, into a descriptor

A carrier feeds the tar reader and notices where members begin. That of a local tar reads headers only and lets the
kernel copy the rest; anything else (remote, gzipped) goes by as a stream, and what is wanted of it is set aside.
"""

from __future__ import annotations

import os
import stat
import struct
import tempfile
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from zscore.file_copy import CHUNK, copy_range, write_all
from zscore.records import Status
from zscore.stores import ShardFault, is_remote
from zscore.streams import open_stream
from zscore.tar import BLOCK, Kind, TarReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zscore.passages import Passage
    from zscore.streams import Stream

    Member = tuple[int, str, Kind]

# Headers of small neighbours come with one read; a picture's header comes alone, so more would be read for nothing.
WINDOW = 4096
# A wanted sample of a stream waits here until it is whole.
SPOOL_BYTES = 64 << 20
# Name, size and what ends it, checksum, type, first byte of the ustar prefix.
_HEADER = struct.Struct("100s24x11sc12x8sc188xc")
GZIP_MAGIC = b"\x1f\x8b"
_FILE, _FOLDER = Kind.FILE, Kind.FOLDER


class Reading(Protocol):
    """What the tar reader reads from, and where its members begin."""

    first: int | None
    """Where the first read since it was set to None began: the first header block of a member."""

    @property
    def position(self) -> int:
        """Bytes read and skipped so far."""

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""

    def read_buffered(self, gap: int, count: int) -> bytes:
        """Like skipping `gap` and reading `count`, where both are at hand; else nothing, and nothing is passed."""

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns how many there were."""


class Carrier(Protocol):
    """Walks through a shard, and passes on what is kept of it."""

    can_wait: bool
    """Whether a sample can still be copied when the walk has gone on."""

    def members(self) -> Iterator[Member]:
        """Start, name and kind of every member, and at last of a nameless one where the last one ends."""

    def keep(self) -> None:
        """The member that was given last will be copied."""

    def copy(self, passage: Passage, target: int) -> None:
        """Append the bytes of a wanted sample to a file descriptor."""


def read_members(carrier: Reading) -> Iterator[Member]:
    """The members that a tar reader finds, from where the carrier stands to the end of the archive.

    Raises:
        ShardFault: the tar ends early, is damaged, or has a global header.
    """
    tar = TarReader(carrier)  # type: ignore[arg-type]  # reads, skips and knows its position: all that it uses
    while True:
        carrier.first = None
        try:
            more = tar.advance()
        except ShardFault as fault:
            if fault.between_members and carrier.first is not None:
                yield carrier.first, "", _FOLDER  # where the last member ends, which is whole
            raise
        start = carrier.position if carrier.first is None else carrier.first
        if not more:
            # The end of the last member; no sample has this name.
            yield start, "", _FOLDER
            return
        yield start, tar.name, tar.kind


class LocalCarrier:
    """A tar on this machine; everyday headers are read without the tar reader, in a third of its time."""

    can_wait = True

    def __init__(self, descriptor: int) -> None:
        self.first: int | None = None
        self.position = 0
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def members(self) -> Iterator[Member]:
        """See `Carrier`."""
        descriptor, size = self._descriptor, self._size
        window, base, position = os.pread(descriptor, WINDOW, 0), 0, 0
        last = len(window) - BLOCK  # where a header may begin in the window
        while True:
            at = position - base
            if at > last:
                window, base, at = os.pread(descriptor, WINDOW, position), position, 0
                last = len(window) - BLOCK
                if last < 0:
                    break
            # The common case of _plain_member, in line: a call would cost a third more.
            name, length, stop, checksum, kind, prefix = _HEADER.unpack_from(window, at)
            if kind == b"0" and prefix == stop == b"\0" and length.isdigit() and _sum_of(window, at) == _SUMS[checksum]:
                try:
                    end = position + BLOCK + (int(length, 8) + BLOCK - 1 & -BLOCK)
                except ValueError:  # an 8 or a 9
                    break
            else:
                plain = _plain_member(window, at)
                if plain is None and at:  # perhaps the window just ends too early
                    window, base, last = os.pread(descriptor, WINDOW, position), position, -1
                    plain = _plain_member(window, 0)
                if plain is None:
                    break
                end, name = base + plain[0], plain[1]
            if end > size:
                break
            yield position, name.partition(b"\0")[0].decode("utf-8", "backslashreplace"), _FILE
            position = end
        # The end, a link, a long name, a cut, damage: the tar reader knows them all, from here on.
        self.position = position
        yield from read_members(self)

    def read(self, count: int) -> bytes:
        """See `Reading`."""
        if self.first is None:
            self.first = self.position
        data = os.pread(self._descriptor, count, self.position)
        self.position += len(data)
        _refuse_global(data, self.position)
        return data

    def read_buffered(self, gap: int, count: int) -> bytes:
        """See `Reading`."""
        del gap, count
        return b""

    def skip(self, count: int) -> int:
        """See `Reading`."""
        passed = max(0, min(count, self._size - self.position))
        self.position += passed
        return passed

    def keep(self) -> None:
        """Nothing to do: the bytes stay where they are."""

    def copy(self, passage: Passage, target: int) -> None:
        """See `Carrier`."""
        for start, end in passage.spans:
            copy_range(self._descriptor, target, start, end - start)


def _sum_of(window: bytes, at: int) -> int:
    return zlib.adler32(window[at : at + BLOCK]) & 0xFFFF


def _plain_member(window: bytes, at: int) -> tuple[int, bytes] | None:
    """End (in the window's offsets) and name field of a member with an everyday header; None for anything else.

    Everyday: a file by ustar or GNU tar with a short name, perhaps behind a pax header that says neither its name nor
    its size, as tarfile (and so webdataset) writes one for times with fractions.
    """
    if at + BLOCK > len(window):
        return None
    name, size, stop, checksum, kind, prefix = _HEADER.unpack_from(window, at)
    length = _octal(size) if stop in {b"\0", b" "} else -1  # twelve digits are one number
    if length < 0 or _sum_of(window, at) != _SUMS[checksum]:
        return None
    end = at + BLOCK + length + -length % BLOCK
    if kind == b"x":
        said = window[at + BLOCK : end]
        is_plain = len(said) == end - at - BLOCK and not any(word in said for word in (b"path=", b"size=", b"GNU."))
        return _plain_member(window, end) if is_plain else None
    if kind != b"0" or prefix != b"\0":
        return None
    return end, name


def _octal(digits: bytes) -> int:
    """-1 for what isn't a number, as with an 8 or a 9 in it."""
    try:
        return int(digits, 8) if digits.isdigit() else -1
    except ValueError:
        return -1


class _Sums(dict[bytes, int]):
    """Low half of a header's Adler-32 (1 plus the sum of its bytes, modulo 65521) by its checksum field.

    The field holds that sum with itself counted as blanks; -1, which no header has, where it isn't written as usual.
    """

    def __missing__(self, field: bytes) -> int:
        said = _octal(field[:6]) if field[6] == 0 else -1
        self[field] = value = (said - 8 * 32 + sum(field) + 1) % 65521 if said >= 0 else -1
        if len(self) > 1 << 16:
            self.clear()
        return value


_SUMS = _Sums()


class StreamCarrier:
    """A tar that can only be read forward."""

    can_wait = False

    def __init__(self, stream: Stream) -> None:
        self.first: int | None = None
        self._stream = stream
        self._kept = False
        self._header: list[bytes] = []
        self._aside = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES, prefix="zscore-")  # noqa: SIM115

    def members(self) -> Iterator[Member]:
        """See `Carrier`."""
        return read_members(self)

    @property
    def position(self) -> int:
        """See `Reading`."""
        return self._stream.position

    def read(self, count: int) -> bytes:
        """See `Reading`."""
        if self.first is None:
            self.first = self._stream.position
            self._kept = False
            self._header = []
        data = self._stream.read(count)
        self._header.append(data)
        _refuse_global(data, self._stream.position)
        return data

    def read_buffered(self, gap: int, count: int) -> bytes:
        """See `Reading`."""
        del gap, count
        return b""

    def skip(self, count: int) -> int:
        """See `Reading`."""
        if self.first is not None:
            return len(self.read(count))  # padding between a member's own headers
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
