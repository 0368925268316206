"""Members of a tar, read forward and trusted in nothing: names are data, sizes are claims, only files have contents.

Reads v7, ustar, GNU and pax. Like GNU tar and Python's tarfile it stops at the first block of zeros; unlike them it
says so where another archive follows. Nothing is unpacked: no link is followed, no hole of a sparse member is filled.

Block layout (512 bytes, offsets in octal text or base 256): name 0:100, size 124:136, checksum 148:156,
type 156, magic 257:265, GNU sparse flag and real size 482:495, ustar prefix 345:500.
"""

from __future__ import annotations

import struct
import zlib
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn

from zscore.records import Status
from zscore.stores import ShardFault

if TYPE_CHECKING:
    from zscore.streams import Stream

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENSION = 1 << 20
"""Of a long name or a pax header: no file system has longer paths."""
_TAIL = 1 << 20
"""How far behind the end marker another archive is looked for; writers pad by 10 KiB as a rule."""
_ADLER_MODULUS = 65521

_MAX_SUMS = 1 << 16

_HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
_EXTENSIONS = frozenset({b"L", b"K", b"x", b"X", b"g"})
"""Long name, long link, pax (and Solaris'), pax for all that follows."""

_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer and not the shard itself: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive: pack it as .tar"),
    (b"BZh", "bzip2-compressed: pack it as .tar or .tar.gz"),
    (b"\xfd7zXZ", "xz-compressed: pack it as .tar or .tar.gz"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: pack it as .tar or .tar.gz"),
    (b"\x1f\x8b", "gzipped twice: unpack it once"),
    (b"<", "HTML or XML, perhaps an error page that was saved in its place: download it again"),
    (b"{", "JSON, perhaps an error message that was saved in its place: download it again"),
)


class Kind(StrEnum):
    """What a member is."""

    FILE = "a file"
    LINK = "a link"
    DEVICE = "a device"
    FIFO = "a fifo"
    FOLDER = "a folder"
    SPARSE = "a sparse file"
    OTHER = "of an unknown type"


_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), Kind.FILE),
    **dict.fromkeys((b"1", b"2"), Kind.LINK),
    **dict.fromkeys((b"3", b"4"), Kind.DEVICE),
    b"5": Kind.FOLDER,
    b"6": Kind.FIFO,
    b"S": Kind.SPARSE,
}
_FILE = Kind.FILE  # an enum's members are slow to look up
_OTHER = Kind.OTHER
# The size field of these says something else than how many bytes follow.
_EMPTY = frozenset({Kind.LINK, Kind.DEVICE, Kind.FIFO, Kind.FOLDER})


class TarReader:
    """A cursor over the members of one tar: `advance` moves it, `read` gives the contents of where it stands.

    No object is made for a member: on 100,000 tiny ones that is a fifth of the time.

    Raises:
        ShardFault: truncated_shard, bad_shard, or unreadable_shard from the stream, with the byte offset.
    """

    def __init__(self, stream: Stream) -> None:
        self.name = ""
        """Of the member. Valid UTF-8; bytes that aren't stand as \\xNN."""
        self.kind = Kind.OTHER
        """What the member is."""
        self.size = 0
        """Bytes of its contents; of a sparse file with its holes filled."""
        self._stream = stream
        self._left = 0
        """Bytes until the next header."""
        self._globals: dict[bytes, bytes] = {}

    def advance(self) -> bool:
        """Moves to the next member and says whether there is one."""
        extra: dict[bytes, bytes] | None = None
        while (block := self._next_block()) and block != _ZEROS:
            name, type_, size = _parse(block, self._stream)
            if type_ in _EXTENSIONS:
                extra = extra or {}
                self._extend(type_, size, extra)
            elif extra or self._globals:
                self._stand_on_extended(name, type_, size, block, {**self._globals, **(extra or {})})
                return True
            else:
                self._stand_on(name, type_, size, block)
                return True
        if extra:
            text = f"the shard ends at byte {self._stream.position}, between an extension header and its member"
            raise ShardFault(Status.TRUNCATED_SHARD, text)
        return False

    def read(self) -> bytes:
        """Returns the contents of the member, which must be a file; at most once."""
        size = self.size
        data = self._stream.read(size)
        if len(data) < size:
            self._cut(size, len(data))
        self._left -= size
        return data

    def check_tail(self) -> None:
        """Looks behind the end marker, once the iteration is through.

        Raises:
            ShardFault: Another archive follows, whose samples a tar reader never sees; or the gzip stream is damaged.
        """
        first = self._stream.position
        while len(block := self._stream.read(BLOCK)) == BLOCK:
            if self._stream.position - first > _TAIL:
                text = f"more than {_TAIL} bytes follow the end marker at byte {first}; they aren't read"
                raise ShardFault(Status.BAD_SHARD, text)
            if block != _ZEROS and zlib.adler32(block) & 0xFFFF == _SUMS[block[148:156]]:
                text = (
                    f"another archive begins at byte {self._stream.position - BLOCK}, behind the end marker, where tar "
                    "readers stop: join tars with `tar --concatenate` and not with cat"
                )
                raise ShardFault(Status.BAD_SHARD, text)

    def _next_block(self) -> bytes:
        """Returns the next header, or nothing at the end."""
        left, self._left = self._left, 0
        block = self._stream.read_buffered(left, BLOCK)
        if not block:
            passed = self._stream.skip(left)
            if passed < left:
                self._cut(left, passed)
            block = self._stream.read(BLOCK)
        return block if len(block) == BLOCK else self._last_block(block)

    def _last_block(self, block: bytes) -> bytes:
        """Tells the end of a tar, with or without its marker, from a cut in the middle of it."""
        offset = self._stream.position - len(block)
        if not any(block) and (block or offset):
            return b""
        if not block:
            text = "the shard is empty (0 bytes; even a tar of nothing has an end marker)"
            raise ShardFault(Status.TRUNCATED_SHARD, text)
        if offset == 0:
            _check_signature(block)
        text = f"the shard ends inside a header: {len(block)} of {BLOCK} bytes from byte {offset} on"
        raise ShardFault(Status.TRUNCATED_SHARD, text, between_members=True)

    def _cut(self, size: int, got: int) -> NoReturn:
        start = self._stream.position - got
        text = f"the shard ends inside {shown(self.name)}: {size} bytes from byte {start} on, of which {got} are there"
        raise ShardFault(Status.TRUNCATED_SHARD, text)

    def _stand_on(self, name: bytes, type_: bytes, size: int, block: bytes) -> None:
        self.name = name.decode("utf-8", "backslashreplace")
        self.kind = kind = _KINDS.get(type_, _OTHER)
        if kind is not _FILE:
            if kind in _EMPTY:
                size = 0
            elif kind is Kind.SPARSE:
                self._pass_sparse_map(block)
                self.size = max(0, _number(block[483:495]))
                self._left = size + -size % BLOCK
                return
        elif type_ == b"\0" and name.endswith(b"/"):
            self.kind = Kind.FOLDER  # v7 has no type for it
        self.size = size
        self._left = size + -size % BLOCK

    def _stand_on_extended(self, name: bytes, type_: bytes, size: int, block: bytes, extra: dict[bytes, bytes]) -> None:
        if b"size" in extra:
            size = _digits(extra[b"size"])
            if size < 0:
                text = f"the pax header before byte {self._stream.position - BLOCK} says a size that is no number"
                raise ShardFault(Status.BAD_SHARD, text)
        self._stand_on(extra.get(b"GNU.sparse.name") or extra.get(b"path") or name, type_, size, block)
        if self.kind is _FILE and any(keyword.startswith(b"GNU.sparse.") for keyword in extra):
            self.kind = Kind.SPARSE
            self.size = max(0, _digits(extra.get(b"GNU.sparse.realsize") or extra.get(b"GNU.sparse.size") or b"0"))

    def _pass_sparse_map(self, block: bytes) -> None:
        more = block[482]
        while more:
            block = self._stream.read(BLOCK)
            if len(block) < BLOCK:
                self._cut(BLOCK, len(block))
            more = block[504]

    def _extend(self, type_: bytes, size: int, extra: dict[bytes, bytes]) -> None:
        """Reads what an extension header says of the next member; of two that say the same, the first counts."""
        offset = self._stream.position - BLOCK
        if size > _MAX_EXTENSION:
            text = f"an extension header of {size} bytes at byte {offset}; the limit is {_MAX_EXTENSION}"
            raise ShardFault(Status.BAD_SHARD, text)
        self.name = "an extension header"
        self.size = size
        self._left = size + -size % BLOCK
        data = self.read()
        if type_ == b"L":
            extra.setdefault(b"path", data.partition(b"\0")[0])
        elif type_ == b"K":
            extra.setdefault(b"linkpath", b"")
        elif type_ == b"g":
            self._globals.update(_pax_records(data, offset))
        else:
            for keyword, value in _pax_records(data, offset).items():
                extra.setdefault(keyword, value)


def _check_signature(block: bytes) -> None:
    for signature, what in _SIGNATURES:
        if block.lstrip().startswith(signature):
            raise ShardFault(Status.BAD_SHARD, f"not a tar but {what}")


def _parse(block: bytes, stream: Stream) -> tuple[bytes, bytes, int]:
    """Returns name, type and size of a header."""
    name, size_field, checksum, type_, magic, prefix = _HEADER.unpack(block)
    if zlib.adler32(block) & 0xFFFF != _SUMS[checksum] and not _signed_checksum_holds(block):
        offset = stream.position - BLOCK
        if offset == 0:
            _check_signature(block)
            raise ShardFault(Status.BAD_SHARD, "not a tar: no header at byte 0")
        text = f"the shard is damaged: no header at byte {offset}"
        raise ShardFault(Status.BAD_SHARD, text, between_members=True)
    name = name.partition(b"\0")[0]
    # GNU tar keeps times where ustar has its prefix, so the magic decides.
    if prefix[0] and magic == b"ustar\0":
        name = prefix.partition(b"\0")[0] + b"/" + name
    size = _number(size_field)
    if size < 0:
        text = f"the header at byte {stream.position - BLOCK} says a size that is no number, or negative"
        raise ShardFault(Status.BAD_SHARD, text)
    return name, type_, size


class _Sums(dict[bytes, int]):
    """The low half of a header's Adler-32 by its checksum field; -1 where the field is no number.

    A tar's checksum is the sum of all bytes with its own field counted as blanks, and Adler-32's low half is 1 plus
    the sum of all bytes, modulo 65521: one call into zlib instead of adding up 512 bytes in Python (20 times faster).
    """

    def __missing__(self, field: bytes) -> int:
        checksum = _number(field)
        if len(self) > _MAX_SUMS:
            self.clear()
        self[field] = value = -1 if checksum < 0 else (checksum - 8 * ord(" ") + sum(field) + 1) % _ADLER_MODULUS
        return value


_SUMS = _Sums()


def _signed_checksum_holds(block: bytes) -> bool:
    # Some very old tars added signed bytes.
    total = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:])
    return max(block) > 127 and _number(block[148:156]) == total + 8 * ord(" ")


def _number(field: bytes) -> int:
    """Reads octal text, or base 256 where the top bit is set; -1 where it is neither."""
    text = field[:-1]
    if field[-1] or not text.isdigit():
        if field[0] & 0x80:
            bits = 8 * len(field)
            return -1 if field[0] == 0xFF else int.from_bytes(field, "big") - (1 << bits - 1)
        text = field.partition(b"\0")[0].strip()
        if not text:
            return 0
        if not text.isdigit():
            return -1
    try:
        return int(text, 8)
    except ValueError:  # an 8 or a 9
        return -1


def _digits(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) <= 20 else -1


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    """Parses records of the form `LENGTH KEYWORD=VALUE` and a line feed, the length counting itself and it."""
    records = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        end = at + _digits(data[at:space]) if space > 0 else 0
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not at < end <= len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise ShardFault(Status.BAD_SHARD, f"the pax header at byte {offset} is malformed")
        records[keyword] = value.rstrip(b"/") if keyword == b"path" else value
        at = end
    return records


def shown(name: str) -> str:
    """A member's name as it may stand in an error of one line."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 80 else f"{text[:79]}…"
