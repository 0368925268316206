"""Given reasonings: whose they are, and how well held-out scores follow from them."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from tests.trainers import world_set
from zscore.errors import TableError
from zscore.records import Failure, Sample, Status
from zscore_trainers import held_out
from zscore_trainers.data import TrainSet
from zscore_trainers.held_out import HeldOut, HeldOutTold, turns
from zscore_trainers.recipes import load_recipe
from zscore_trainers.sequences import with_output
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


def test_separators_within_a_reasoning_and_empty_lines(tmp_path):
    """Raw, as JSON allows it: a line of the file ends at a newline alone."""
    words = "It is\u2028clean.\x85"
    (tmp_path / "r.jsonl").write_text(json.dumps(line(reasoning=words), ensure_ascii=False) + "\n\n")
    found = read_told(str(tmp_path / "r.jsonl"), RUBRIC)
    (said,) = found._words["p0"].values()
    assert said.reasoning == words


def test_a_key_that_is_none(tmp_path):
    with pytest.raises(TableError, match=r"r\.jsonl, line 1: a JSON object with key, .* \(unhashable type: 'list'\)"):
        table(tmp_path, line(key=["p0"]))


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


class TestHeldOut:
    def test_scores_are_read_behind_the_given_reasonings(self, tmp_path):
        """In batches as one by one; a sample of which nothing is said on a dimension isn't compared there."""
        model, world = world_set.body(tmp_path / "body"), tmp_path / "world"
        full = world_set.world_set(world, prompts=3)
        lines = [json.loads(one) for one in (world / "reasoning.jsonl").read_text().splitlines()]
        found = table(tmp_path, *(one for number, one in enumerate(lines) if number % 5))
        targets = np.stack([found.target(one) for one in full.samples])
        collator = world_set.collator(TrainSet(full.samples, full.places, targets), world, model, "reasoning")
        policy, told = world_set.load(model).eval(), found.outputs(collator)
        with closing(collator.pictures):
            evaluate = HeldOutTold(HeldOut(collator, RUBRIC.names, RUBRIC.values, 5), collator, told, 5)
            mu_ND = evaluate.means(policy)
            agreement = evaluate(policy)
            for one in told:
                prompt = collator.prompts([one.sample])[0][one.dimension]
                with torch.no_grad():
                    output = policy(collator.pad([with_output(prompt, one.written)]), with_logprobs=False)
                wanted = float(output.score_logits_BDK[0, 0].softmax(-1) @ torch.tensor(RUBRIC.values))
                assert mu_ND[one.sample, one.dimension] == pytest.approx(wanted, abs=1e-4)
        assert len(told) == np.isfinite(targets).all(-1).sum() == np.count_nonzero(mu_ND) < mu_ND.size
        assert "hpa_overall" in agreement

    @pytest.mark.parametrize("ranks", [1, 2, 3, 7])
    def test_ranks_take_turns(self, monkeypatch, ranks):
        """Everything counts once, and all ranks compute as often."""
        monkeypatch.setattr(held_out.parallel, "ranks", lambda: ranks)
        counted, often = [], set()
        for rank in range(ranks):
            monkeypatch.setattr(held_out.parallel, "rank", lambda rank=rank: rank)
            mine = list(turns(11, 4))
            often.add(len(mine))
            counted += [number for some, counts in mine if counts for number in some]
        assert sorted(counted) == list(range(11))
        assert len(often) == 1
