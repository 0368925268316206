"""How samples are spread over shards, and what is added to them."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
import threading

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import BLOCK, FUZZ, member
from zscore.errors import OutputError, TableError
from zscore.passages import Passage
from zscore.records import ShardRef
from zscore.shard_writer import RECORD, UNFINISHED, ShardSize, ShardWriter, score_member, shard_name
from zscore.sources import Source
from zscore.store import LocalStore

SOURCE = Source(ShardRef("/somewhere/a.tar", "a.tar", -1, ""), "a.tar", pl.DataFrame())


class Memory:
    """A carrier whose samples are made up."""

    can_wait = True

    def __init__(self):
        self.copies = []

    def copy(self, passage, target):
        self.copies.append(passage.index)
        os.write(target, member(f"{passage.key}.jpg", bytes(passage.size - BLOCK)))


def sample(index, key=None, blocks=2):
    passage = Passage(index, key if key is not None else f"k{index}", {"jpg"})
    passage.add(0, blocks * BLOCK)
    return passage


def fill(folder, passages, size, **options):
    """The shards that come of these samples."""
    done = []
    carrier = Memory()
    with ShardWriter(LocalStore(folder), "out", 0, size, done.append) as writer:
        for passage in passages:
            writer.add(SOURCE, passage, carrier, options.get("row"))
        writer.drain()
    assert carrier.copies == [passage.index for passage in passages]
    return done


def packed_by_hand(passages, size):
    """Samples a shard, by a plain loop."""
    shards = []
    for passage in passages:
        full = not shards or (
            (size.samples is not None and len(shards[-1]) >= size.samples)
            or (size.bytes is not None and sum(one.size for one in shards[-1]) >= size.bytes)
            or shards[-1][-1].key == passage.key
        )
        if full:
            shards.append([])
        shards[-1].append(passage)
    return [len(shard) for shard in shards]


class TestShards:
    @settings(FUZZ, max_examples=40)
    @given(
        st.lists(st.tuples(st.sampled_from("aabcd"), st.integers(1, 6)), max_size=25),
        st.one_of(
            st.builds(lambda n: ShardSize(samples=n), st.integers(1, 7)),
            st.builds(lambda n: ShardSize(bytes=n), st.integers(1, 9000)),
        ),
    )
    def test_like_a_plain_loop(self, tmp_path_factory, drawn, size):
        folder = tmp_path_factory.mktemp("shards")
        passages = [sample(index, key, blocks) for index, (key, blocks) in enumerate(drawn)]
        done = fill(folder, passages, size)
        assert [shard.samples for shard in done] == packed_by_hand(passages, size)
        assert [shard.name for shard in done] == [shard_name("out", number) for number in range(len(done))]
        names = []
        for shard in done:
            path = folder / shard.name
            assert path.stat().st_size == shard.size
            assert shard.size % RECORD == 0
            with tarfile.open(path) as tar:
                found = tar.getnames()
            assert all(left != right for left, right in itertools.pairwise(found))
            names += found
        assert names == [f"{passage.key}.jpg" for passage in passages]
        if done:
            assert (done[-1].source, done[-1].index) == ("a.tar", len(passages) - 1)

    def test_names_go_on_from_a_number(self, tmp_path):
        done = []
        with ShardWriter(LocalStore(tmp_path), "x", 7, ShardSize(samples=1), done.append) as writer:
            writer.add(SOURCE, sample(0), Memory(), None)
            writer.add(SOURCE, sample(1), Memory(), None)
        assert [shard.name for shard in done] == ["x-000007.tar", "x-000008.tar"]

    def test_no_samples_no_shard(self, tmp_path):
        assert fill(tmp_path / "none", [], ShardSize(samples=1)) == []
        assert not (tmp_path / "none").exists()

    def test_a_shard_is_there_before_it_is_reported(self, tmp_path):
        there = []
        with ShardWriter(
            LocalStore(tmp_path),
            "x",
            0,
            ShardSize(samples=2),
            lambda shard: there.append((tmp_path / shard.name).exists()),
        ) as writer:
            for index in range(5):
                writer.add(SOURCE, sample(index), Memory(), None)
        assert there == [True, True, True]

    def test_few_shards_wait_for_their_names(self, tmp_path):
        """Each holds a descriptor and, before an upload, room in the temporary folder."""
        begun, slow = [], threading.Event()

        class Store(LocalStore):
            def write(self, name):
                begun.append(name)
                return super().write(name)

        def wait(shard):
            slow.wait(0.5 if shard.name == "x-000000.tar" else 0)
            waits.append(len(begun))

        waits = []
        with ShardWriter(Store(tmp_path), "x", 0, ShardSize(samples=1), wait) as writer:
            for index in range(40):
                writer.add(SOURCE, sample(index), Memory(), None)
        assert waits[0] <= UNFINISHED + 1
        assert len(waits) == 40


class TestFailures:
    def leftovers(self, folder):
        return sorted(path.name for path in folder.iterdir())

    def test_an_error_of_the_caller_drops_the_shard_that_was_begun(self, tmp_path):
        with (
            pytest.raises(KeyError),
            ShardWriter(LocalStore(tmp_path), "x", 0, ShardSize(samples=2), lambda _: None) as writer,
        ):
            for index in range(3):
                writer.add(SOURCE, sample(index), Memory(), None)
            writer.drain()
            raise KeyError
        assert self.leftovers(tmp_path) in (["x-000000.tar"], [])

    def test_an_error_of_the_disk_comes_in_words(self, tmp_path):
        class Full(Memory):
            def copy(self, passage, target):
                if passage.index == 3:
                    raise OSError(28, "No space left on device")
                super().copy(passage, target)

        carrier = Full()
        with (
            pytest.raises(OutputError, match=r"x-000001\.tar: No space left on device"),
            ShardWriter(LocalStore(tmp_path), "x", 0, ShardSize(samples=2), lambda _: None) as writer,
        ):
            for index in range(10):
                writer.add(SOURCE, sample(index), carrier, None)
        assert self.leftovers(tmp_path) == ["x-000000.tar"]

    def test_an_error_on_the_last_sample_is_not_lost(self, tmp_path):
        class Broken(Memory):
            def copy(self, passage, target):
                raise OSError(5, "Input/output error")

        with (
            pytest.raises(OutputError, match=r"kept sample 0 of a\.tar can't be copied: Input/output error"),
            ShardWriter(LocalStore(tmp_path), "x", 0, ShardSize(samples=2), lambda _: None) as writer,
        ):
            writer.add(SOURCE, sample(0), Broken(), None)
        assert self.leftovers(tmp_path) == []

    def test_an_error_of_the_report_ends_it_and_leaves_nothing_half_done(self, tmp_path):
        def refuse(shard):
            if shard.name == "x-000001.tar":
                raise ValueError("enough")

        with (
            pytest.raises(ValueError, match="enough"),
            ShardWriter(LocalStore(tmp_path), "x", 0, ShardSize(samples=1), refuse) as writer,
        ):
            for index in range(50):
                writer.add(SOURCE, sample(index), Memory(), None)
        assert self.leftovers(tmp_path) == ["x-000000.tar", "x-000001.tar"]

    def test_a_carrier_that_cannot_wait_is_copied_at_once(self, tmp_path):
        class Hasty(Memory):
            can_wait = False

        carrier = Hasty()
        with ShardWriter(LocalStore(tmp_path), "x", 0, ShardSize(samples=9), lambda _: None) as writer:
            for index in range(4):
                writer.add(SOURCE, sample(index), carrier, None)
                assert carrier.copies == list(range(index + 1))


class TestScoreMember:
    def read(self, data):
        with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * BLOCK))) as tar:
            info = tar.next()
            return info, json.load(tar.extractfile(info))

    def test_values(self):
        row = {
            "overall": 3.140000104904175,
            "alignment_probs": [0.1, float("nan"), 0.8999999761581421],
            "realism": float("inf"),
            "width": 512,
            "group": "ü",
            "plausibility": None,
        }
        info, found = self.read(score_member(SOURCE, sample(1, "dir/key"), row))
        assert info.name == "dir/key.zscore.json"
        assert (info.mtime, info.mode, info.uid) == (0, 0o644, 0)
        assert found == {
            "overall": 3.14,
            "alignment_probs": [0.1, None, 0.9],
            "realism": None,
            "width": 512,
            "group": "ü",
            "plausibility": None,
        }

    @pytest.mark.parametrize("key", ["k", "d" * 90 + "/" + "e" * 60, "long" * 60, "ключ/图", "a b'c\"d"])
    def test_names_of_any_length(self, key):
        data = score_member(SOURCE, sample(1, key), {"overall": 1.0})
        assert len(data) % BLOCK == 0
        assert self.read(data)[0].name == f"{key}.zscore.json"

    def test_the_size_counts(self, tmp_path):
        row = {"overall": 1.0}
        added = len(score_member(SOURCE, sample(0), row))
        (shard,) = fill(tmp_path, [sample(0), sample(1)], ShardSize(samples=5), row=row)
        assert shard.size == -(-(2 * (2 * BLOCK + added) + 2 * BLOCK) // RECORD) * RECORD

    def test_a_sample_that_has_one(self):
        passage = sample(4, "k")
        passage.suffixes.add("zscore.json")
        with pytest.raises(TableError, match=r"sample 4 \('k'\) of a.tar has a .zscore.json member already"):
            score_member(SOURCE, passage, {})

    def test_a_name_that_is_no_text(self):
        with pytest.raises(TableError, match="isn't UTF-8"):
            score_member(SOURCE, sample(1, "b\\xfcd"), {})
        score_member(SOURCE, sample(1, "b\\xyz"), {})  # a backslash of its own
