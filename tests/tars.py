"""Tars for tests, put together byte by byte where no writer would make them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import fields
from pathlib import Path

from hypothesis import HealthCheck, settings

from zscore.records import Sample, ShardRef
from zscore.samples import ReadOptions, count_samples, read_samples

BLOCK = 512
END = bytes(2 * BLOCK)
USTAR = b"ustar\x0000"
GNU = b"ustar  \0"
V7 = bytes(8)
Files = list[tuple[str, bytes]]
# A busy machine is no failure.
FUZZ = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def header(
    name: bytes | str,
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    magic: bytes = USTAR,
    prefix: bytes = b"",
    checksum: bytes | None = None,
    patch: dict[int, bytes] | None = None,
) -> bytes:
    """A header block; `size` and `checksum` in octal unless they are given as the raw field."""
    block = bytearray(BLOCK)
    name = name.encode() if isinstance(name, str) else name
    block[: len(name)] = name
    block[100:124] = b"0000644\x000000000\x000000000\x00"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = magic
    block[345 : 345 + len(prefix)] = prefix
    for at, data in (patch or {}).items():
        block[at : at + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = checksum or b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes | str, data: bytes = b"", kind: bytes = b"0", **more) -> bytes:
    return header(name, len(data), kind, **more) + padded(data)


def pax(records: dict[str, bytes | str], kind: bytes = b"x") -> bytes:
    data = b""
    for keyword, value in records.items():
        body = b" %s=%s\n" % (keyword.encode(), value.encode() if isinstance(value, str) else value)
        length = len(body) + 1
        while length != len(body) + len(str(length)):
            length = len(body) + len(str(length))
        data += b"%d%s" % (length, body)
    return member("pax", data, kind)


def base256(number: int, width: int = 12) -> bytes:
    return bytes([0x80]) + number.to_bytes(width - 1, "big")


def text(prompt: object, **more: object) -> bytes:
    return json.dumps({"prompt": prompt, **more}).encode()


def pair(key: str, image: bytes = b"picture", prompt: str = "a cat") -> bytes:
    return member(f"{key}.jpg", image) + member(f"{key}.json", text(prompt))


def packed(files: Files, format: int = tarfile.GNU_FORMAT, mode: str = "w") -> bytes:  # noqa: A002
    """What Python's tarfile makes of `files`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shard_at(path: Path | str) -> ShardRef:
    return ShardRef(str(path), "shard.tar", -1, "")


def read(data: bytes | Path, folder: Path | None = None, **options) -> list[Sample]:
    """Reads all rows, and holds what is true of any shard."""
    if isinstance(data, bytes):
        assert folder is not None
        path = folder / "shard.tar"
        path.write_bytes(data)
    else:
        path = data
    settings = ReadOptions(**{"retry_wait": 0.001, **options})
    rows = list(read_samples(shard_at(path), settings))
    check_rows(rows)
    assert count_samples(shard_at(path), settings) == len(rows)
    return rows


def check_rows(rows: list[Sample]) -> None:
    for index, row in enumerate(rows):
        assert row.index == index
        assert row.shard == "shard.tar"
        for field in fields(row):
            value = getattr(row, field.name)
            if isinstance(value, str):
                value.encode()  # what can't be written to parquet
        if row.failure is None:
            assert row.image
            assert row.prompt
            assert row.group
        else:
            assert not row.image
            assert row.failure.error
            assert row.failure.error.isprintable(), row.failure.error
            assert len(row.failure.error) < 600
        assert not row.failure or row.failure.status != "ok"


def statuses(rows: list[Sample]) -> list[str]:
    return [str(row.failure.status) if row.failure else "ok" for row in rows]


def keys(rows: list[Sample]) -> list[str]:
    return [row.key for row in rows]
