"""Correlations and pairwise accuracy against scipy and plain Python, and their bootstrap replicates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zscore import agreement
from zscore.agreement import Bootstrap, Estimate

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


class TestInvariance:
    """What must not change the numbers doesn't."""

    @settings(max_examples=40, deadline=None)
    @given(samples.filter(lambda rows: len(rows) > 2), st.randoms(use_true_random=False))
    def test_order_of_the_samples(self, rows, random):
        shuffled = random.sample(rows, len(rows))
        assert self.metrics(rows) == pytest.approx(self.metrics(shuffled), nan_ok=True)

    @settings(max_examples=40, deadline=None)
    @given(samples.filter(lambda rows: len(rows) > 2))
    def test_ranks_only_see_order(self, rows):
        stretched = [(group, score**3 + 10, 7 * human) for group, score, human in rows]
        for name, value in self.metrics(rows).items():
            if name != "plcc":
                assert self.metrics(stretched)[name] == pytest.approx(value, nan_ok=True), name

    @settings(max_examples=40, deadline=None)
    @given(samples.filter(lambda rows: len(rows) > 2))
    def test_the_other_way_round(self, rows):
        turned = [(group, -score, human) for group, score, human in rows]
        right, wrong = self.metrics(rows), self.metrics(turned)
        for name in ("plcc", "srcc", "krcc"):
            assert wrong[name] == pytest.approx(-right[name], nan_ok=True)
        assert wrong["hpa_half_ties"] == pytest.approx(1 - right["hpa_half_ties"], nan_ok=True)

    @settings(max_examples=40, deadline=None)
    @given(samples)
    def test_groups_by_any_number(self, rows):
        renamed = [(97 - 13 * group, score, human) for group, score, human in rows]
        assert self.metrics(rows) == pytest.approx(self.metrics(renamed), nan_ok=True)

    def metrics(self, rows):
        score, human, group = arrays(rows)
        groups = len(set(group.tolist()))
        points, _ = agreement.correlations(score, human, group, groups)
        pairs, _ = agreement.accuracies(agreement.count_pairs(score, human, group, groups))
        return {name: math.nan if one.value is None else one.value for name, one in (points | pairs).items()}


class TestBootstrap:
    def estimate(self, values, group, **options):
        groups = int(group.max()) + 1
        points = {"mean": Estimate(float(values.mean()))}
        functions = {"mean": agreement.mean_of(values, group, groups)}
        Bootstrap(**options).estimates(points, functions, (groups, values.size))
        return points["mean"]

    def test_the_seed_decides(self):
        values, group = np.random.default_rng(0).normal(size=60), np.arange(60) // 3
        first = self.estimate(values, group, seed=1)
        assert first == self.estimate(values, group, seed=1)
        assert first != self.estimate(values, group, seed=2)

    def test_a_higher_level_is_wider(self):
        values, group = np.random.default_rng(0).normal(size=60), np.arange(60) // 3
        narrow, wide = (self.estimate(values, group, level=level) for level in (0.8, 0.99))
        assert wide.low < narrow.low < narrow.value < narrow.high < wide.high

    def test_prompts_are_drawn_and_not_samples(self):
        """Twenty copies of a sample tell as much as one."""
        values = np.random.default_rng(0).normal(size=15)
        alone = self.estimate(values, np.arange(15), replicates=4000)
        copies = self.estimate(np.repeat(values, 20), np.repeat(np.arange(15), 20), replicates=4000)
        assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
        as_if_new = self.estimate(np.repeat(values, 20), np.arange(300), replicates=4000)
        assert as_if_new.high - as_if_new.low < (alone.high - alone.low) / 2

    def test_like_the_formula_for_a_mean(self):
        values = np.random.default_rng(1).normal(size=400)
        found = self.estimate(values, np.arange(400), replicates=4000)
        error = values.std() / np.sqrt(400)
        assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
        assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)

    def test_undefined_points_stay_as_they_are(self):
        points = {"a": Estimate(None, undefined="for a reason"), "b": Estimate(1.0)}
        functions = {"a": lambda W: W[:, 0], "b": lambda W: np.full(len(W), np.nan)}
        Bootstrap(replicates=10).estimates(points, functions, (3, 3))
        assert points["a"] == Estimate(None, undefined="for a reason")
        assert points["b"] == Estimate(1.0, undefined="too few prompts for an interval")

    def test_replicates_without_a_value_are_left_out(self):
        points = {"b": Estimate(1.0)}
        Bootstrap(replicates=100).estimates(points, {"b": lambda W: np.where(W[:, 0] > 0, 2.0, np.nan)}, (3, 3))
        assert (points["b"].low, points["b"].high) == (2.0, 2.0)
