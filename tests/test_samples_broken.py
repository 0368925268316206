"""Shards that break off, are damaged, or aren't shards: what was before is kept, and one row says what happened."""

from __future__ import annotations

import gzip
import os
import random
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import (
    BLOCK,
    END,
    FUZZ,
    GNU,
    base256,
    check_rows,
    header,
    keys,
    member,
    packed,
    pair,
    pax,
    read,
    shard_at,
    statuses,
    text,
)
from zscore.samples import count_samples, read_samples

THREE = [(f"{key}.{suffix}", data) for key in "abc" for suffix, data in (("jpg", b"1" * 700), ("json", text(key)))]
BROKEN = {"truncated_shard", "bad_shard"}


def test_cut_inside_a_picture(tmp_path):
    rows = read(pair("a") + pair("b", b"1" * 5000)[:3000], tmp_path)
    assert keys(rows) == ["a", "b"]
    assert statuses(rows) == ["ok", "truncated_shard"]
    assert "b.jpg" in rows[1].failure.error
    assert "byte" in rows[1].failure.error


def test_cut_inside_a_header(tmp_path):
    rows = read(pair("a") + pair("b") + member("c.jpg")[:200], tmp_path)
    assert keys(rows) == ["a", "b", ""]
    assert statuses(rows) == ["ok", "ok", "truncated_shard"]
    assert f"byte {len(pair('a') + pair('b'))}" in rows[2].failure.error


def test_a_sample_whose_text_may_have_been_behind_the_cut_is_not_given_as_whole(tmp_path):
    rows = read(pair("a") + member("b.jpg", b"1" * 700)[: BLOCK + 700], tmp_path)
    assert keys(rows) == ["a", "b"]
    assert statuses(rows) == ["ok", "truncated_shard"]


def test_cut_between_members_without_end_marker_is_an_end(tmp_path):
    assert statuses(read(pair("a") + pair("b"), tmp_path)) == ["ok", "ok"]


def test_a_cut_in_the_first_header(tmp_path):
    rows = read(pair("a")[:100], tmp_path)
    assert [(row.key, row.index, str(row.failure.status)) for row in rows] == [("", 0, "truncated_shard")]


def test_no_bytes_and_no_samples(tmp_path):
    assert statuses(read(b"", tmp_path)) == ["truncated_shard"]
    assert read(END, tmp_path) == []
    assert read(packed([]), tmp_path) == []
    assert read(gzip.compress(packed([])), tmp_path) == []
    assert statuses(read(gzip.compress(b""), tmp_path)) == ["truncated_shard"]


def test_garbage(tmp_path):
    rows = read(random.Random(0).randbytes(20_000), tmp_path)
    assert [(row.key, row.index, str(row.failure.status)) for row in rows] == [("", 0, "bad_shard")]


def test_damage_in_the_middle(tmp_path):
    start = pair("a") + pair("b")
    rows = read(start + bytes(range(256)) * 2 + pair("c") + END, tmp_path)
    assert keys(rows) == ["a", "b", ""]
    assert statuses(rows) == ["ok", "ok", "bad_shard"]
    assert f"byte {len(start)}" in rows[2].failure.error


def test_a_second_archive_is_a_row_behind_whole_samples(tmp_path):
    rows = read(packed(THREE) + packed(THREE), tmp_path)
    assert keys(rows) == ["a", "b", "c", ""]
    assert statuses(rows) == ["ok", "ok", "ok", "bad_shard"]


@pytest.mark.parametrize("level", [0, 1, 9])
def test_gzipped_shards(tmp_path, level):
    data = packed(THREE)
    plain = read(data, tmp_path)
    assert read(gzip.compress(data, level), tmp_path) == plain
    assert read(gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + bytes(100), tmp_path) == plain
    assert read(gzip.compress(data) + b"garbage that gzip ignores", tmp_path) == plain


def test_a_gzip_stream_with_a_wrong_checksum(tmp_path):
    data = bytearray(gzip.compress(packed(THREE)))
    data[-6] ^= 1
    rows = read(bytes(data), tmp_path)
    assert statuses(rows) == ["ok", "ok", "ok", "bad_shard"]
    assert "gzip stream is damaged" in rows[-1].failure.error


def test_a_gzip_stream_that_is_damaged_in_the_middle(tmp_path):
    files = [
        (f"{i}.{suffix}", random.Random(i).randbytes(3000).hex().encode())
        for i in range(40)
        for suffix in ("jpg", "txt")
    ]
    data = bytearray(gzip.compress(packed(files)))
    whole = read(bytes(data), tmp_path)
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    rows = read(bytes(data), tmp_path)
    before = [row for row in rows if row.failure is None]
    assert len(before) >= 17  # 20 lie before the damage; deflate's blocks and the sample in hand cost some
    assert before[:17] == whole[:17]
    assert str(rows[-1].failure.status) in BROKEN


def test_gzipped_twice(tmp_path):
    rows = read(gzip.compress(gzip.compress(packed(THREE))), tmp_path)
    assert "twice" in rows[0].failure.error


def assert_prefix(rows, whole):
    """All rows but the last are of the whole shard; the last may be a broken one, or one that lost its text."""
    check_rows(rows)
    full = sum(1 for row in rows if row.failure is None)
    assert rows[:full] == whole[:full]
    assert len(rows) <= full + 1
    for row in rows[full:]:
        assert row.failure.status in BROKEN | {"missing_prompt"}


@pytest.mark.parametrize(("layout", "step"), [(tarfile.GNU_FORMAT, 1), (tarfile.PAX_FORMAT, 5)])
def test_every_cut_of_a_tar(tmp_path, layout, step):
    long = "ü" * 60 + "/b"
    files = [("a.jpg", b"1" * 600), ("a.json", text("a")), (f"{long}.jpg", b"2"), (f"{long}.json", text("b"))]
    data = packed(files, layout).rstrip(b"\0") + END
    first = len(packed(files[:2], layout).rstrip(b"\0"))
    whole = read(data, tmp_path)
    assert statuses(whole) == ["ok"] * 2
    path = tmp_path / "shard.tar"
    for end in range(len(data), -1, -step):
        os.truncate(path, end)
        rows = list(read_samples(shard_at(path)))
        assert_prefix(rows, whole)
        ok = statuses(rows).count("ok")
        assert ok >= (end >= first + 6 * BLOCK) + (end == len(data))  # the next name is known after so many blocks
        assert ok <= (end >= first) + (end >= len(data) - len(END))
        if end % 50 == 0:
            assert count_samples(shard_at(path)) == len(rows)


def test_every_cut_of_a_gzipped_tar(tmp_path):
    data = gzip.compress(packed(THREE))
    whole = read(data, tmp_path)
    path = tmp_path / "shard.tar"
    for end in range(len(data) - 1, -1, -1):
        os.truncate(path, end)
        rows = list(read_samples(shard_at(path)))
        assert_prefix(rows, whole)
        assert str(rows[-1].failure.status) in BROKEN
        assert count_samples(shard_at(path)) == len(rows)


def interesting_tar():
    sparse = (
        header("s.jpg", 3, b"S", magic=GNU, patch={482: b"\1", 483: base256(10 << 30)}) + bytes(BLOCK) + bytes(BLOCK)
    )
    long_name = member("@", b"l" * 300 + b".jpg\0", b"L") + member("cut", b"1")
    links = header("l.jpg", 0, b"2") + header("h.txt", 0, b"1")
    named = (
        pax({"path": "p.jpg", "size": "4"})
        + member("x", b"1234")
        + member("p.txt.gz", gzip.compress(b"packed", mtime=0))
    )
    return pair("a") + sparse + long_name + links + named + pair("b") + END


@settings(FUZZ, max_examples=150)
@given(st.data())
def test_flipped_bytes_never_raise(data):
    tar = bytearray(interesting_tar())
    for _ in range(data.draw(st.integers(1, 8))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # the checksum holds, so that what stands behind it is reached
        for at in range(0, len(tar), BLOCK):
            if tar[at + 257 : at + 262] == b"ustar":
                tar[at + 148 : at + 156] = b" " * 8
                tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + BLOCK])
    packing = data.draw(st.sampled_from(["plain", "gzip", "damaged gzip"]))
    if packing != "plain":
        tar = bytearray(gzip.compress(bytes(tar), 1, mtime=0))
        if packing == "damaged gzip":
            tar[data.draw(st.integers(0, len(tar) - 1))] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        read(bytes(tar), Path(folder))


@settings(FUZZ, max_examples=100)
@given(st.binary(max_size=3000), st.booleans())
def test_noise_never_raises(noise, behind):
    with tempfile.TemporaryDirectory() as folder:
        read((pair("a") if behind else b"") + noise, Path(folder))


name_part = st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1, max_size=40).filter(
    lambda text: not text.startswith("__")
)


@settings(FUZZ, max_examples=60)
@given(
    st.lists(
        st.tuples(name_part, st.binary(min_size=1, max_size=2000), st.text(st.characters(codec="utf-8"), max_size=50)),
        max_size=6,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.booleans(),
)
def test_what_is_written_is_read(samples, layout, zipped):
    files = []
    for at, (name, image, prompt) in enumerate(samples):
        key = f"{at}-{name[:20] if layout == tarfile.USTAR_FORMAT else name}"
        files += [(f"{key}.jpg", image), (f"{key}.json", text(prompt))]
    data = packed(files, layout)
    with tempfile.TemporaryDirectory() as folder:
        rows = read(gzip.compress(data, 1) if zipped else data, Path(folder))
    assert keys(rows) == [name.removesuffix(".jpg") for name, _ in files[::2]]
    for row, (_, image, prompt) in zip(rows, samples, strict=True):
        if prompt and not prompt.isspace():
            assert (row.prompt, row.image, row.failure) == (prompt, image, None)
        else:
            assert row.failure.status == "missing_prompt"


@pytest.mark.parametrize("make", ["missing", "folder", "fifo", "forbidden"])
def test_what_cannot_be_opened_is_a_row(tmp_path, make):
    path = tmp_path / "shard.tar"
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "forbidden":
        path.write_bytes(END)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read anything")
    rows = list(read_samples(shard_at(path)))
    check_rows(rows)
    assert statuses(rows) == ["unreadable_shard"]
    assert count_samples(shard_at(path)) == 1


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(b"".join(pair(str(i), b"1" * 100_000) for i in range(20)) + END)
    rows = []
    for row in read_samples(shard_at(path)):
        rows.append(row)
        if row.index == 3:
            os.truncate(path, 600_000)
    check_rows(rows)
    assert statuses(rows)[:4] == ["ok"] * 4
    assert statuses(rows)[-1] == "truncated_shard"
    assert len(rows) < 10


PROGRAM = """
import resource, sys
from zscore.records import ShardRef
from zscore.samples import ReadOptions, count_samples, read_samples
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = 0
for row in read_samples(ShardRef(sys.argv[1], "s", -1, ""), ReadOptions(max_image_bytes=1 << 20)):
    rows += 1
    last = row
assert count_samples(ShardRef(sys.argv[1], "s", -1, "")) == rows
print(rows, last.failure and last.failure.status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def in_a_process(path):
    """Rows, status of the last, and how many KiB the reading added to the peak of memory."""
    limit = 1 << 30
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    rows, status, grown = done.stdout.split()
    return int(rows), status, int(grown)


def write_hole(path, start, size, end):
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
        file.seek(0, os.SEEK_END)
        file.write(end)


def test_a_ten_gigabyte_picture_takes_no_memory(tmp_path):
    size = 10 << 30
    write_hole(tmp_path / "s.tar", header("a.jpg", base256(size)), size, member("a.txt", b"x") + pair("b") + END)
    assert in_a_process(tmp_path / "s.tar")[:2] == (2, "None")
    rows = list(read_samples(shard_at(tmp_path / "s.tar")))
    assert statuses(rows) == ["image_too_large", "ok"]


def test_a_gzip_bomb_takes_no_memory(tmp_path):
    size = 120 << 20
    with gzip.open(tmp_path / "s.tgz", "wb", compresslevel=1) as file:
        file.write(header("a.jpg", size))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(member("a.txt", b"x") + pair("b") + END)
    rows, status, grown = in_a_process(tmp_path / "s.tgz")
    assert (rows, status) == (2, "None")
    assert grown < 40_000


@pytest.mark.parametrize("samples", [50, 500])
def test_memory_is_that_of_one_sample(tmp_path, samples):
    with (tmp_path / "s.tar").open("wb") as file:
        for i in range(samples):
            file.write(pair(f"{i}", bytes(200_000)))
        file.write(END)
    rows, _, grown = in_a_process(tmp_path / "s.tar")
    assert rows == samples
    assert grown < 20_000


def test_errors_give_the_byte(tmp_path):
    for cut in (700, 1100, 1300):
        (row,) = read(member("a.jpg", b"1" * 600)[:cut] + b"x" * 5, tmp_path)
        assert re.search(r"byte \d+", row.failure.error)
