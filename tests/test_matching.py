"""Which row a rating is about, and what can be compared."""

from __future__ import annotations

import itertools
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import FUZZ
from zscore.agreement import Bootstrap
from zscore.calibration import Calibration, Fit, apply_calibration, recalibrated
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


# Every column that either side of the join has, or had once; a dimension may be called any of these.
INTERNAL = (
    *("score", "scored", "ratings", "raters", "rater", "sample", "sample_group", "group_number", "dimension", "human"),
    *("_group", "_score", "_key", "_shard", "_index", "row", "by", "rated_group", "prompt_number", "on_key", "len"),
    *("score_scored", "ratings_scored", "probs", "alignment_scored", "prompt_n", "left_out", "_alignment"),
)


@pytest.mark.parametrize("name", INTERNAL)
class TestDimensionsCalledLikeColumns:
    def renamed(self, name):
        scores = scores_frame([("a.tar", i, f"k{i:02}", f"p{i // 2:02}") for i in range(30)])
        return scores.rename({"realism": name, "realism_probs": f"{name}_probs"})

    def test_its_scores_are_the_models(self, name):
        scores = self.renamed(name)
        human = np.random.default_rng(4).integers(1, 6, 30)
        rows = [(f"k{i:02}", dimension, int(human[i])) for i in range(30) for dimension in ("alignment", name)]
        ratings = ratings_of(rows, ["key", "dimension", "score"])
        found = match(scores.lazy(), ("alignment", name), ratings, aggregate(ratings, "mean"))
        by_name = {comparison.dimension: comparison for comparison in found.comparisons}
        assert list(by_name) == ["alignment", name, "overall"]
        for dimension in ("alignment", name, "overall"):
            one = by_name[dimension]
            assert one.score_N == pytest.approx(scores[dimension].cast(pl.Float64).to_numpy(), abs=1e-6)
            assert one.human_N.tolist() == human.tolist()
            assert one.group_N.tolist() == [i // 2 for i in range(30)]
            if dimension != "overall":
                assert one.probs_NK == pytest.approx(scores[f"{dimension}_probs"].to_numpy())

    def test_it_is_calibrated_for_itself(self, name):
        scores = self.renamed(name)
        fits = {"alignment": Fit(1.7, 0.4), name: Fit(0.8, -0.2)}
        found = apply_calibration(scores, Calibration(LEVELS, ("alignment", name), fits, {}, {}))
        assert found.columns == scores.columns
        for dimension, fit in fits.items():
            probs = recalibrated(scores[f"{dimension}_probs"].to_numpy(), np.array(LEVELS), fit.temperature, fit.shift)
            assert found[dimension].to_numpy() == pytest.approx(probs @ np.array(LEVELS), abs=1e-5)


class TestIndexAndKey:
    scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(6)])

    def test_both_must_fit(self):
        rows = [("a", i, f"k{i}.png", 1 + i / 2) for i in range(6)]
        found = matched(self.scores, ratings_of(rows, ["shard", "index", "key", "score"]))
        assert found.by == "shard, index and key"
        assert found.comparisons[0].human_N.tolist() == [1 + i / 2 for i in range(6)]

    @pytest.mark.parametrize("allow_missing", [False, True])
    @pytest.mark.parametrize("shift", [1, 100])
    @pytest.mark.parametrize("shard", [["a"], []])
    def test_an_index_that_counts_the_file_is_refused(self, shard, shift, allow_missing):
        """What `to_csv` of pandas writes after rows were sorted or dropped."""
        rows = [(*shard, i + shift, f"k{i}", 3) for i in range(5)]
        columns = [*(["shard"] if shard else []), "index", "key", "score"]
        message = f"5 samples .* index that isn't their key's; the first: key 'k0' is at index 0 .* and {shift} in"
        with pytest.raises(TableError, match=message):
            matched(self.scores, ratings_of(rows, columns), allow_missing=allow_missing)

    def test_a_sample_that_is_nowhere_is_just_missing(self):
        ratings = ratings_of([("a", 0, "k0", 3), ("a", 9, "k9", 3)], ["shard", "index", "key", "score"])
        with pytest.raises(TableError, match="1 of the 2 rated samples .* index 9, key 'k9'"):
            matched(self.scores, ratings)
        assert matched(self.scores, ratings, allow_missing=True).missing == 1

    def test_two_rows_of_one_key_are_told_apart(self):
        scores = scores_frame([("a.tar", 0, "x", "p"), ("a.tar", 1, "x", "p")])
        ratings = ratings_of([("a", 1, "x", 2), ("a", 0, "x", 5)], ["shard", "index", "key", "score"])
        assert matched(scores, ratings).comparisons[0].human_N.tolist() == [5, 2]


class TestWhatIsNotFinite:
    def scores(self, name, values):
        base = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(6)])
        return base.with_columns(pl.Series(name, values, dtype=base.schema[name]))

    ratings = ratings_of([(f"k{i}", name, i) for i in range(6) for name in DIMENSIONS], ["key", "dimension", "score"])

    def test_scores(self):
        nan, inf = float("nan"), float("inf")
        found = matched(self.scores("alignment", [nan, 2, inf, None, 3, 4]), self.ratings)
        left_out = {one.dimension: (one.human_N.size, one.left_out) for one in found.comparisons}
        assert left_out == {"alignment": (3, 3), "realism": (6, 0), "overall": (6, 0)}
        assert found.unscored == 0

    @pytest.mark.parametrize(
        "broken",
        [[float("nan")] * 9, [None] * 9, None, [0.5, None, *[0.0] * 7], [-1.0, 2.0, *[0.0] * 7], [0.0] * 9],
    )
    def test_distributions(self, broken):
        base = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(6)])
        scores = self.scores("realism_probs", [broken, *base["realism_probs"].to_list()[1:]])
        found = matched(scores, self.ratings)
        realism = found.comparisons[1]
        assert (realism.left_out, realism.human_N.tolist()) == (1, [1, 2, 3, 4, 5])
        assert realism.probs_NK == pytest.approx(base["realism_probs"].to_numpy()[1:])
        result = evaluate(found, LEVELS, bootstrap=Bootstrap(replicates=20))
        json.dumps(result.as_dict(), allow_nan=False)
        assert [one.left_out for one in result.dimensions] == [0, 1, 0]

    def test_lists_of_another_length(self):
        base = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(6)])
        lists = [[0.5, 0.5], *base["realism_probs"].to_list()[1:]]
        scores = base.with_columns(realism_probs=pl.Series(lists, dtype=pl.List(pl.Float32)))
        assert matched(scores, self.ratings).comparisons[1].left_out == 1

    def test_a_derived_mean_wants_all_its_parts(self):
        scores = self.scores("alignment", [None, 2, 3, 3, 3, 4]).drop("overall")
        overall = matched(scores, self.ratings).comparisons[-1]
        assert (overall.human_N.size, overall.left_out) == (5, 1)

    def test_all_of_them(self):
        found = matched(self.scores("realism_probs", [None] * 6), self.ratings)
        result = evaluate(found, LEVELS)
        assert result.dimensions[1].left_out == 6
        assert result.dimensions[1].distribution == {}
        json.dumps(result.as_dict(), allow_nan=False)


class TestVotesOfOnePrompt:
    """A prompt of forty votes is one prompt."""

    def votes(self, repeats):
        scores = scores_frame([("a.tar", i, f"k{i}", f"p{i // 2}") for i in range(10)])
        rows = []
        for prompt, repeat in itertools.product(range(5), range(repeats)):
            first = float(prompt % 2)
            for side, score in ((0, first), (1, 1 - first)):
                rows.append((f"k{2 * prompt + side}", f"vote-{prompt}-{repeat}", score))
        return scores, ratings_of(rows, ["key", "group", "score"], relative=True)

    def test_the_interval_is_as_wide_as_with_one_vote(self):
        found = {}
        for repeats in (1, 40):
            report = evaluate(matched(*self.votes(repeats)), LEVELS).dimensions[0]
            assert (report.groups, report.prompts, report.pairs) == (5 * repeats, 5, 5 * repeats)
            found[repeats] = report.metrics["hpa"]
        assert found[40] == found[1]
        assert 0 < found[1].value < 1
        assert found[1].high - found[1].low > 0.5

    def test_votes_of_two_prompts_stay_whole(self):
        scores = scores_frame([("a.tar", i, f"k{i}", f"p{i}") for i in range(4)])
        rows = [("k0", "v1", 1), ("k3", "v1", 0), ("k3", "v2", 1), ("k1", "v2", 0)]
        report = evaluate(matched(scores, ratings_of(rows, ["key", "group", "score"], relative=True)), LEVELS)
        assert report.dimensions[0].pairs == 2

    def test_by_names_prompts_and_leaves_votes_alone(self):
        scores, ratings = self.votes(3)
        by = scores.with_columns(theme=pl.when(pl.col("group") < "p2").then(pl.lit("a")).otherwise(pl.lit("b")))
        report = evaluate(matched(by, ratings, by="theme"), LEVELS).dimensions[0]
        assert (report.groups, report.prompts, report.pairs) == (15, 2, 15)


class TestSomeColumns:
    scores = scores_frame([("a.tar", i, f"k{i}", f"p{i // 3}") for i in range(9)])
    both = ratings_of([(f"k{i}", name, i % 5) for i in range(9) for name in DIMENSIONS], ["key", "dimension", "score"])
    overall = ratings_of([(f"k{i}", "overall", i % 5) for i in range(9)], ["key", "dimension", "score"])

    def test_key_group_and_overall(self):
        found = matched(self.scores.select("key", "group", "overall"), self.overall)
        assert [one.dimension for one in found.comparisons] == ["overall"]
        assert found.comparisons[0].score_N.size == 9

    def test_one_dimension_left(self):
        scores = self.scores.select("key", "group", "realism", "overall")
        found = matched(scores, self.both)
        assert [one.dimension for one in found.comparisons] == ["realism"]
        assert found.not_compared == ("alignment",)
        assert found.comparisons[0].probs_NK is None
        assert matched(scores.drop("overall"), self.both).comparisons[0].score_N.size == 9

    def test_overall_of_three_is_not_the_mean_of_two(self):
        found = match(self.scores.lazy(), (*DIMENSIONS, "mood"), self.both, aggregate(self.both, "mean"))
        means = self.scores.select(pl.mean_horizontal(DIMENSIONS)).to_series().cast(pl.Float64)
        assert found.comparisons[-1].score_N == pytest.approx(means.to_numpy())

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (["key", "overall"], "the table has no column 'group', but which says what pictures are of one prompt"),
            (["group", "overall"], "no column 'key', but human.csv names samples by it: was it made with --columns"),
            (["key", "group"], "the table has no column with scores"),
            (["key", "group", "realism"], "human.csv rates overall, the scores have realism"),
        ],
    )
    def test_what_is_missing_is_named(self, columns, message):
        with pytest.raises(TableError, match=message):
            matched(self.scores.select(columns), self.overall, source="the table")

    def test_no_group_is_needed_where_something_else_says_it(self):
        scores = self.scores.select("key", "overall")
        own = ratings_of([(f"k{i}", f"g{i % 2}", i) for i in range(9)], ["key", "group", "score"])
        own = Ratings(own.frame.with_columns(dimension=pl.lit("overall")), relative=False, source="human.csv")
        assert matched(scores, own).comparisons[0].group_N.max() == 1
        assert matched(scores, self.overall, by="key").comparisons[0].group_N.max() == 8


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
