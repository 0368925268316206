"""Which row a rating is about, and what can be compared."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import FUZZ
from zscore.errors import TableError, UsageError
from zscore.evaluation import evaluate
from zscore.human import Ratings, aggregate
from zscore.matching import match

LEVELS = tuple(1 + k / 2 for k in range(9))
DIMENSIONS = ("alignment", "realism")


def scores_frame(rows, seed=0):
    """Rows (shard, index, key, group) as a scores table with random distributions; a None group is an unscored row."""
    rng = np.random.default_rng(seed)
    columns = {"shard": [], "index": [], "key": [], "group": []}
    for row in rows:
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    frame = pl.DataFrame(columns).with_columns(pl.col("shard").cast(pl.Categorical), pl.col("index").cast(pl.Int32))
    for name in DIMENSIONS:
        probs = rng.dirichlet(np.ones(9), size=len(rows)).astype(np.float32)
        frame = frame.with_columns(
            pl.Series(name, probs @ np.array(LEVELS, np.float32)),
            pl.Series(f"{name}_probs", probs, dtype=pl.Array(pl.Float32, 9)),
        )
    return frame.with_columns(overall=pl.mean_horizontal(DIMENSIONS))


def ratings_of(rows, columns, *, relative=False):
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    for name in ("dimension", "rater"):
        if name not in columns:
            frame = frame.with_columns(pl.lit("alignment" if name == "dimension" else None, pl.String).alias(name))
    return Ratings(frame.with_columns(pl.col("score").cast(pl.Float64)), relative, "human.csv")


def matched(scores, ratings, **options):
    return match(scores.lazy(), DIMENSIONS, ratings, aggregate(ratings, "mean"), **options)


class TestMatching:
    scores = scores_frame([("a.tar", 0, "x", "p"), ("a.tar", 1, "y", "p"), ("b.tar.gz", 0, "x", "q")])

    @pytest.mark.parametrize(
        "shards", [("a", "b"), ("a.tar", "b.tar.gz"), ("./a.tar", "b.tgz"), ("far/a", "far/b.tar")]
    )
    def test_shard_names_with_and_without_suffix(self, shards):
        a, b = shards
        found = matched(self.scores, ratings_of([(a, "x.png", 3), (a, "y", 4), (b, "x", 5)], ["shard", "key", "score"]))
        comparison = found.comparisons[0]
        assert comparison.human_N.tolist() == [3, 4, 5]
        assert comparison.group_N.tolist() == [0, 0, 1]
        assert comparison.score_N.tolist() == self.scores["alignment"].cast(pl.Float64).round(9).to_list()

    def test_key_alone(self):
        found = matched(self.scores, ratings_of([("some/folder/y.jpg", 4)], ["key", "score"]))
        assert found.by == "base name of the key"
        assert found.comparisons[0].score_N.size == 1

    def test_index(self):
        found = matched(self.scores, ratings_of([("a", 1, 4), ("b", 0, 2)], ["shard", "index", "score"]))
        assert found.by == "shard and index"
        assert found.comparisons[0].human_N.tolist() == [4, 2]

    def test_key_that_is_in_two_shards(self):
        with pytest.raises(TableError, match=r"1 samples .* 'x' is in 'a.tar' \(index 0\) and 'b.tar.gz' \(index 0\)"):
            matched(self.scores, ratings_of([("x", 4)], ["key", "score"]))

    def test_row_under_two_names(self):
        with pytest.raises(TableError, match="1 scored rows are rated under more than one name"):
            matched(self.scores, ratings_of([("y", 4), ("y.jpg", 3)], ["key", "score"]))

    def test_missing_samples(self):
        ratings = ratings_of([("y", 4), ("z", 3), ("w", 3)], ["key", "score"])
        with pytest.raises(TableError, match="2 of the 3 rated samples .* first: key '[zw]'.*--allow-missing"):
            matched(self.scores, ratings)
        found = matched(self.scores, ratings, allow_missing=True)
        assert (found.rated, found.missing, found.comparisons[0].score_N.size) == (3, 2, 1)

    def test_nothing_matches(self):
        with pytest.raises(
            TableError, match="none of the 1 rated samples .* key 'z'.* shard 'a.tar', index 0, key 'x'"
        ):
            matched(self.scores, ratings_of([("z", 4)], ["key", "score"]), allow_missing=True)

    def test_unscored_rows_are_left_out_and_counted(self):
        scores = self.scores.with_columns(
            pl.when(pl.col("key") == "y").then(None).otherwise(pl.col(name)).alias(name)
            for name in ("overall", *DIMENSIONS)
        )
        found = matched(scores, ratings_of([("a", "x", 1), ("a", "y", 4)], ["shard", "key", "score"]))
        assert found.unscored == 1
        assert found.comparisons[0].score_N.size == 1

    def test_dimensions_that_differ(self):
        ratings = ratings_of([("y", "alignment", 4), ("y", "mood", 3)], ["key", "dimension", "score"])
        found = matched(self.scores, ratings)
        assert [comparison.dimension for comparison in found.comparisons] == ["alignment"]
        assert found.not_compared == ("mood",)
        with pytest.raises(TableError, match="rates realizm, .*--map realizm=realism"):
            matched(self.scores, ratings_of([("y", "realizm", 4)], ["key", "dimension", "score"]))

    def test_overall_is_the_mean_of_what_both_have(self):
        rows = [("y", "alignment", 4), ("y", "realism", 3), ("a/../x", "realism", 1)]
        ratings = ratings_of(rows[:2], ["key", "dimension", "score"])
        overall = matched(self.scores, ratings).comparisons[-1]
        assert overall.dimension == "overall"
        assert overall.note == "mean of alignment, realism"
        assert overall.human_N.tolist() == [3.5]
        assert overall.score_N[0] == pytest.approx(self.scores["overall"][1], abs=1e-6)

    def test_groups(self):
        rows = [("a", "x", "one", 1), ("a", "y", "two", 2), ("b", "x", "two", 3)]
        with_group = ratings_of(rows, ["shard", "key", "group", "score"])
        assert matched(self.scores, with_group).comparisons[0].group_N.tolist() == [0, 1, 1]
        assert matched(self.scores, with_group, by="key").comparisons[0].group_N.tolist() == [0, 1, 0]
        with pytest.raises(UsageError, match="--by grup: no such column, did you mean group"):
            matched(self.scores, with_group, by="grup")

    def test_one_picture_in_many_votes(self):
        rows = [("y", "v1", 1), ("q", "v1", 0), ("y", "v2", 0), ("q", "v2", 1)]
        scores = scores_frame([("a.tar", 0, "q", "p"), ("a.tar", 1, "y", "p")])
        found = matched(scores, ratings_of(rows, ["key", "group", "score"], relative=True))
        report = evaluate(found, LEVELS).dimensions[0]
        assert report.pairs == 2
        assert report.metrics["hpa"].value == 0.5
        assert report.metrics["plcc"].value is None
        assert "one group only" in report.metrics["margin_hpa"].undefined
        assert report.distribution == {}


names = st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y", "z"]))


class TestLikeALoop:
    @settings(FUZZ, max_examples=40)
    @given(st.lists(names, unique=True, min_size=1), st.lists(names, unique=True, min_size=1), st.booleans())
    def test_by_shard_and_key(self, scored, rated, suffixes):
        scores = scores_frame([(f"{shard}.tar", i, key, f"p{key}") for i, (shard, key) in enumerate(scored)])
        ending = (".tar", ".png") if suffixes else ("", "")
        rows = [(shard + ending[0], key + ending[1], 1 + i / 8) for i, (shard, key) in enumerate(rated)]
        ratings = ratings_of(rows, ["shard", "key", "score"])
        there = [pair for pair in rated if pair in scored]
        if not there:
            with pytest.raises(TableError, match="none of the"):
                matched(scores, ratings, allow_missing=True)
            return
        if len(there) < len(rated):
            with pytest.raises(TableError, match=f"{len(rated) - len(there)} of the {len(rated)} rated samples"):
                matched(scores, ratings)
        found = matched(scores, ratings, allow_missing=True)
        (comparison,) = found.comparisons
        expected = sorted(
            (round(float(scores["alignment"][scored.index(pair)]), 9), 1 + rated.index(pair) / 8) for pair in there
        )
        pairs = zip(comparison.score_N.tolist(), comparison.human_N.tolist(), strict=True)
        assert sorted(pairs) == [pytest.approx(one) for one in expected]
        assert found.missing == len(rated) - len(there)
        assert len(set(comparison.group_N.tolist())) == len({key for _, key in there})
