"""Distribution quality against scipy, and on models that are calibrated by construction."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zscore import distribution_metrics

LEVELS = tuple(1 + k / 2 for k in range(9))


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
        assert distribution_metrics.calibration_error(probs, drawn) < 0.005
        for level in (0.5, 0.8, 0.9):
            assert distribution_metrics.coverage(probs, drawn, level).mean() >= level

    def test_why_the_calibration_error_has_no_interval(self):
        """Of a calibrated model, intervals from drawn prompts lie above the truth, which is 0."""
        rng = np.random.default_rng(0)
        lows = []
        for _ in range(20):
            probs = rng.dirichlet(np.ones(5), size=120)
            human = np.array([rng.multinomial(5, row) / 5 for row in probs])
            drawn = rng.integers(0, 120, size=(100, 120))
            again = [distribution_metrics.calibration_error(probs[i], human[i]) for i in drawn]
            lows.append(np.quantile(again, 0.025))
        assert min(lows) > 0.005

    def test_a_certain_and_wrong_model_is_not(self):
        probs, human = np.eye(5)[[0] * 3], np.eye(5)[[4] * 3]
        assert distribution_metrics.calibration_error(probs, human) == 1
        assert distribution_metrics.coverage(probs, human, 0.9).tolist() == [0, 0, 0]
        assert distribution_metrics.nll(probs, human) == pytest.approx(-np.log(1e-7))
        assert distribution_metrics.emd(probs, human, np.arange(1.0, 6)).tolist() == [4, 4, 4]


class TestProperties:
    seeds = st.integers(0, 10_000)

    def draw(self, seed, samples=6, points=5):
        rng = np.random.default_rng(seed)
        return rng.dirichlet(np.ones(points), size=samples), rng.dirichlet(np.full(points, 0.4), size=samples)

    @settings(max_examples=40, deadline=None)
    @given(seeds)
    def test_nothing_is_better_than_the_truth(self, seed):
        probs, human = self.draw(seed)
        points = np.arange(1.0, 6.0)
        assert distribution_metrics.rps(human, human, points) == pytest.approx(0)
        assert distribution_metrics.emd(human, human, points) == pytest.approx(0)
        assert (distribution_metrics.rps(probs, human, points) >= 0).all()
        assert (distribution_metrics.nll(probs, human) >= distribution_metrics.nll(human, human) - 1e-9).all()
        assert distribution_metrics.calibration_error(human, human) == pytest.approx(0)

    @settings(max_examples=40, deadline=None)
    @given(seeds)
    def test_emd_is_at_least_the_gap_of_the_means(self, seed):
        probs, human = self.draw(seed)
        points = np.arange(1.0, 6.0)
        gap = np.abs(probs @ points - human @ points)
        assert (distribution_metrics.emd(probs, human, points) >= gap - 1e-9).all()

    @settings(max_examples=40, deadline=None)
    @given(seeds)
    def test_rps_is_at_most_emd(self, seed):
        """A gap of two distribution functions is at most 1, so that its square is smaller."""
        probs, human = self.draw(seed)
        points = np.arange(1.0, 6.0)
        rps, emd = (f(probs, human, points) for f in (distribution_metrics.rps, distribution_metrics.emd))
        assert (rps <= emd + 1e-12).all()

    @settings(max_examples=40, deadline=None)
    @given(seeds, st.sampled_from([0.5, 0.8, 0.9]))
    def test_coverage_by_a_plain_loop(self, seed, level):
        probs, human = self.draw(seed)
        found = distribution_metrics.coverage(probs, human, level)
        tail = (1 - level) / 2
        for one, people, value in zip(probs, human, found, strict=True):
            below = np.cumsum(one)
            low = next(j for j in range(5) if below[j] > tail)
            high = next(j for j in range(5) if below[j] >= 1 - tail - 1e-9)
            assert one[low : high + 1].sum() >= level - 1e-9
            assert value == pytest.approx(people[low : high + 1].sum())

    @settings(max_examples=40, deadline=None)
    @given(seeds)
    def test_bins_by_a_plain_loop(self, seed):
        probs, human = self.draw(seed)
        counts, gaps = np.zeros(10), np.zeros(10)
        for one, people in zip(probs, human, strict=True):
            for j in range(1, 5):
                forecast = min(1 - one[:j].sum(), 1.0)
                place = min(int(forecast * 10), 9)
                counts[place] += 1
                gaps[place] += forecast - (1 - people[:j].sum())
        expected = np.abs(gaps).sum() / counts.sum()
        assert distribution_metrics.calibration_error(probs, human) == pytest.approx(expected)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.lists(st.integers(2, 10), min_size=1, max_size=6), min_size=1, max_size=6))
    def test_histograms_by_a_plain_loop(self, drawn):
        ratings = [[value / 2 for value in one] for one in drawn]
        flat = np.array([value for one in ratings for value in one])
        scale = distribution_metrics.raters_scale(np.array(LEVELS), flat)
        found, outside = distribution_metrics.histograms(pl.Series(ratings), scale)
        assert outside == 0
        assert found.sum(axis=1) == pytest.approx(np.ones(len(ratings)))
        for one, row in zip(ratings, found, strict=True):
            assert row @ scale.points_J == pytest.approx(np.mean(one))
            if all(value in scale.points_J for value in one):
                assert row == pytest.approx([one.count(point) / len(one) for point in scale.points_J])
