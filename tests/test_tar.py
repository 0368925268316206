"""The tar reader: every format that writers make, and every way in which a header can lie."""

from __future__ import annotations

import io
import subprocess
import tarfile

import pytest

from tests.tars import BLOCK, END, GNU, V7, base256, header, member, packed, padded, pax
from zscore.records import Status
from zscore.stores import ShardFault
from zscore.streams import Stream
from zscore.tar import Kind, TarReader, shown


class Bytes:
    """A source in memory, with a window as small as a test wants."""

    def __init__(self, data, window=BLOCK, rereads=False, sized=True):
        self.data, self.window, self.rereads = data, window, rereads
        self.size = len(data) if sized else None

    def read_at(self, offset, count):
        return self.data[offset : offset + count]

    def close(self):
        pass


def members(data, **source):
    """(name, kind, size, contents of files) of every member, then the check of the tail."""
    tar = TarReader(Stream(Bytes(data, **source)))
    found = []
    while tar.advance():
        found.append((tar.name, tar.kind, tar.size, tar.read() if tar.kind is Kind.FILE else None))
    tar.check_tail()
    return found


def names(data):
    return [name for name, *_ in members(data)]


def fault(data, **source):
    with pytest.raises(ShardFault) as caught:
        members(data, **source)
    return caught.value.failure


@pytest.mark.parametrize("window", [1, 7, 512, 4096, 1 << 20])
@pytest.mark.parametrize("rereads", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_contents_through_any_window(window, rereads, sized):
    files = [(f"{i}.bin", bytes([i]) * size) for i, size in enumerate((0, 1, 511, 512, 513, 40_000, 3))]
    found = members(packed(files), window=window, rereads=rereads, sized=sized)
    assert [(name, data) for name, _, _, data in found] == files


@pytest.mark.parametrize("sized", [False, True])
def test_contents_that_nobody_reads_are_passed(sized):
    data = packed([("a", b"1" * 70_000), ("b", b"2" * 3), ("c", b"3")])
    tar = TarReader(Stream(Bytes(data, sized=sized)))
    seen = []
    while tar.advance():
        seen.append(tar.name)
        if tar.name == "c":
            assert tar.read() == b"3"
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [1, 99, 100, 101, 154, 200, 250])
def test_names_of_any_length(layout, length):
    name = "/".join("d" * 50 for _ in range(5))[: length - 2]
    name = (name.rstrip("/") + "/x").lstrip("/") if length > 2 else "x"
    assert names(packed([(name, b"1")], layout)) == [name]


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["d/" * 400 + "x.jpg", "ünï/çödé 猫.jpg", "é" * 300 + ".txt", "with\nnewline.txt"])
def test_long_and_foreign_names(layout, name):
    assert names(packed([(name, b"1"), ("next", b"2")], layout)) == [name, "next"]


def test_what_gnu_tar_writes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("n" * 120 + ".jpg")).write_bytes(b"long")
    (tmp_path / "in" / "z.txt").write_bytes(b"z")
    for layout in ("v7", "oldgnu", "gnu", "ustar", "pax"):
        arguments = ["tar", f"--format={layout}", "--sort=name", "-cf", "-", "."]
        done = subprocess.run(arguments, cwd=tmp_path / "in", capture_output=True, check=False)
        found = {name: data for name, kind, _, data in members(done.stdout) if kind is Kind.FILE}
        expected = {"./z.txt": b"z"}
        if layout not in {"v7", "ustar"}:  # which can't hold the long one
            expected["./" + "n" * 120 + ".jpg"] = b"long"
        assert found == expected


def test_v7_has_no_prefix_and_marks_folders_by_a_slash():
    data = member("a.txt", b"1", b"\0", magic=V7, prefix=b"garbage") + member("d/", b"", b"\0", magic=V7) + END
    assert [(name, kind) for name, kind, *_ in members(data)] == [("a.txt", Kind.FILE), ("d/", Kind.FOLDER)]


def test_gnu_tar_keeps_times_where_ustar_has_its_prefix():
    data = member("a.txt", b"1", magic=GNU, prefix=b"14371425703\x00") + member("b.txt", b"2", prefix=b"p") + END
    assert names(data) == ["a.txt", "p/b.txt"]


def test_names_without_terminator():
    data = member(b"n" * 100, b"1", prefix=b"p" * 155) + END
    assert names(data) == ["p" * 155 + "/" + "n" * 100]


def test_names_that_are_no_utf8_stay_apart():
    data = member(b"\xff.jpg") + member(b"\xfe.jpg") + pax({"path": b"\xfd.jpg"}) + member("x") + END
    assert names(data) == ["\\xff.jpg", "\\xfe.jpg", "\\xfd.jpg"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (b"1", Kind.LINK),
        (b"2", Kind.LINK),
        (b"3", Kind.DEVICE),
        (b"4", Kind.DEVICE),
        (b"5", Kind.FOLDER),
        (b"6", Kind.FIFO),
    ],
)
def test_the_size_of_what_has_no_contents_is_no_size(kind, expected):
    data = header("x", 12345, kind) + member("next", b"2") + END
    assert members(data)[0][:3] == ("x", expected, 0)
    assert names(data) == ["x", "next"]


@pytest.mark.parametrize("kind", [b"D", b"M", b"V", b"Z", b"\xff"])
def test_unknown_types_are_passed_by_their_size(kind):
    assert [kind for _, kind, *_ in members(member("x", b"1" * 700, kind) + member("y") + END)] == [
        Kind.OTHER,
        Kind.FILE,
    ]


def test_contiguous_files_are_files():
    assert members(member("x", b"12", b"7") + END) == [("x", Kind.FILE, 2, b"12")]


def test_pax_overrules_the_header_and_ends_with_its_member():
    data = pax({"path": "über.jpg/", "size": "3", "mtime": "1.5"}) + header("cut", 99) + padded(b"abc")
    data += member("plain", b"1") + END
    assert members(data) == [("über.jpg", Kind.FILE, 3, b"abc"), ("plain", Kind.FILE, 1, b"1")]


def test_pax_globals_hold_until_the_next():
    data = pax({"path": "g", "comment": "x"}, b"g") + member("a") + pax({"path": "own"}) + member("b") + member("c")
    assert names(data + pax({"path": "h"}, b"g") + member("d") + END) == ["g", "own", "g", "h"]


def test_solaris_pax():
    assert names(pax({"path": "s"}, b"X") + member("a") + END) == ["s"]


def test_of_two_extensions_the_outer_counts():
    assert names(pax({"path": "pax"}) + member("@", b"gnu\0", b"L") + member("a") + END) == ["pax"]
    assert names(member("@", b"gnu\0", b"L") + pax({"path": "pax"}) + member("a") + END) == ["gnu"]


def test_a_long_link_target_is_passed():
    assert members(member("@", b"t" * 600, b"K") + header("l", 0, b"2") + END)[0][:2] == ("l", Kind.LINK)


@pytest.mark.parametrize(
    "garbage", [b"x", b"5 a=b\n", b"9999 a=b\n", b"-5 a=b\n", b"7 path\n", b"0 a=b\n", b"6 a=b\n\xff"]
)
def test_malformed_pax_records(garbage):
    found = fault(member("p", garbage, b"x") + member("a") + END)
    assert found.status is Status.BAD_SHARD
    assert "byte 0" in found.error


def test_pax_records_may_be_padded_by_zeros():
    assert names(member("p", b"10 path=x\n" + bytes(30), b"x") + member("a") + END) == ["x"]


@pytest.mark.parametrize("size", ["-1", "1e3", "x", "9" * 30])
def test_pax_sizes_that_are_no_numbers(size):
    assert fault(pax({"size": size}) + member("a") + END).status is Status.BAD_SHARD


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_extension_headers_are_bounded(kind):
    found = fault(header("p", 1 << 40, kind) + END)
    assert found.status is Status.BAD_SHARD
    assert "limit" in found.error


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
@pytest.mark.parametrize("tail", [b"", END])
def test_an_extension_without_its_member(kind, tail):
    extension = pax({"path": "a"}, kind) if kind in b"xg" else member("@", b"a\0", kind)
    if kind == b"g":  # stands for itself
        assert members(extension + tail) == []
    else:
        assert fault(extension + tail).status is Status.TRUNCATED_SHARD


@pytest.mark.parametrize(
    "size",
    [
        b"00000000003\0",
        b"0000000003 \0",
        b"          3\0",
        b"3" + bytes(11),
        b"000000000003",
        base256(3),
        b"3 \0garbage!!",
    ],
)
def test_ways_to_write_a_size(size):
    assert members(header("x", size) + padded(b"abc") + END) == [("x", Kind.FILE, 3, b"abc")]


def test_no_size_at_all_is_zero():
    assert members(header("x", bytes(12)) + END) == [("x", Kind.FILE, 0, b"")]


@pytest.mark.parametrize(
    "size", [b"00000000008\0", b"-0000000003\0", b"0x000000003\0", b"0000_000003\0", b"\xff" * 12, b"\xff" + bytes(11)]
)
def test_sizes_that_are_no_sizes(size):
    found = fault(member("a", b"1") + header("x", size) + END)
    assert found.status is Status.BAD_SHARD
    assert "byte 1024" in found.error


@pytest.mark.parametrize("size", [base256(1 << 62), base256((1 << 87) - 1), b"77777777777\0", b"777777777777"])
@pytest.mark.parametrize("sized", [False, True])
def test_sizes_beyond_the_end_take_no_memory(size, sized):
    data = header("x.jpg", size) + b"abc"
    assert fault(data, sized=sized).status is Status.TRUNCATED_SHARD
    tar = TarReader(Stream(Bytes(data, sized=sized)))
    assert tar.advance()
    with pytest.raises(ShardFault, match=r"x\.jpg"):
        tar.advance()


def test_checksums_of_old_tars_with_signed_bytes():
    block = bytearray(header(b"\xe9t\xe9.txt"))
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 256
    block[148:156] = b"%06o\0 " % signed
    assert names(bytes(block) + END) == ["\\xe9t\\xe9.txt"]


@pytest.mark.parametrize("checksum", [b"000000\0 ", b"garbage!", bytes(8), b"\xff" * 8, b"7777777\0"])
def test_wrong_checksums(checksum):
    found = fault(member("a", b"1") + header("x", checksum=checksum) + END)
    assert found.status is Status.BAD_SHARD
    assert "byte 1024" in found.error


@pytest.mark.parametrize("checksum", [b"%06o\0 ", b"%07o\0", b"%07o ", b"%6o\0 ", b"%08o"])
def test_ways_to_write_a_checksum(checksum):
    total = sum(header("x")[:148]) + sum(header("x")[156:]) + 8 * 32
    assert names(header("x", checksum=checksum % total) + END) == ["x"]


def test_a_checksum_above_the_modulus_of_adler():
    block = header(b"\xff" * 100, prefix=b"\xff" * 155, patch={157: b"\xff" * 100, 265: b"\xff" * 80})
    assert int(block[148:154], 8) > 65521
    assert names(block + END) == ["\\xff" * 155 + "/" + "\\xff" * 100]


def test_flipped_bits_of_a_header_are_found():
    block = header("x.jpg", 5)
    for at in range(BLOCK):
        if 148 <= at < 156:
            continue  # the checksum's own padding has several spellings
        for bit in (0, 3, 7):
            flipped = bytearray(block)
            flipped[at] ^= 1 << bit
            assert fault(bytes(flipped) + padded(b"12345") + END).status is Status.BAD_SHARD


def gnu_sparse(extended=0, stored=b"abc", real=10 << 30):
    patch = {386: b"00000000000\0%011o\0" % len(stored), 482: bytes([extended > 0]), 483: base256(real)}
    data = header("s.jpg", len(stored), b"S", magic=GNU, patch=patch)
    for left in reversed(range(extended)):
        data += bytes(504) + bytes([left > 0]) + bytes(7)
    return data + padded(stored)


@pytest.mark.parametrize("extended", [0, 1, 3])
def test_gnu_sparse_members_are_not_filled(extended):
    found = members(gnu_sparse(extended) + member("next", b"1") + END)
    assert found == [("s.jpg", Kind.SPARSE, 10 << 30, None), ("next", Kind.FILE, 1, b"1")]


def test_a_sparse_map_without_end():
    assert fault(gnu_sparse(5)[: BLOCK * 3]).status is Status.TRUNCATED_SHARD


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.size": str(10 << 30), "GNU.sparse.numblocks": "0", "GNU.sparse.name": "s.jpg"},
        {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.realsize": str(10 << 30),
            "GNU.sparse.name": "s.jpg",
        },
    ],
)
def test_pax_sparse_members_are_not_filled(records):
    found = members(pax(records) + member("GNUSparseFile.0/s.jpg", b"abc") + member("next", b"1") + END)
    assert found == [("s.jpg", Kind.SPARSE, 10 << 30, None), ("next", Kind.FILE, 1, b"1")]


def test_sparse_as_gnu_tar_writes_it(tmp_path):
    with (tmp_path / "s.jpg").open("wb") as file:
        file.truncate(10 << 30)
    for arguments in (["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]):
        command = ["tar", *arguments, "--sparse", "-cf", "-", "s.jpg"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        assert members(done.stdout) == [("s.jpg", Kind.SPARSE, 10 << 30, None)]


@pytest.mark.parametrize(
    "tail", [b"", bytes(BLOCK), END, bytes(10_240), bytes(100), END + b"garbage" * 100, bytes(700)]
)
def test_ends_that_are_ends(tail):
    assert names(member("a", b"1") + tail) == ["a"]


def test_a_tar_of_zeros_is_empty():
    assert members(END) == []
    assert members(bytes(10_240)) == []


def test_a_file_of_no_bytes_is_cut():
    found = fault(b"")
    assert found.status is Status.TRUNCATED_SHARD
    assert "0 bytes" in found.error


def test_another_archive_behind_the_end_is_not_dropped_silently():
    first = packed([("a", b"1")])
    found = fault(first + packed([("b", b"2")]))
    assert found.status is Status.BAD_SHARD
    assert f"byte {len(first)}" in found.error


def test_much_behind_the_end_is_not_dropped_silently():
    assert "follow" in fault(member("a") + END + bytes(3 << 20)).error


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b'  <?xml version="1.0"?><Error><Code>AccessDenied', "XML"),
        (b'{"error": "not found"}', "JSON"),
        (b"PK\x03\x04", "zip"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
@pytest.mark.parametrize("length", [0, 2000])
def test_files_that_are_something_else_are_named(start, word, length):
    found = fault(start + b"?" * length)
    assert found.status is Status.BAD_SHARD
    assert word in found.error


def test_noise_is_no_tar():
    assert "byte 0" in fault(b"\x01\x02\x03" * 1000).error


def test_equal_to_tarfile_on_odd_members():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind in (
            tarfile.DIRTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.FIFOTYPE,
            tarfile.CHRTYPE,
            tarfile.REGTYPE,
        ):
            info = tarfile.TarInfo("ü" * 90 + kind.decode())
            info.type = kind
            info.linkname = "/etc/passwd" * 20
            tar.addfile(info)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        assert names(buffer.getvalue()) == tar.getnames()


def test_shown_names_fit_one_line():
    assert shown("a.jpg") == "a.jpg"
    assert shown("a\nb\x1b[31m.jpg") == "'a\\nb\\x1b[31m.jpg'"
    assert len(shown("x" * 500)) == 80
