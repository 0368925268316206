"""New shards hold exactly the kept samples' bytes, whatever the tar looked like, and survive being interrupted."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command import zscore
from tests.scores_factory import row, write_scores
from zscore import file_copy, tar_copy
from zscore.errors import OutputError, OutputLockedError, OutputMismatchError, TableError, UsageError
from zscore.passages import Passages, StandIns
from zscore.records import ShardRef
from zscore.reshard import ReshardOptions, reshard
from zscore.samples import ReadOptions, count_samples, read_samples
from zscore.shard_writer import ShardSize
from zscore.store import open_store
from zscore.tables import open_scores

# The webdataset library leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_tar(path, members, **options):
    """Members are (name, bytes) or ready TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000, "somebody"
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count, prefix="s", start=0):
    return [
        (f"{prefix}{i:04d}.{suffix}", os.urandom(random.Random(i).randint(0, 3000)) if suffix == "jpg" else b"{}")
        for i in range(start, start + count)
        for suffix in ("jpg", "json", "TXT")
    ]


def kept_rows(tmp_path, rows, name="kept.parquet", **changes):
    """A kept table of (shard, index, key)."""
    made = [row(number, shard=shard, index=index, key=key) for number, (shard, index, key) in enumerate(rows)]
    return open_scores(str(write_scores(tmp_path / name, made, **changes)))


def all_rows(source, shard):
    ref = ShardRef(str(source), shard, -1, "")
    return [(shard, sample.index, sample.key) for sample in read_samples(ref)]


def read_back(folder):
    """Every sample by the webdataset library: key → {suffix: bytes}, in order, as a list."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    if not shards:
        return []
    library = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [(sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")}) for sample in library]


def raw_members(path):
    """(name, all bytes from its first header block to the next member's) of every member, by Python's tarfile."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        found = tar.getmembers()
        ends = [member.offset for member in found[1:]] + [tar.offset]
    return [(member.name, data[member.offset : end]) for member, end in zip(found, ends, strict=True)]


def run(kept, shards, out, **options):
    return reshard(kept, ReshardOptions(shards=(str(shards),), out=str(out), **options))


class TestCopy:
    def test_kept_samples_and_nothing_else(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(10))
        rows = all_rows(source, "a.tar")
        kept = kept_rows(tmp_path, [rows[i] for i in (7, 2, 3)])
        result = run(kept, tmp_path / "src", tmp_path / "out")
        assert (result.samples, len(result.shards)) == (3, 1)
        members = raw_members(source)
        wanted = [pair for i in (2, 3, 7) for pair in members[3 * i : 3 * i + 3]]
        assert raw_members(tmp_path / "out" / "kept-000000.tar") == wanted
        assert [key for key, _ in read_back(tmp_path / "out")] == ["s0002", "s0003", "s0007"]
        assert (tmp_path / "out" / "kept-000000.tar").stat().st_size % tarfile.RECORDSIZE == 0

    @pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names_and_extension_headers(self, tmp_path, tar_format):
        if tar_format == tarfile.USTAR_FORMAT:
            names = [f"{'d' * 90}/{'e' * 40}{i}.jpg" for i in range(4)]
        else:
            names = [f"{'long' * 60}/bild-ü-{i}.jpg" for i in range(4)]
        source = make_tar(tmp_path / "src" / "a.tar", [(name, b"x" * 700) for name in names], format=tar_format)
        rows = all_rows(source, "a.tar")
        run(kept_rows(tmp_path, rows[1:3]), tmp_path / "src", tmp_path / "out")
        assert raw_members(tmp_path / "out" / "kept-000000.tar") == raw_members(source)[1:3]
        assert [key for key, _ in read_back(tmp_path / "out")] == [name[:-4] for name in names[1:3]]

    def test_what_belongs_to_no_sample_stays_behind(self, tmp_path):
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        members = [
            folder,
            ("__meta__", b"m"),
            ("dir/a.jpg", b"1"),
            ("README", b"r"),
            ("dir/a.json", b"2"),
            ("dir/b.jpg", b"3"),
        ]
        source = make_tar(tmp_path / "src" / "a.tar", members)
        run(kept_rows(tmp_path, all_rows(source, "a.tar")), tmp_path / "src", tmp_path / "out")
        assert [name for name, _ in raw_members(tmp_path / "out" / "kept-000000.tar")] == [
            "dir/a.jpg",
            "dir/a.json",
            "dir/b.jpg",
        ]

    def test_gzipped_sources(self, tmp_path):
        members = samples(6)
        plain = make_tar(tmp_path / "plain.tar", members)
        for name in ("a.tar.gz", "b.tgz", "c.tar"):
            (tmp_path / "src").mkdir(exist_ok=True)
            (tmp_path / "src" / name).write_bytes(gzip.compress(plain.read_bytes()))
        kept = kept_rows(tmp_path, [(name, i, f"s{i:04d}") for name in ("a.tar.gz", "b.tgz", "c.tar") for i in (1, 4)])
        run(kept, tmp_path / "src", tmp_path / "out")
        wanted = raw_members(plain)
        assert raw_members(tmp_path / "out" / "kept-000000.tar") == (wanted[3:6] + wanted[12:15]) * 3

    def test_remote_on_both_sides(self, tmp_path):
        import fsspec

        memory = fsspec.filesystem("memory")
        source = make_tar(tmp_path / "a.tar", samples(8))
        memory.pipe_file("/bucket/src/a.tar", source.read_bytes())
        kept = kept_rows(tmp_path, all_rows(source, "a.tar")[2:5])
        result = run(kept, "memory://bucket/src", "memory://bucket/out", shard_size="2")
        assert [shard.samples for shard in result.shards] == [2, 1]
        names = {path.rsplit("/", 1)[-1] for path in memory.find("/bucket/out")}
        assert names == {"kept-000000.tar", "kept-000001.tar", "kept-index.json"}
        (tmp_path / "back").mkdir()
        for name in names:
            memory.get_file(f"/bucket/out/{name}", str(tmp_path / "back" / name))
        assert raw_members(tmp_path / "back" / "kept-000000.tar") == raw_members(source)[6:12]

    def test_s3_on_both_sides_and_a_resume(self, tmp_path, monkeypatch):
        from tests.s3server import BUCKET, s3_server

        plain = make_tar(tmp_path / "a.tar", samples(6))
        with s3_server(monkeypatch) as files:
            files.put_file(str(plain), f"{BUCKET}/src/a.tar")
            kept = kept_rows(tmp_path, all_rows(plain, "a.tar"))
            done = []

            def stop(shard):
                done.append(shard)
                if len(done) == 2:
                    raise StoppedError

            options = ReshardOptions(shards=(f"s3://{BUCKET}/src/",), out=f"s3://{BUCKET}/out/", shard_size="2")
            with pytest.raises(StoppedError):
                reshard(kept, options, stop)
            assert reshard(kept, options).resumed == 2
            names = sorted(path.rsplit("/", 1)[-1] for path in files.find(f"{BUCKET}/out"))
            assert names == ["kept-000000.tar", "kept-000001.tar", "kept-000002.tar", "kept-index.json"]
            for number in range(3):
                files.get_file(f"{BUCKET}/out/{names[number]}", str(tmp_path / names[number]))
        found = [member for number in range(3) for member in raw_members(tmp_path / names[number])]
        assert found == raw_members(plain)

    def test_order_is_that_of_the_sources(self, tmp_path):
        for name in ("b", "a"):
            make_tar(tmp_path / "src" / f"{name}.tar", samples(3, prefix=name))
        kept = kept_rows(tmp_path, [("b.tar", 2, "b0002"), ("a.tar", 1, "a0001"), ("b.tar", 0, "b0000")])
        run(kept, tmp_path / "src", tmp_path / "out")
        assert [key for key, _ in read_back(tmp_path / "out")] == ["a0001", "b0000", "b0002"]

    def test_equal_neighbours_never_share_a_shard(self, tmp_path):
        for name in ("a", "b"):
            make_tar(tmp_path / "src" / f"{name}.tar", samples(2))
        kept = kept_rows(tmp_path, [("a.tar", 1, "s0001"), ("b.tar", 1, "s0001")])
        result = run(kept, tmp_path / "src", tmp_path / "out")
        assert [shard.samples for shard in result.shards] == [1, 1]
        assert [key for key, _ in read_back(tmp_path / "out")] == ["s0001", "s0001"]

    def test_a_repeated_suffix_begins_a_sample(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", [("x.jpg", b"1"), ("x.jpg", b"22"), ("x.jpg", b"333")])
        result = run(kept_rows(tmp_path, [("a.tar", 1, "x")]), tmp_path / "src", tmp_path / "out")
        assert result.samples == 1
        assert raw_members(tmp_path / "out" / "kept-000000.tar") == raw_members(source)[1:2]

    def test_nothing_kept(self, tmp_path):
        make_tar(tmp_path / "src" / "a.tar", samples(2))
        result = run(kept_rows(tmp_path, []), tmp_path / "src", tmp_path / "out")
        assert result.shards == []
        index = json.loads((tmp_path / "out" / "kept-index.json").read_text())
        assert index["shardlist"] == []

    def test_shards_that_webdataset_wrote(self, tmp_path, monkeypatch):
        """Its times have fractions, so that every member has a pax header; that is read without the tar reader too."""
        (tmp_path / "src").mkdir()
        with webdataset.TarWriter(str(tmp_path / "src" / "a.tar")) as writer:
            for i in range(6):
                writer.write({"__key__": f"dir/{i}", "jpg": bytes(i * 1000), "json": {"n": i}})
        source = tmp_path / "src" / "a.tar"
        tails = []
        whole = tar_copy.read_members
        monkeypatch.setattr(tar_copy, "read_members", lambda carrier: tails.append(carrier.position) or whole(carrier))
        run(kept_rows(tmp_path, all_rows(source, "a.tar")[1::2]), tmp_path / "src", tmp_path / "out")
        wanted = raw_members(source)
        assert raw_members(tmp_path / "out" / "kept-000000.tar") == [wanted[i] for i in (2, 3, 6, 7, 10, 11)]
        assert source.read_bytes()[tails[0] :].count(0) == source.stat().st_size - tails[0]  # the end marker alone

    @pytest.mark.parametrize("broken", [errno.EXDEV, errno.EOPNOTSUPP])
    @pytest.mark.parametrize("ways", [1, 2])
    def test_other_ways_to_copy(self, tmp_path, monkeypatch, broken, ways):
        def refuse(*_):
            raise OSError(broken, "not here")

        monkeypatch.setattr(file_copy, "_ways", [refuse] * ways + file_copy._ways[ways:])
        source = make_tar(tmp_path / "src" / "a.tar", samples(4))
        run(kept_rows(tmp_path, all_rows(source, "a.tar")[1:]), tmp_path / "src", tmp_path / "out")
        assert raw_members(tmp_path / "out" / "kept-000000.tar") == raw_members(source)[3:]


names = st.sampled_from(
    [
        "a.jpg",
        "a.json",
        "a.JPG",
        "b.jpg",
        "d/a.jpg",
        "d.e/a.txt",
        "c.tar.gz",
        "x",
        "__m__",
        "__m__/k.jpg",
        ".hid",
        "d/.h",
        "a." + "q" * 120,
    ]
)
kinds = st.sampled_from(["file"] * 6 + ["dir", "link", "fifo"])


class TestLikeTheReader:
    """Samples are numbered as `zscore.samples` numbers them, or another sample than the scored one would be copied."""

    @settings(max_examples=120, deadline=None)
    @given(
        st.lists(st.tuples(names, kinds, st.integers(0, 1100)), max_size=14),
        st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
        st.booleans(),
    )
    def test_passages(self, tmp_path_factory, drawn, tar_format, zipped):
        members = []
        for name, kind, size in drawn:
            info = tarfile.TarInfo(name)
            info.type = {"file": b"0", "dir": b"5", "link": b"2", "fifo": b"6"}[kind]
            info.linkname = "elsewhere" if kind == "link" else ""
            members.append((name, b"." * size) if kind == "file" else info)
        folder = tmp_path_factory.mktemp("odd")
        path = make_tar(folder / "a.tar", members, format=tar_format)
        if zipped:
            path.write_bytes(gzip.compress(path.read_bytes()))
        stand_ins = StandIns.of(ReadOptions())
        expected = [(sample.index, sample.key) for sample in read_samples(ShardRef(str(path), "a.tar", -1, ""))]
        with tar_copy.open_carrier(str(path)) as carrier, (folder / "out").open("wb") as out:
            passages = Passages(carrier, range(100), stand_ins)
            found = []
            for passage in passages:
                found.append((passage.index, passage.key))
                carrier.copy(passage, out.fileno())
            assert found == expected
            assert passages.samples == len(expected)
        # What was copied reads as the same samples, at least where keys don't meet anew.
        with (folder / "out").open("ab") as out:
            out.write(bytes(1024))
        if found:
            assert count_samples(ShardRef(str(folder / "out"), "out", -1, "")) == len(found)

    @pytest.mark.parametrize(
        "shard", ["webdataset/sample.tgz", "webdataset/compressed.tar", "clip-retrieval/image1.tar"]
    )
    def test_found_shards(self, tmp_path, shared_data, shard):
        path = shared_data / "found-shards" / shard
        rows = all_rows(path, path.name)[::2]
        run(kept_rows(tmp_path, rows), path, tmp_path / "out")
        wanted = [key for _, _, key in rows]
        found = read_back(tmp_path / "out")
        assert [key for key, _ in found] == wanted
        source = {
            sample["__key__"]: sample
            for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        }
        for key, files in found:
            assert files == {k: v for k, v in source[key].items() if not k.startswith("__")}

    def test_real_pictures(self, tmp_path, shared_data):
        folder = shared_data / "avt-shards"
        rows = [r for path in sorted(folder.glob("*.tar")) for r in all_rows(path, path.name)]
        assert len(rows) == 134
        run(kept_rows(tmp_path, rows[::3]), folder, tmp_path / "out", shard_size="20")
        again = [r for path in sorted((tmp_path / "out").glob("*.tar")) for r in all_rows(path, path.name)]
        assert [key for _, _, key in again] == [key for _, _, key in rows[::3]]
        assert [index for _, index, _ in again] == [*range(20), *range(20), *range(5)]


class TestShardSize:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("10000", ShardSize(samples=10_000)),
            ("500MB", ShardSize(bytes=500_000_000)),
            ("1 GiB", ShardSize(bytes=1 << 30)),
            ("1.5k", ShardSize(bytes=1500)),
            ("300b", ShardSize(bytes=300)),
        ],
    )
    def test_parsed(self, text, size):
        assert ShardSize.parse(text) == size

    @pytest.mark.parametrize(
        "text", ["", "0", "-3", "1.5", "many", "10TB", "5 samples", "0MB", "0.5B", "9" * 400, "9" * 400 + "GB"]
    )
    def test_refused(self, text):
        with pytest.raises(UsageError, match="--shard-size"):
            ShardSize.parse(text)

    def test_samples(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(7))
        result = run(kept_rows(tmp_path, all_rows(source, "a.tar")), tmp_path / "src", tmp_path / "out", shard_size="3")
        assert [shard.samples for shard in result.shards] == [3, 3, 1]
        assert len(read_back(tmp_path / "out")) == 7

    def test_bytes(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", [(f"{i}.jpg", b"." * 3000) for i in range(7)])
        result = run(
            kept_rows(tmp_path, all_rows(source, "a.tar")), tmp_path / "src", tmp_path / "out", shard_size="8KB"
        )
        assert [shard.samples for shard in result.shards] == [3, 3, 1]

    def test_index(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(5))
        run(
            kept_rows(tmp_path, all_rows(source, "a.tar")),
            tmp_path / "src",
            tmp_path / "out",
            shard_size="2",
            prefix="x",
        )
        index = json.loads((tmp_path / "out" / "x-index.json").read_text())
        assert index["__kind__"] == "wids-shard-index-v1"
        assert index["wids_version"] == 1
        for entry, count in zip(index["shardlist"], (2, 2, 1), strict=True):
            path = tmp_path / "out" / entry["url"]  # relative to the index, as wids resolves it
            assert entry["filesize"] == path.stat().st_size
            assert entry["nsamples"] == count
            assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == count


class TestScores:
    def test_member_in_every_sample(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(4))
        kept = kept_rows(tmp_path, all_rows(source, "a.tar")[1:3])
        run(kept, tmp_path / "src", tmp_path / "out", add_scores=True)
        found = read_back(tmp_path / "out")
        assert [key for key, _ in found] == ["s0001", "s0002"]
        for _, files in found:
            assert list(files) == ["jpg", "json", "txt", "zscore.json"]
            scores = json.loads(files["zscore.json"])
            assert scores["overall"] == 3.0
            assert len(scores["alignment_probs"]) == 9
            assert not {"prompt", "shard", "index", "status"} & set(scores)
        plain = raw_members(source)
        assert raw_members(tmp_path / "out" / "kept-000000.tar")[:3] == plain[3:6]

    def test_twice_gives_the_same_bytes(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(3))
        kept = kept_rows(tmp_path, all_rows(source, "a.tar"))
        for out in ("one", "two"):
            run(kept, tmp_path / "src", tmp_path / out, add_scores=True)
        assert (tmp_path / "one/kept-000000.tar").read_bytes() == (tmp_path / "two/kept-000000.tar").read_bytes()

    def test_not_twice(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", [("x.jpg", b"1"), ("x.zscore.json", b"{}")])
        with pytest.raises(TableError, match="has a .zscore.json member already"):
            run(kept_rows(tmp_path, all_rows(source, "a.tar")), tmp_path / "src", tmp_path / "out", add_scores=True)
        assert not list((tmp_path / "out").glob("*.tar"))

    def test_names_that_are_no_text(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", [("b\udcffd.jpg", b"1")], format=tarfile.GNU_FORMAT)
        rows = all_rows(source, "a.tar")
        assert run(kept_rows(tmp_path, rows), tmp_path / "src", tmp_path / "out").samples == 1
        with pytest.raises(TableError, match="isn't UTF-8"):
            run(kept_rows(tmp_path, rows), tmp_path / "src", tmp_path / "other", add_scores=True)


class TestRefusals:
    def test_sample_that_is_not_there(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(3))
        rows = [*all_rows(source, "a.tar"), ("a.tar", 7, "s0007"), ("a.tar", 9, "s0009")]
        with pytest.raises(TableError, match=r"^sample 7 \(and 1 more\) of a.tar isn't there, the shard has 3 samples"):
            run(kept_rows(tmp_path, rows), tmp_path / "src", tmp_path / "out")

    def test_shard_that_is_not_there(self, tmp_path):
        make_tar(tmp_path / "src" / "a.tar", samples(3))
        rows = [("b.tar", 0, "x"), ("c.tar", 0, "x"), ("a.tar", 0, "s0000")]
        with pytest.raises(
            TableError, match="2 of the 3 shards that the rows name aren't in --shards: b.tar, c.tar; there are 1"
        ):
            run(kept_rows(tmp_path, rows), tmp_path / "src", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_another_key(self, tmp_path):
        make_tar(tmp_path / "src" / "a.tar", samples(3))
        with pytest.raises(TableError, match="sample 1 of a.tar is 's0001', the rows say 'other'"):
            run(kept_rows(tmp_path, [("a.tar", 1, "other")]), tmp_path / "src", tmp_path / "out")

    def test_sample_twice(self, tmp_path):
        make_tar(tmp_path / "src" / "a.tar", samples(3))
        with pytest.raises(TableError, match=r"1 samples are named twice; the first: \('a.tar', 1\)"):
            run(kept_rows(tmp_path, [("a.tar", 1, "s0001")] * 2), tmp_path / "src", tmp_path / "out")

    def test_truncated_shard(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", [(f"{i}.jpg", b"." * 2000) for i in range(4)])
        source.write_bytes(source.read_bytes()[:7000])
        kept = kept_rows(tmp_path, [("a.tar", 0, "0"), ("a.tar", 1, "1")])
        assert run(kept, tmp_path / "src", tmp_path / "out").samples == 2
        broken = kept_rows(tmp_path, [("a.tar", 0, "0"), ("a.tar", 2, "2")], "broken.parquet")
        with pytest.raises(TableError, match="^sample 2 of a.tar can't be read: the shard ends inside 2.jpg"):
            run(broken, tmp_path / "src", tmp_path / "other")

    @pytest.mark.parametrize("zipped", [False, True])
    def test_global_header(self, tmp_path, zipped):
        source = make_tar(
            tmp_path / "src" / "a.tar", samples(2), format=tarfile.PAX_FORMAT, pax_headers={"comment": "c"}
        )
        if zipped:
            source.write_bytes(gzip.compress(source.read_bytes()))
        with pytest.raises(TableError, match="a global pax header at byte 0"):
            run(kept_rows(tmp_path, [("a.tar", 0, "s0000")]), tmp_path / "src", tmp_path / "out")

    def test_names_from_another_root(self, tmp_path):
        make_tar(tmp_path / "deep" / "src" / "a.tar", samples(3))
        for number, name in enumerate(("src/a.tar", "a.tar", "deep/src/a.tar")):
            kept = kept_rows(tmp_path, [(name, 1, "s0001")])
            assert run(kept, tmp_path / "deep" / "src", tmp_path / f"out{number}").samples == 1
        make_tar(tmp_path / "deep" / "more" / "a.tar", samples(3))
        with pytest.raises(TableError, match="'a.tar' may be .*more/a.tar or .*src/a.tar"):
            run(kept_rows(tmp_path, [("a.tar", 1, "s0001")]), tmp_path / "deep", tmp_path / "out")

    @pytest.mark.parametrize("prefix", ["", "a/b", ".x", "a b"])
    def test_prefix(self, tmp_path, prefix):
        with pytest.raises(UsageError, match="--prefix"):
            run(kept_rows(tmp_path, []), tmp_path, tmp_path / "out", prefix=prefix)


class TestDisk:
    def test_full_disk(self, tmp_path, monkeypatch):
        source = make_tar(tmp_path / "src" / "a.tar", samples(6))
        kept = kept_rows(tmp_path, all_rows(source, "a.tar"))

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(file_copy, "_ways", [full])
            with pytest.raises(OutputError, match=r"can't write .*kept-000000.tar: No space left on device: free some"):
                run(kept, tmp_path / "src", tmp_path / "out")
        assert list((tmp_path / "out").glob("[!.]*")) == []
        assert run(kept, tmp_path / "src", tmp_path / "out").samples == 6

    def test_shard_that_shrinks_while_it_is_read(self, tmp_path, monkeypatch):
        source = make_tar(tmp_path / "src" / "a.tar", [(f"{i}.jpg", b"." * 9000) for i in range(4)])
        kept = kept_rows(tmp_path, all_rows(source, "a.tar")[2:])
        in_kernel = file_copy._ways[0]

        def shrink(source_file, target, start, count):
            os.truncate(source, min(source.stat().st_size, start + 1000))
            return in_kernel(source_file, target, start, count)

        monkeypatch.setattr(file_copy, "_ways", [shrink])
        with pytest.raises(TableError, match=r"sample 2 .*of a.tar can't be (copied|read): "):
            run(kept, tmp_path / "src", tmp_path / "out")


class StoppedError(Exception):
    pass


class TestResume:
    @pytest.fixture
    def job(self, tmp_path):
        for name in ("a", "b"):
            make_tar(tmp_path / "src" / f"{name}.tar", samples(6, prefix=name))
        rows = [(f"{name}.tar", i, f"{name}{i:04d}") for name in "ab" for i in (0, 1, 3, 4, 5)]
        return kept_rows(tmp_path, rows), tmp_path / "src"

    def stop_after(self, count, job, out, **options):
        kept, source = job
        done = []

        def on_shard(shard):
            done.append(shard)
            if len(done) == count:
                raise StoppedError

        with pytest.raises(StoppedError):
            reshard(kept, ReshardOptions(shards=(str(source),), out=str(out), shard_size="3", **options), on_shard)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_goes_on_where_it_stopped(self, tmp_path, job, count):
        whole = run(*job, tmp_path / "whole", shard_size="3")
        self.stop_after(count, job, tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
            f"kept-{i:06d}.tar" for i in range(count)
        ]
        assert not (tmp_path / "out" / "kept-index.json").exists()
        assert not list((tmp_path / "out").glob(".*.tmp"))
        stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.tar"))]
        result = run(*job, tmp_path / "out", shard_size="3")
        assert result.resumed == count
        assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.tar"))][:count] == stamps
        assert result.shards == whole.shards
        for path in (tmp_path / "whole").glob("*"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("out", "whole")]
        assert names[0] == names[1]

    def test_finished_is_left_alone(self, tmp_path, job):
        first = run(*job, tmp_path / "out", shard_size="3")
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
        again = run(*job, tmp_path / "out", shard_size="3")
        assert again.shards == first.shards
        assert again.resumed == 4
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps

    def test_finished_and_then_damaged(self, tmp_path, job):
        run(*job, tmp_path / "out", shard_size="3")
        (tmp_path / "out" / "kept-000002.tar").unlink()
        again = run(*job, tmp_path / "out", shard_size="3")
        assert len(read_back(tmp_path / "out")) == again.samples == 10

    def test_finished_and_then_cut(self, tmp_path, job):
        """As by a power cut: nothing waits for the disk before a shard gets its name."""
        run(*job, tmp_path / "out", shard_size="3")
        path = tmp_path / "out" / "kept-000001.tar"
        whole = path.read_bytes()
        path.write_bytes(whole[:512])
        again = run(*job, tmp_path / "out", shard_size="3")
        assert path.read_bytes() == whole
        assert len(read_back(tmp_path / "out")) == again.samples == 10

    def test_a_damaged_shard_is_done_again(self, tmp_path, job):
        self.stop_after(2, job, tmp_path / "out")
        path = tmp_path / "out" / "kept-000001.tar"
        path.write_bytes(path.read_bytes()[:-512])
        assert run(*job, tmp_path / "out", shard_size="3").resumed == 1
        assert len(read_back(tmp_path / "out")) == 10

    def test_another_call_is_refused(self, tmp_path, job):
        kept, source = job
        run(kept, source, tmp_path / "out", shard_size="3")
        with pytest.raises(OutputMismatchError, match="shard_size differs"):
            run(kept, source, tmp_path / "out", shard_size="4")
        other = kept_rows(tmp_path, [("a.tar", 0, "a0000")], "other.parquet")
        with pytest.raises(OutputMismatchError, match="kept differs"):
            run(other, source, tmp_path / "out", shard_size="3")
        assert run(other, source, tmp_path / "out", prefix="few").samples == 1
        result = run(other, source, tmp_path / "out", overwrite=True)
        assert result.samples == 1
        assert sorted(path.name for path in (tmp_path / "out").glob("kept-*")) == ["kept-000000.tar", "kept-index.json"]

    def test_an_unfinished_other_call_is_refused(self, tmp_path, job):
        self.stop_after(1, job, tmp_path / "out")
        with pytest.raises(OutputMismatchError, match="shard_size differs"):
            run(*job, tmp_path / "out", shard_size="4")

    def test_sources_that_changed_are_refused(self, tmp_path, job):
        self.stop_after(1, job, tmp_path / "out")
        os.utime(job[1] / "b.tar", ns=(0, 0))
        with pytest.raises(OutputMismatchError, match="sources differs"):
            run(*job, tmp_path / "out", shard_size="3")

    def test_killed_before_the_first_record(self, tmp_path, job, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("zscore.reshard._Job._record", lambda *_: (_ for _ in ()).throw(StoppedError()))
            with pytest.raises(StoppedError):
                run(*job, tmp_path / "out", shard_size="3")
        assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["kept-000000.tar"]
        with pytest.raises(OutputMismatchError, match="shard_size differs"):
            run(*job, tmp_path / "out", shard_size="4")
        assert run(*job, tmp_path / "out", shard_size="3").resumed == 0
        assert len(read_back(tmp_path / "out")) == 10

    def test_sources_are_never_deleted(self, tmp_path, job):
        kept, source = job
        run(kept, source, source, shard_size="3")
        inner = kept_rows(tmp_path, [("kept-000001.tar", 0, "a0004")], "inner.parquet")
        with pytest.raises(UsageError, match=r"would delete the source shard kept-000001\.tar"):
            run(inner, source, source, overwrite=True)
        assert (source / "kept-000001.tar").exists()

    def test_foreign_shards_are_refused(self, tmp_path, job):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "kept-000000.tar").write_bytes(b"mine")
        with pytest.raises(OutputMismatchError, match="holds kept-000000.tar"):
            run(*job, tmp_path / "out")
        assert (tmp_path / "out" / "kept-000000.tar").read_bytes() == b"mine"

    def test_after_a_failure_nothing_half_done_is_left(self, tmp_path, job):
        kept = kept_rows(tmp_path, [("a.tar", 0, "a0000"), ("b.tar", 0, "wrong")], "wrong.parquet")
        with pytest.raises(TableError, match="'wrong'"):
            run(kept, job[1], tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
        # Nothing was finished, so another call may begin.
        assert run(*job, tmp_path / "out").samples == 10

    def test_one_at_a_time(self, tmp_path, job):
        with open_store(str(tmp_path / "out" / ".kept-reshard")).lock("lock"), pytest.raises(OutputLockedError):
            run(*job, tmp_path / "out")


class TestCommand:
    def test_runs_resumes_and_says_so(self, tmp_path):
        source = make_tar(tmp_path / "src" / "a.tar", samples(5))
        kept_rows(tmp_path, all_rows(source, "a.tar"))
        call = ("reshard", tmp_path / "kept.parquet", "--shards", tmp_path / "src", "--out", tmp_path / "out")
        code, out, err = zscore(*call, "--shard-size", 2, "--add-scores")
        assert code == 0
        assert err.splitlines()[0].startswith("kept-000000.tar: 2 samples, ")
        assert out.startswith("5 samples in 3 shards")
        code, out, err = zscore(*call, "--shard-size", 2, "--add-scores")
        assert (code, err) == (0, "")
        assert "3 of them finished before" in out
        code, out, err = zscore(*call)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "--overwrite" in err
        assert zscore(*call, "--overwrite", "--quiet") == (0, "", "")

    def test_nothing_kept(self, tmp_path):
        make_tar(tmp_path / "src" / "a.tar", samples(1))
        kept_rows(tmp_path, [])
        code, out, _ = zscore(
            "reshard", tmp_path / "kept.parquet", "--shards", tmp_path / "src", "--out", tmp_path / "out"
        )
        assert (code, "keeps no samples" in out) == (0, True)

    def test_by_other_readers(self, tmp_path, shared_data):
        """DuckDB reads the index; Python's tarfile and grouping by neighbours, as HF datasets does, the rest."""
        import itertools

        import duckdb

        folder = shared_data / "avt-shards"
        rows = all_rows(folder / "avt-000001.tar", "avt-000001.tar")[5:15]
        kept_rows(tmp_path, rows)
        code, _, _ = zscore(
            "reshard", tmp_path / "kept.parquet", "--shards", folder, "--out", tmp_path / "out", "--shard-size", 4
        )
        assert code == 0
        query = f"select unnest(shardlist, recursive := true) from read_json('{tmp_path}/out/kept-index.json')"
        assert duckdb.sql(query).fetchall()[0][:2] == ("kept-000000.tar", 4)
        keys = []
        for path in sorted((tmp_path / "out").glob("*.tar")):
            with tarfile.open(path) as tar:
                names = tar.getnames()
            keys += [key for key, _ in itertools.groupby(names, key=lambda name: name.split(".")[0])]
        assert keys == [key for _, _, key in rows]
