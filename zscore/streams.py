"""One shard as a stream: a window over its source, inflated on the way where the first two bytes say gzip.

What it holds in memory is one window (64 KiB of a local shard, 8 MiB of a remote one) and what is asked of it,
whatever the size of the shard.
"""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zscore.records import Status
from zscore.stores import PatientSource, ShardFault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zscore.stores import Source

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WBITS = 31
_CHUNK = 64 << 10
_LARGE = 32 << 10


class Stream:
    """Reads and skips forward through a source."""

    def __init__(self, source: Source) -> None:
        self.size = source.size
        """Bytes in all, None where only reading to the end tells."""
        self._source = source
        self._window = b""
        self._base = 0
        self._at = 0

    @property
    def position(self) -> int:
        """Bytes read and skipped so far."""
        return self._base + self._at

    def read(self, count: int) -> bytes:
        """Returns the next `count` bytes, fewer only at the end."""
        end = self._at + count
        if end <= len(self._window):
            data = self._window[self._at : end]
            self._at = end
            return data
        if self.size is not None:
            # Memory is only taken for bytes that exist, whatever a header says.
            count = max(0, min(count, self.size - self.position))
        return self._read_past_window(count)

    def read_buffered(self, gap: int, count: int) -> bytes:
        """Passes `gap` bytes and returns the next `count` if the window holds them all; else does nothing."""
        start = self._at + gap
        end = start + count
        if end > len(self._window):
            return b""
        self._at = end
        return self._window[start:end]

    def skip(self, count: int) -> int:
        """Passes over `count` bytes and returns how many there were."""
        start = self.position
        if self.size is not None:
            self._jump(min(start + count, max(start, self.size)))
            return self.position - start
        left = count
        while left > 0 and (data := self.read(min(left, _CHUNK))):
            left -= len(data)
        return self.position - start

    def peek(self, count: int) -> bytes:
        """Returns the first bytes without passing them."""
        assert self.position == 0, "only the beginning is looked at twice"
        while len(self._window) < count and (data := self._source.read_at(len(self._window), self._source.window)):
            self._window += data
        return self._window[:count]

    def read_some(self) -> bytes:
        """Returns whatever comes next, none at the end."""
        if self._at >= len(self._window):
            self._refill()
        data = self._window[self._at : self._at + _CHUNK]
        self._at += len(data)
        return data

    def _read_past_window(self, count: int) -> bytes:
        if self._source.rereads and count >= _LARGE:
            # A picture: one copy straight from the source is faster than joining it to what the window holds.
            data = self._source.read_at(self.position, count)
            self._jump(self.position + len(data))
            if len(data) == count or not data:
                return data
            return data + self._read_past_window(count - len(data))
        pieces = []
        while count > 0:
            if self._at >= len(self._window):
                self._refill(count)
                if not self._window:
                    break
            piece = self._window[self._at : self._at + count]
            self._at += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _jump(self, position: int) -> None:
        if position <= self._base + len(self._window):
            self._at = position - self._base
        else:
            self._window, self._base, self._at = b"", position, 0

    def _refill(self, count: int = 0) -> None:
        position = self.position
        self._window = self._source.read_at(position, max(count, self._source.window))
        self._base, self._at = position, 0


class GzipSource:
    """The inflated bytes of a gzipped stream, its members one after the other; goes forward only.

    Raises:
        ShardFault: truncated_shard where the stream ends early, bad_shard where it is damaged. Everything inflated
            before that is returned first.
    """

    size: int | None = None
    window = _CHUNK
    rereads = False

    def __init__(self, packed: Stream) -> None:
        self._packed = packed
        self._inflater = zlib.decompressobj(_GZIP_WBITS)
        self._input = b""
        self._at = 0
        self._ended = False
        self._fault: ShardFault | None = None

    def read_at(self, offset: int, count: int) -> bytes:
        """See `Source`."""
        assert offset >= self._at, "a gzip stream can't go back"
        while offset > self._at and self._inflate(min(offset - self._at, _CHUNK)):
            pass
        return self._inflate(count)

    def close(self) -> None:
        """Nothing of its own is open."""

    def _inflate(self, count: int) -> bytes:
        while not self._ended:
            if self._fault is not None:
                raise self._fault
            if self._inflater.eof:
                self._next_member()
                continue
            if not self._input:
                self._input = self._packed.read_some()
            if not self._input:
                text = f"the gzip stream ends early, at byte {self._packed.position}"
                raise ShardFault(Status.TRUNCATED_SHARD, text)
            if data := self._inflate_input(count):
                self._at += len(data)
                return data
        return b""

    def _inflate_input(self, count: int) -> bytes:
        before = self._inflater.copy()
        try:
            data = self._inflater.decompress(self._input, count)
        except zlib.error as error:
            text = f"the gzip stream is damaged before byte {self._packed.position}: {error}"
            self._fault = ShardFault(Status.BAD_SHARD, text)
            return _inflate_to_damage(before, self._input)
        self._input = self._inflater.unconsumed_tail
        return data

    def _next_member(self) -> None:
        rest = self._inflater.unused_data
        while len(rest) < len(_GZIP_MAGIC) and (data := self._packed.read_some()):
            rest += data
        # Like gzip itself: padding and other garbage behind the last member is no part of it.
        self._ended = not rest.startswith(_GZIP_MAGIC)
        self._inflater = zlib.decompressobj(_GZIP_WBITS)
        self._input = rest


def _inflate_to_damage(inflater: zlib._Decompress, data: bytes) -> bytes:
    """Returns what comes before the damage, which zlib throws away where it finds both in one call."""
    inflated = bytearray()
    try:
        for at in range(len(data)):
            inflated += inflater.decompress(data[at : at + 1])
    except zlib.error:
        return bytes(inflated)
    raise AssertionError("the damage is found again")


@contextmanager
def open_stream(url: str, *, attempts: int = 3, wait: float = 0.5) -> Iterator[Stream]:
    """Opens a shard, gzipped or not, by what it holds and not by how it is called.

    Args:
        url: Path or fsspec url.
        attempts: How often an open or a read is tried in all.
        wait: Seconds before the second attempt; doubles from there.

    Yields:
        The stream of the tar's bytes.

    Raises:
        ShardFault: While opening, and from then on in the stream's methods.
    """
    source = PatientSource(url, attempts=attempts, wait=wait)
    try:
        stream = Stream(source)
        is_gzip = stream.peek(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        yield Stream(GzipSource(stream)) if is_gzip else stream
    finally:
        source.close()
