"""Walking through a tar without reading it: local and streamed carriers see what the tar reader sees, byte for byte."""

from __future__ import annotations

import gzip
import itertools
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tars
from tests.tars import BLOCK, END, FUZZ, GNU, USTAR, V7, base256, header, member, packed, pair, pax
from zscore import tar_copy
from zscore.passages import Passages, StandIns
from zscore.records import Status
from zscore.samples import ReadOptions, read_samples
from zscore.stores import ShardFault
from zscore.tar_copy import open_carrier, read_members

STAND_INS = StandIns.of(ReadOptions())
ALL = range(1000)


def write(folder, data, *, zipped=False):
    path = folder / ("shard.tar.gz" if zipped else "shard.tar")
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    return path


def copied(path, folder, wanted=ALL):
    """(index, key, bytes) of every wanted sample, and the fault that ended it, if one did."""
    found, fault = [], None
    with open_carrier(str(path)) as carrier:
        try:
            for passage in Passages(carrier, wanted, STAND_INS):
                target = folder / "sample"
                with target.open("wb") as out:
                    carrier.copy(passage, out.fileno())
                found.append((passage.index, passage.key, target.read_bytes()))
        except ShardFault as error:
            fault = error.failure
    return found, fault


def both(data, folder, wanted=ALL):
    """What is copied from the tar itself and from its gzipped self; they must not differ."""
    local = copied(write(folder, data), folder, wanted)
    streamed = copied(write(folder, data, zipped=True), folder, wanted)
    assert local[0] == streamed[0]
    assert (local[1] and local[1].status) == (streamed[1] and streamed[1].status)
    return local


def members_of(carrier):
    return list(carrier.members())


class TestHeaders:
    """Every way to write a header gives the same samples as the reader, raw."""

    @pytest.mark.parametrize(
        "odd",
        [
            member("x.jpg", b"data"),
            member("x.jpg", b"data", magic=GNU),
            member("x.jpg", b"data", magic=V7),
            member("x.jpg", b"data", kind=b"\0"),
            member("x.jpg", b"data", kind=b"7"),
            member("x.jpg", b"", kind=b"0"),
            header("x.jpg", base256(4)) + tars.padded(b"data"),
            header("x.jpg", b"4           ") + tars.padded(b"data"),
            header("x.jpg", b"     4\0     ") + tars.padded(b"data"),
            header("x.jpg", 4, prefix=b"some/folder") + tars.padded(b"data"),
            header("x.jpg", 4, magic=GNU, prefix=b"12345670123\0") + tars.padded(b"data"),
            header("x.jpg", 4, checksum=None, patch={0: b"\xff.jpg\0"}) + tars.padded(b"data"),
            pax({"mtime": "1700000000.25"}) + member("x.jpg", b"data"),
            pax({"path": "other/name.jpg"}) + member("x.jpg", b"data"),
            pax({"size": "4"}) + header("x.jpg", 0) + tars.padded(b"data"),
            pax({"comment": "c" * 900, "mtime": "1.5"}) + member("x.jpg", b"data"),
            pax({"comment": "c" * 9000}) + member("x.jpg", b"data"),
            pax({"mtime": "1.5"}) + pax({"atime": "2.5"}) + member("x.jpg", b"data"),
            pax({"mtime": "1.5"}, kind=b"X") + member("x.jpg", b"data"),
            member("././@LongLink", b"l" * 120 + b".jpg\0", kind=b"L") + member("cut", b"data"),
            member("././@LongLink", b"/target\0", kind=b"K") + member("x.jpg", b"data"),
            header("x.jpg", 4, kind=b"S", magic=GNU, patch={483: b"%011o\0" % 4}) + tars.padded(b"data"),
            pax({"GNU.sparse.major": "1", "GNU.sparse.realsize": "9"}) + member("x.jpg", b"data"),
        ],
    )
    def test_one_odd_member_between_everyday_ones(self, tmp_path, odd):
        before, after = pair("a"), pair("z")
        found, fault = both(before + odd + after + END, tmp_path)
        assert fault is None
        rows = list(read_samples(tars.shard_at(tmp_path / "shard.tar")))
        assert [(index, key) for index, key, _ in found] == [(row.index, row.key) for row in rows]
        assert [data for _, _, data in found] == [before, odd, after]

    @pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"Z"])
    @pytest.mark.parametrize("suffix", ["jpg", "cls"])
    def test_what_is_no_file(self, tmp_path, kind, suffix):
        """In the place of a picture it belongs to the sample (and is copied); elsewhere it belongs to nothing."""
        odd = header(f"b.{suffix}", 0, kind)
        found, fault = both(pair("a") + odd + member("b.txt", b"t") + END, tmp_path)
        assert fault is None
        rows = list(read_samples(tars.shard_at(tmp_path / "shard.tar")))
        assert [key for _, key, _ in found] == [row.key for row in rows] == ["a", "b"]
        assert found[1][2] == (odd if suffix == "jpg" else b"") + member("b.txt", b"t")

    @pytest.mark.parametrize("kind", [b"1", b"2"])
    def test_links_that_stay_behind_are_counted(self, tmp_path, kind):
        link = header("b.cls", 0, kind)
        data = link + pair("a") + link + header("b.md", 0, kind) + pair("b") + link + pair("c") + END
        for zipped in (False, True):
            with open_carrier(str(write(tmp_path, data, zipped=zipped))) as carrier:
                assert [(passage.key, passage.links) for passage in Passages(carrier, ALL, STAND_INS)] == [
                    ("a", 0),
                    ("b", 3),
                    ("c", 0),
                ]

    def test_folders_and_notes_split_no_sample(self, tmp_path):
        inside = [header("d/", 0, b"5"), member("__notes__", b"n"), member("README", b"r"), member(".hidden", b"h")]
        data = member("d/a.jpg", b"1") + b"".join(inside) + member("d/a.txt", b"2")
        found, _ = both(data + END, tmp_path)
        assert found == [(0, "d/a", member("d/a.jpg", b"1") + member("d/a.txt", b"2"))]

    def test_spans_of_neighbours_are_joined(self, tmp_path):
        path = write(tmp_path, pair("a") + pair("b") + header("f/", 0, b"5") + END)
        with open_carrier(str(path)) as carrier:
            first, second = Passages(carrier, ALL, STAND_INS)
        size = len(pair("a"))
        assert first.spans == [(0, size)]
        assert second.spans == [(size, 2 * size)]
        assert second.size == size

    @pytest.mark.parametrize("where", [0, 1, 2])
    def test_a_global_header_ends_it(self, tmp_path, where):
        parts = [pair("a"), pair("b"), pair("c")]
        parts.insert(where, pax({"comment": "for all that follow"}, kind=b"g"))
        found, fault = both(b"".join(parts) + END, tmp_path)
        # The sample before it isn't known to be whole yet.
        assert len(found) == max(0, where - 1)
        assert fault.status == Status.BAD_SHARD
        assert "a global pax header" in fault.error


class TestFastPath:
    """Everyday headers never reach the tar reader."""

    @pytest.fixture
    def positions(self, monkeypatch):
        """Where the tar reader took over."""
        found = []
        monkeypatch.setattr(
            tar_copy, "read_members", lambda carrier: found.append(carrier.position) or read_members(carrier)
        )
        return found

    @pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_up_to_the_end(self, tmp_path, positions, tar_format):
        data = packed([(f"{i}.jpg", bytes([i]) * (i * 700)) for i in range(20)], tar_format)
        found, _ = copied(write(tmp_path, data), tmp_path)
        assert len(found) == 20
        assert positions == [data.rindex(b"\x13" * 100) + 100 + -(19 * 700) % BLOCK]

    def test_times_with_fractions(self, tmp_path, positions):
        data = b"".join(pax({"mtime": f"17.{i}"}) + member(f"{i}.jpg", b"d") for i in range(5))
        copied(write(tmp_path, data + END), tmp_path)
        assert positions == [len(data)]

    @pytest.mark.parametrize("window", [BLOCK, 2 * BLOCK, 3 * BLOCK, 4096])
    def test_windows_of_any_size(self, tmp_path, positions, monkeypatch, window):
        monkeypatch.setattr(tar_copy, "WINDOW", window)
        data = b"".join(pair(f"{i}", bytes(i * 300)) for i in range(9))
        found, _ = copied(write(tmp_path, data + END), tmp_path)
        assert b"".join(sample for _, _, sample in found) == data
        assert positions == [len(data)]

    @pytest.mark.parametrize("size", [b"000000020500", b"00000010500 ", b"00000010500\0", b" 0000010500\0"])
    def test_sizes_of_any_ending(self, tmp_path, size):
        """Twelve digits without an end are one number, too."""
        data = b"B" * int(size.strip(b" \0"), 8)
        odd = header("a.jpg", size) + tars.padded(data)
        found, fault = both(odd + pair("b") + END, tmp_path)
        assert (found, fault) == ([(0, "a", odd), (1, "b", pair("b"))], None)

    @pytest.mark.parametrize(
        ("odd", "whole"),
        [
            (header("b.jpg", b"00000000089\0"), 0),
            (pax({"mtime": "1.5"}) + header("b.jpg", b"00000000009\0"), 0),
            (header("b.jpg", 0, checksum=b"008000\0 "), 1),
        ],
    )
    def test_an_8_or_a_9_is_no_octal_digit(self, tmp_path, odd, whole):
        found, fault = both(pair("a") + odd + END, tmp_path)
        assert (len(found), fault.status) == (whole, Status.BAD_SHARD)

    def test_a_wrong_checksum_is_damage(self, tmp_path, positions):
        data = pair("a") + header("b.jpg", 0, checksum=b"000001\0 ") + END
        found, fault = copied(write(tmp_path, data), tmp_path)
        assert (found, fault.status) == ([(0, "a", pair("a"))], Status.BAD_SHARD)
        assert positions == [len(pair("a"))]

    @pytest.mark.parametrize("end", [header("b.jpg", 0)[:100], b"rubbish" * 100, header("b.jpg", 0, checksum=b"0" * 8)])
    def test_a_fault_between_members_leaves_whole_samples(self, tmp_path, end):
        """As scoring does, whose table names such a sample; one without a text isn't known to be whole."""
        assert both(pair("a") + pair("b") + end, tmp_path)[0] == [(0, "a", pair("a")), (1, "b", pair("b"))]
        half = member("b.jpg", b"p")
        assert both(pair("a") + half + end, tmp_path)[0] == [(0, "a", pair("a"))]
        assert both(pair("a") + pair("b") + end, tmp_path, {0})[0] == [(0, "a", pair("a"))]

    def test_what_the_plain_reader_takes_is_what_the_tar_reader_says(self, tmp_path):
        for fields in itertools.product(
            (b"0", b"\0", b"x", b"5"), (USTAR, GNU, V7), (b"", b"p"), (b"00000000004\0", base256(4), b"4          \0")
        ):
            kind, magic, prefix, size = fields
            block = header("n.jpg", size, kind, magic=magic, prefix=prefix)
            path = write(tmp_path, block + tars.padded(b"data") + END)
            walks = []
            for walk in (members_of, read_members):
                with open_carrier(str(path)) as carrier:
                    try:
                        walks.append(list(walk(carrier)))
                    except ShardFault as fault:
                        walks.append(fault.failure.error)
            assert walks[0] == walks[1], fields


blocks = st.one_of(
    st.builds(
        member,
        st.sampled_from(["a.jpg", "a.json", "b.jpg", "d/a.txt", "x", "__m__", "a.tar.gz", ".h", "A.JPG"]),
        st.binary(max_size=700),
        magic=st.sampled_from([USTAR, GNU, V7]),
    ),
    st.builds(lambda n: pax({"mtime": f"1.{n}"}) + member(f"{n}.jpg", b"p"), st.integers(0, 3)),
    st.builds(lambda n: pax({"path": f"deep/{n}.jpg"}) + member("short", b"p"), st.integers(0, 3)),
    st.builds(lambda n: member("L", b"n" * 110 + b"%d.jpg\0" % n, kind=b"L") + member("c", b""), st.integers(0, 3)),
    st.sampled_from([header("d/", 0, b"5"), header("a.jpg", 0, b"2"), header("a.cls", 0, b"1")]),
)


class TestAnyTar:
    @FUZZ
    @given(st.lists(blocks, max_size=12), st.integers(0, 3))
    def test_samples_are_the_readers(self, tmp_path_factory, parts, step):
        folder = tmp_path_factory.mktemp("any")
        data = b"".join(parts)
        wanted = ALL[:: step + 1]
        found, fault = both(data + END, folder, wanted)
        assert fault is None
        rows = list(read_samples(tars.shard_at(folder / "shard.tar")))
        assert [(index, key) for index, key, _ in found] == [
            (row.index, row.key) for row in rows if row.index in wanted
        ]
        if step == 0:
            # All samples together are the tar, but for what belongs to none of them.
            assert sum(len(sample) for _, _, sample in found) <= len(data)

    @FUZZ
    @given(st.lists(blocks, min_size=1, max_size=5), st.data())
    def test_cut_anywhere(self, tmp_path_factory, parts, drawn):
        folder = tmp_path_factory.mktemp("cut")
        data = b"".join(parts) + END
        data = data[: drawn.draw(st.integers(0, len(data)))]
        if data:  # a gzip stream of nothing is another fault than no bytes
            both(data, folder)
        found, fault = copied(write(folder, data), folder)
        rows = list(read_samples(tars.shard_at(folder / "shard.tar")))
        whole = rows[:-1] if fault is not None else rows
        # A sample that the reader calls whole is copied whole; one that it doesn't isn't copied.
        assert [(index, key) for index, key, _ in found] == [(row.index, row.key) for row in whole]
        # Block by block: what belongs to no sample may lie between two members of one.
        there = {data[at : at + 512] for at in range(0, len(data), 512)}
        for _, _, sample in found:
            assert all(sample[at : at + 512] in there for at in range(0, len(sample), 512))


class TestOpening:
    def test_plain_files_are_walked_locally_and_others_streamed(self, tmp_path):
        plain, zipped = write(tmp_path, pair("a") + END), write(tmp_path, pair("a") + END, zipped=True)
        for path, waits in ((plain, True), (zipped, False)):
            with open_carrier(str(path)) as carrier:
                assert carrier.can_wait is waits
                assert len(members_of(carrier)) == 3

    def test_what_cannot_be_opened(self, tmp_path):
        with pytest.raises(ShardFault), open_carrier(str(tmp_path / "none.tar")):
            pass
        with pytest.raises(ShardFault), open_carrier(str(tmp_path)):
            pass

    def test_a_local_sample_can_be_copied_later(self, tmp_path):
        path = write(tmp_path, pair("a") + pair("b") + END)
        with open_carrier(str(path)) as carrier:
            first, second = Passages(carrier, ALL, STAND_INS)
            with (tmp_path / "out").open("wb") as out:
                carrier.copy(second, out.fileno())
                carrier.copy(first, out.fileno())
        assert (tmp_path / "out").read_bytes() == pair("b") + pair("a")

    def test_samples_are_counted(self, tmp_path):
        path = write(tmp_path, pair("a") + pair("b") + pair("c") + END)
        with open_carrier(str(path)) as carrier:
            passages = Passages(carrier, {1}, STAND_INS)
            assert [passage.key for passage in passages] == ["b"]
            assert passages.samples == 3

    def test_a_big_sample_of_a_stream_waits_on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tar_copy, "SPOOL_BYTES", 1000)
        monkeypatch.setattr(tar_copy, "CHUNK", 700)
        found, _ = copied(write(tmp_path, pair("a", b"p" * 5000) + END, zipped=True), tmp_path)
        assert found == [(0, "a", pair("a", b"p" * 5000))]
