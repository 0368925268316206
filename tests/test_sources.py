"""Which shards hold the kept rows."""

from __future__ import annotations

import polars as pl
import pytest

from tests.tars import END, pair
from zscore.errors import TableError
from zscore.passages import StandIns
from zscore.records import ShardRef
from zscore.sources import locate


def shards(*names, root="/data"):
    return [ShardRef(f"{root}/{name}", name.rsplit("/", 1)[-1] if root == "/one" else name, 1, "v") for name in names]


def kept(*rows, **columns):
    frame = pl.DataFrame(rows, schema={"shard": pl.String, "index": pl.Int32}, orient="row")
    return frame.with_columns(**{name: pl.Series(values) for name, values in columns.items()}).lazy()


def names_of(sources):
    return [(source.shard.name, source.name, source.rows["index"].to_list()) for source in sources]


class TestNames:
    def test_order_of_the_shards_and_of_their_samples(self):
        found = locate(kept(("b.tar", 5), ("a.tar", 2), ("b.tar", 1)), shards("a.tar", "b.tar", "c.tar"))
        assert names_of(found) == [("a.tar", "a.tar", [2]), ("b.tar", "b.tar", [1, 5])]

    @pytest.mark.parametrize(
        ("row", "given"),
        [
            ("a.tar", "deep/a.tar"),
            ("deep/a.tar", "deep/a.tar"),
            ("data/deep/a.tar", "deep/a.tar"),
            ("other/deep/a.tar", "deep/a.tar"),
        ],
    )
    def test_another_common_root(self, row, given):
        assert names_of(locate(kept((row, 0)), shards(given))) == [(given, row, [0])]

    def test_a_file_name_alone_is_not_enough(self):
        """Two runs' shards are called alike, and often their samples too."""
        with pytest.raises(TableError, match=r"'run1/a\.tar' and /one/run2/a\.tar share no more than a file name"):
            locate(kept(("run1/a.tar", 0)), shards("run2/a.tar", root="/one"))
        for row in ("a.tar", "run2/a.tar", "data/run2/a.tar", "one/run2/a.tar"):
            assert len(locate(kept((row, 0)), shards("run2/a.tar", root="/one"))) == 1
        given = shards("run2/a.tar", root="/one")
        assert len(locate(kept(("run1/a.tar", 0)), given, checks_pictures=True)) == 1

    def test_only_whole_names_count(self):
        with pytest.raises(TableError, match=r"1 of the 1 shards that the rows name aren't in --shards: a\.tar"):
            locate(kept(("a.tar", 0)), shards("ba.tar"))

    def test_an_exact_name_wins(self):
        found = locate(kept(("a.tar", 0)), shards("a.tar", "x/a.tar"))
        assert names_of(found) == [("a.tar", "a.tar", [0])]

    def test_two_that_it_could_be(self):
        with pytest.raises(TableError, match=r"'a\.tar' may be /data/x/a\.tar or /data/y/a\.tar"):
            locate(kept(("a.tar", 0)), shards("x/a.tar", "y/a.tar"))

    def test_two_names_for_one(self):
        with pytest.raises(TableError, match="two shard names of the rows stand for the same file"):
            locate(kept(("a.tar", 0), ("x/a.tar", 0)), shards("x/a.tar"))

    def test_many_missing_ones_are_counted(self):
        rows = [(f"{i}.tar", 0) for i in range(7)]
        with pytest.raises(TableError, match=r"6 of the 7 .* 1\.tar, 2\.tar, 3\.tar and 3 more; there are 1"):
            locate(kept(*rows), shards("0.tar"))

    def test_nothing_kept(self):
        assert locate(kept(), shards("a.tar")) == []


class TestRows:
    @pytest.mark.parametrize("row", [(None, 0), ("a.tar", None), ("a.tar", -1)])
    def test_a_row_that_names_no_sample(self, row):
        with pytest.raises(TableError, match="1 rows name no sample; the first"):
            locate(kept(row, ("a.tar", 0)), shards("a.tar"))

    def test_a_sample_twice(self):
        with pytest.raises(TableError, match=r"2 samples are named twice; the first: \('a\.tar', 3\)"):
            locate(kept(("a.tar", 3), ("a.tar", 4), ("a.tar", 3), ("a.tar", 4), ("a.tar", 5)), shards("a.tar"))

    def test_a_dictionary_column(self):
        frame = kept(("a.tar", 1)).with_columns(pl.col("shard").cast(pl.Categorical))
        assert names_of(locate(frame, shards("a.tar"))) == [("a.tar", "a.tar", [1])]


class TestPassages:
    @pytest.fixture
    def shard(self, tmp_path):
        path = tmp_path / "a.tar"
        path.write_bytes(b"".join(pair(f"k{i}") for i in range(6)) + END)
        return [ShardRef(str(path), "a.tar", path.stat().st_size, "v")]

    def passed(self, source, after=-1):
        closed = []
        found = [passage.index for passage, _ in source.passages(after, StandIns(), lambda: closed.append(True))]
        assert len(closed) <= 1
        return found

    def test_all_or_what_is_left(self, shard):
        (source,) = locate(kept(("a.tar", 1), ("a.tar", 3), ("a.tar", 5)), shard)
        assert self.passed(source) == [1, 3, 5]
        assert self.passed(source, after=1) == [3, 5]
        assert self.passed(source, after=5) == []

    def test_keys_are_checked_where_they_are_known(self, shard):
        (source,) = locate(kept(("a.tar", 1), ("a.tar", 2), key=["k1", "k2"]), shard)
        assert self.passed(source) == [1, 2]
        (source,) = locate(kept(("a.tar", 1), ("a.tar", 2), key=["k1", "k9"]), shard)
        with pytest.raises(TableError, match="sample 2 of a.tar is 'k2', the rows say 'k9'"):
            self.passed(source)

    def test_what_is_not_there(self, shard):
        (source,) = locate(kept(("a.tar", 1), ("a.tar", 6), ("a.tar", 9)), shard)
        with pytest.raises(TableError, match=r"sample 6 \(and 1 more\) of a\.tar isn't there, the shard has 6"):
            self.passed(source)

    def test_copies_are_made_before_the_shard_is_closed(self, shard, tmp_path):
        (source,) = locate(kept(("a.tar", 0), ("a.tar", 1)), shard)
        waiting = []
        with (tmp_path / "out").open("wb") as out:

            def copy_now():
                for passage, carrier in waiting:
                    carrier.copy(passage, out.fileno())

            waiting.extend(source.passages(-1, StandIns(), copy_now))
        assert (tmp_path / "out").read_bytes() == pair("k0") + pair("k1")

    def test_damage_behind_the_last_kept_sample_does_not_matter(self, tmp_path):
        path = tmp_path / "a.tar"
        path.write_bytes(pair("k0") + pair("k1") + pair("k2") + b"rubbish" * 300)
        refs = [ShardRef(str(path), "a.tar", -1, "")]
        (source,) = locate(kept(("a.tar", 0), ("a.tar", 1)), refs)
        assert self.passed(source) == [0, 1]
        (source,) = locate(kept(("a.tar", 0), ("a.tar", 2)), refs)
        with pytest.raises(TableError, match="^sample 2 of a.tar can't be read: the shard is damaged"):
            self.passed(source)
