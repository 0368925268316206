"""Given reasonings: whose they are."""

from __future__ import annotations

import json

import pytest

from tests.trainers import world_set
from zscore.errors import TableError
from zscore.records import Failure, Sample, Status
from zscore_trainers.recipes import load_recipe
from zscore_trainers.told import read_told
from zscore_trainers.train import TrainOptions, train
from zscore_trainers.world.shards import WorldOptions, write_world

RUBRIC = world_set.RUBRIC


def line(**changes):
    return {"key": "p0", "dimension": "realism", "reasoning": "so", "score": 3} | changes


def table(folder, *lines):
    (folder / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return read_told(str(folder / "r.jsonl"), RUBRIC)


def sample(shard="a/x.tar", index=0, key="p0", failure=None):
    return Sample(shard, index, key, "a dog", "", b"", failure)


class TestWhoseTheyAre:
    def test_a_key_that_one_sample_has(self, tmp_path):
        found = table(tmp_path, line(), line(key="p1"))
        found.check([sample(), sample(index=1, key="p1"), sample(index=2, key="p2")])
        assert [one in found for one in (sample(), sample(key="p2"))] == [True, False]

    def test_a_key_that_two_samples_have(self, tmp_path):
        """Also where one of the two can't be read: the words may be about that one."""
        found = table(tmp_path, line())
        for failure in (None, Failure(Status.BAD_IMAGE, "broken")):
            with pytest.raises(TableError) as raised:
                found.check([sample(), sample(shard="b/x.tar", failure=failure)])
            said = (
                "r.jsonl: key 'p0' is of sample 0 of a/x.tar and sample 0 of b/x.tar: give shard and index in its lines"
            )
            assert said in str(raised.value)

    def test_shard_and_index_tell_them_apart(self, tmp_path):
        found = table(tmp_path, line(shard="a/x.tar", index=0), line(shard="b/x.tar", index=0, score=4))
        both = [sample(), sample(shard="b/x.tar")]
        found.check(both)
        assert [found.target(one)[RUBRIC.names.index("realism")].argmax() for one in both] == [4, 6]

    def test_one_sample_in_both_ways(self, tmp_path):
        found = table(tmp_path, line(), line(shard="a/x.tar", index=0, dimension="alignment"))
        with pytest.raises(
            TableError, match=r"sample 0 of a/x.tar has lines by its key 'p0' and by its shard and index"
        ):
            found.check([sample()])


def test_two_folders_of_shards_with_the_same_keys(tmp_path):
    for seed, name in enumerate("ab"):
        write_world(tmp_path / "shards" / name, WorldOptions(prompts=2, candidates=2, raters=1, seed=seed))
    options = TrainOptions(
        algorithm="rewarddance",
        data=str(tmp_path / "shards" / "a" / "reasoning.jsonl"),
        shards=(str(tmp_path / "shards"),),
        model=str(world_set.body(tmp_path / "body")),
        out=tmp_path / "run",
    )
    with pytest.raises(TableError, match="give shard and index in its lines"):
        train(options, load_recipe("tiny", ("steps=1", "held_out=0"), "rewarddance"))
