"""Metrics against plain Python and scipy, the join, and the command."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zscore import agreement, distribution_metrics
from zscore.agreement import Bootstrap, Estimate
from zscore.errors import TableError, UsageError
from zscore.evaluation import evaluate
from zscore.human import Ratings, aggregate
from zscore.matching import match
from zscore.votes import gsb, read_votes

LEVELS = tuple(1 + k / 2 for k in range(9))
DIMENSIONS = ("alignment", "realism")

# Few distinct values, so that ties are common.
samples = st.lists(st.tuples(st.integers(0, 4), st.integers(2, 6), st.integers(2, 6)), min_size=0, max_size=24)


def arrays(rows):
    group, score, human = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return np.asarray(score, float) / 2, np.asarray(human, float) / 2, np.unique(group, return_inverse=True)[1]


def naive_hpa(rows, margin=0.0):
    """Eq. 17 by two loops: (paper, half ties, with human ties), None where there are no pairs."""
    right = half = pairs = ties = tied_right = 0
    for (ga, sa, ha), (gb, sb, hb) in itertools.combinations(rows, 2):
        if ga != gb:
            continue
        if ha == hb:
            ties += 1
            tied_right += sa == sb
        elif abs(ha - hb) / 2 > margin:
            pairs += 1
            right += (sa - sb) * (ha - hb) > 0
            half += 0.5 * (sa == sb)
    shares = [(right, pairs), (right + half, pairs), (right + tied_right, pairs + ties)]
    return [top / bottom if bottom else None for top, bottom in shares]


def expanded(W_G, group_N):
    """The samples of a replicate, written out."""
    return np.repeat(np.arange(group_N.size), W_G[group_N].astype(int))


class TestPairs:
    @settings(max_examples=80, deadline=None)
    @given(samples, st.sampled_from([0.0, 0.5, 1.0]))
    def test_like_two_loops(self, rows, margin):
        score, human, group = arrays(rows)
        groups = len(set(group.tolist()))
        counts = agreement.count_pairs(score, human, group, groups, margin)
        points, _ = agreement.accuracies(counts)
        assert [points[name].value for name in ("hpa", "hpa_half_ties", "hpa_with_human_ties")] == pytest.approx(
            naive_hpa(rows, margin)
        )

    def test_one_candidate_groups_have_no_pairs(self):
        score, human, group = arrays([(0, 2, 3), (1, 4, 5), (2, 3, 3)])
        points, _ = agreement.accuracies(agreement.count_pairs(score, human, group, 3))
        assert points["hpa"].value is None
        assert points["hpa"].undefined == "no pair of one prompt with a human preference"

    def test_margin_is_over_and_not_at(self):
        # 2.3 - 1.8 is 0.5000000000000002 in floating point.
        score, human = np.array([1.0, 2.0, 3.0]), np.array([1.8, 2.3, 2.9])
        counts = agreement.count_pairs(score, human, np.zeros(3, int), 1, 0.5)
        assert counts.pairs_G.tolist() == [2]


class TestReplicates:
    """A bootstrap replicate equals scipy's statistic of the samples written out."""

    @settings(max_examples=40, deadline=None)
    @given(samples.filter(lambda rows: len(rows) > 2), st.integers(0, 1000))
    def test_correlations(self, rows, seed):
        score, human, group = arrays(rows)
        groups = len(set(group.tolist()))
        points, functions = agreement.correlations(score, human, group, groups)
        if not functions:
            assert points["plcc"].value is None
            return
        assert points["plcc"].value == pytest.approx(stats.pearsonr(score, human).statistic)
        functions["loop"] = agreement._kendall_loop(score, human, group)
        W_BG = np.concatenate(list(Bootstrap(replicates=5, seed=seed).blocks(groups, len(rows))))
        found = {name: function(W_BG) for name, function in functions.items()}
        reference = {
            "plcc": stats.pearsonr,
            "srcc": stats.spearmanr,
            "krcc": stats.kendalltau,
            "loop": stats.kendalltau,
        }
        for row, W_G in enumerate(W_BG):
            drawn = expanded(W_G, group)
            x, y = score[drawn], human[drawn]
            constant = np.ptp(x) == 0 or np.ptp(y) == 0
            for name, statistic in reference.items():
                if constant:
                    assert math.isnan(found[name][row]), name
                elif len(drawn) > 2:
                    assert found[name][row] == pytest.approx(statistic(x, y).statistic, abs=1e-9), name

    @settings(max_examples=50, deadline=None)
    @given(samples.filter(bool), st.integers(0, 1000))
    def test_pairs(self, rows, seed):
        score, human, group = arrays(rows)
        groups = len(set(group.tolist()))
        _, functions = agreement.accuracies(agreement.count_pairs(score, human, group, groups))
        W_BG = next(Bootstrap(replicates=4, seed=seed).blocks(groups, len(rows)))
        for row, W_G in enumerate(W_BG):
            # A group drawn twice is two groups: pairs across the copies aren't pairs of one prompt.
            copies = [
                (10 * g + copy, int(2 * s), int(2 * h))
                for g, s, h in zip(group, score, human, strict=True)
                for copy in range(int(W_G[g]))
            ]
            for name, value in zip(("hpa", "hpa_half_ties", "hpa_with_human_ties"), naive_hpa(copies), strict=True):
                assert functions[name](W_BG)[row] == pytest.approx(math.nan if value is None else value, nan_ok=True)

    def test_blocks_do_not_change_the_draws(self, monkeypatch):
        whole = np.concatenate(list(Bootstrap(replicates=50).blocks(7, 7)))
        monkeypatch.setattr(agreement, "BLOCK", 70)
        parts = list(Bootstrap(replicates=50).blocks(7, 7))
        assert len(parts) == 5
        assert np.array_equal(np.concatenate(parts), whole)
        assert (whole.sum(axis=1) == 7).all()

    def test_interval_covers_the_truth(self):
        # 120 data sets of known correlation 0.6 in clusters of 3: about 95 % of the intervals should hold it.
        rng = np.random.default_rng(5)
        group = np.repeat(np.arange(60), 3)
        inside = 0
        for seed in range(120):
            shared = rng.normal(size=(60, 2))[group]
            own = rng.normal(size=(180, 2))
            base = np.sqrt(0.5) * shared + np.sqrt(0.5) * own
            x, y = base[:, 0], 0.6 * base[:, 0] + 0.8 * base[:, 1]
            points = {"plcc": Estimate(stats.pearsonr(x, y).statistic)}
            functions = {"plcc": agreement._pearson(x - x.mean(), y - y.mean(), group, 60)}
            Bootstrap(replicates=200, seed=seed).estimates(points, functions, (60, 180))
            inside += points["plcc"].low <= 0.6 <= points["plcc"].high
        assert 105 <= inside <= 120

    def test_one_prompt_has_no_interval(self):
        points, functions = agreement.correlations(np.arange(4.0), np.arange(4.0), np.zeros(4, int), 1)
        Bootstrap().estimates(points, functions, (1, 4))
        assert points["plcc"].value == pytest.approx(1)
        assert points["plcc"].low is None
        assert points["plcc"].undefined == "one prompt only, so there is no interval"


class TestDistributions:
    grids = st.sampled_from([np.arange(1.0, 6.0), np.array(LEVELS)])

    @settings(max_examples=60, deadline=None)
    @given(grids, st.lists(st.floats(0, 6), min_size=1, max_size=20))
    def test_two_hot_keeps_the_mean(self, points, values):
        weights = distribution_metrics.two_hot(np.array(values), points)
        assert weights.sum(axis=1) == pytest.approx(np.ones(len(values)))
        assert (weights >= 0).all()
        assert weights @ points == pytest.approx(np.clip(values, 1, 5))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10_000))
    def test_like_scipy(self, seed):
        rng = np.random.default_rng(seed)
        points = np.array(LEVELS)
        probs, human = rng.dirichlet(np.ones(9), size=4), rng.dirichlet(np.full(9, 0.3), size=4)
        found = distribution_metrics.emd(probs, human, points)
        rps = distribution_metrics.rps(probs, human, points)
        nll = distribution_metrics.nll(probs, human)
        for row in range(4):
            u, v = probs[row], human[row]
            assert found[row] == pytest.approx(stats.wasserstein_distance(points, points, u, v))
            assert rps[row] == pytest.approx(0.5 * np.sum(np.subtract(np.cumsum(u), np.cumsum(v))[:-1] ** 2))
            assert nll[row] == pytest.approx(stats.entropy(v) + stats.entropy(v, np.maximum(u, 1e-7)), abs=1e-4)

    def test_half_levels_go_to_the_raters_whole_points(self):
        scale = distribution_metrics.raters_scale(np.array(LEVELS), np.array([1.0, 4.0]))
        assert str(scale) == "1, 2, 3, 4, 5"
        probs = np.eye(9)[[5]] @ scale.from_levels_KJ  # all on 3.5
        assert probs.tolist() == [[0, 0, 0.5, 0.5, 0]]
        assert distribution_metrics.raters_scale(np.array(LEVELS), np.array([1.5])).points_J.tolist() == list(LEVELS)
        odd = np.array([0.5, 1.0, 2.0])  # its end isn't a whole point
        assert distribution_metrics.raters_scale(odd, np.array([1.0])).points_J.tolist() == odd.tolist()

    def test_ratings_outside_the_scale_are_counted(self):
        scale = distribution_metrics.raters_scale(np.array(LEVELS), np.array([1.0]))
        human, outside = distribution_metrics.histograms(pl.Series([[0.0, 7.0, 7.0, 3.0]]), scale)
        assert outside == 3
        assert human.tolist() == [[0.25, 0, 0.25, 0, 0.5]]

    def test_a_calibrated_model_is_calibrated(self):
        rng = np.random.default_rng(0)
        probs = rng.dirichlet(np.ones(5), size=4000)
        drawn = np.array([rng.multinomial(20, row) for row in probs]) / 20
        sums = distribution_metrics.bin_sums(probs, drawn)
        assert distribution_metrics.calibration_error(sums.sum(axis=0)) < 0.005
        for level in (0.5, 0.8, 0.9):
            assert distribution_metrics.coverage(probs, drawn, level).mean() >= level

    def test_a_certain_and_wrong_model_is_not(self):
        probs, human = np.eye(5)[[0] * 3], np.eye(5)[[4] * 3]
        sums = distribution_metrics.bin_sums(probs, human).sum(axis=0)
        assert distribution_metrics.calibration_error(sums) == 1
        assert distribution_metrics.coverage(probs, human, 0.9).tolist() == [0, 0, 0]
        assert distribution_metrics.nll(probs, human) == pytest.approx(-np.log(1e-7))
        assert distribution_metrics.emd(probs, human, np.arange(1.0, 6)).tolist() == [4, 4, 4]


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


class TestEvaluate:
    def test_everything_at_once(self):
        scores = scores_frame([("a.tar", i, f"k{i}", f"p{i // 4}") for i in range(40)])
        rng = np.random.default_rng(1)
        rows = [
            (f"k{i}", name, str(rater), int(np.clip(round(scores[name][i] + rng.normal()), 1, 5)))
            for i in range(40)
            for name in DIMENSIONS
            for rater in range(5)
        ]
        ratings = ratings_of(rows, ["key", "dimension", "rater", "score"])
        found = match(scores.lazy(), DIMENSIONS, ratings, aggregate(ratings, "trimmed"))
        result = evaluate(found, LEVELS, bootstrap=Bootstrap(replicates=200, seed=3))
        assert [report.dimension for report in result.dimensions] == ["alignment", "realism", "overall"]
        for report in result.dimensions:
            assert report.samples == 40
            assert report.groups == 10
            for name, estimate in (report.metrics | report.distribution).items():
                assert estimate.low <= estimate.value <= estimate.high or name == "ece"
        assert result.dimensions[0].ratings == 120  # three of five are left
        assert result.dimensions[0].scale == "1, 2, 3, 4, 5"
        assert result == evaluate(found, LEVELS, bootstrap=Bootstrap(replicates=200, seed=3))
        json.dumps(result.as_dict(), allow_nan=False)

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_few_samples(self, count):
        scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(5)])
        rows = [(f"k{i}", i + 1) for i in range(count)] or [("k0", 1)]
        result = evaluate(matched(scores, ratings_of(rows, ["key", "score"])), LEVELS)
        report = result.dimensions[0]
        assert report.metrics["srcc"].undefined == f"{max(count, 1)} samples, at least 3 are needed"
        json.dumps(result.as_dict(), allow_nan=False)

    def test_constant_scores(self):
        scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(5)]).with_columns(alignment=pl.lit(3.0))
        result = evaluate(matched(scores, ratings_of([(f"k{i}", i) for i in range(5)], ["key", "score"])), LEVELS)
        metrics = result.dimensions[0].metrics
        assert metrics["plcc"].undefined == "all scores are equal"
        assert metrics["hpa"].value == 0
        assert metrics["hpa_half_ties"].value == 0.5

    def test_float32_noise_does_not_break_ties(self):
        scores = scores_frame([("a.tar", i, f"k{i}", "p") for i in range(3)]).with_columns(
            alignment=pl.Series([1 / 3, 1 / 3 + 1e-12, 2.0])
        )
        result = evaluate(matched(scores, ratings_of([("k0", 1), ("k1", 2), ("k2", 3)], ["key", "score"])), LEVELS)
        assert result.dimensions[0].score_ties == 1

    def test_big_kendall_goes_through_the_loop(self, monkeypatch):
        monkeypatch.setattr(agreement, "KENDALL_MATRIX_SAMPLES", 2)
        monkeypatch.setattr(agreement, "KENDALL_LOOP_WORK", 500)
        x = np.random.default_rng(0).normal(size=50)
        points, functions = agreement.correlations(x, x, np.arange(50), 50)
        Bootstrap(replicates=100).estimates(points, functions, (50, 50))
        assert points["krcc"].low == pytest.approx(1)


class TestGsb:
    @pytest.mark.parametrize(
        ("text", "counts"),
        [
            ("vote\ngood\nGood\n same \nbad\n", (2, 1, 1)),
            ("prompt_id,vote\n1,G\n1,S\n2,B\n", (1, 1, 1)),
            ("prompt,GSB\np,1\np,0\nq,-1\nq,-1\n", (1, 1, 2)),
            ("good,same,bad\n3,2,1\n0,0,4\n", (3, 2, 5)),
            ("vote_type\nleftvote\nrightvote\ntievote\nbothbad_vote\n", (1, 2, 1)),
        ],
    )
    def test_counts(self, tmp_path, text, counts):
        path = tmp_path / "votes.csv"
        path.write_text(text)
        result = gsb(read_votes(str(path)), Bootstrap(replicates=100))
        assert (result.good, result.same, result.bad) == counts
        assert result.gsb.value == pytest.approx((counts[0] - counts[2]) / sum(counts))

    def test_interval_is_over_prompts(self, tmp_path):
        path = tmp_path / "votes.csv"
        # 20 votes on 2 prompts that disagree: as if there were two votes.
        path.write_text("prompt,vote\n" + "a,good\n" * 10 + "b,bad\n" * 10)
        result = gsb(read_votes(str(path)), Bootstrap())
        assert (result.prompts, result.gsb.low, result.gsb.high) == (2, -1, 1)

    def test_no_votes(self, tmp_path):
        path = tmp_path / "votes.csv"
        path.write_text("vote\n")
        assert gsb(read_votes(str(path)), Bootstrap()).gsb.undefined == "no votes"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("vote\ngood\nfine\n", "1 votes are neither good, same nor bad; the first: 'fine'"),
            ("good,bad\n1,2\n", "neither a 'vote' column nor"),
            ("good,same,bad\n1,x,2\n", "1 rows whose counts"),
            ("good,same,bad\n1,-1,2\n", "1 rows whose counts"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, text, message):
        path = tmp_path / "votes.csv"
        path.write_text(text)
        with pytest.raises(TableError, match=message):
            read_votes(str(path))
