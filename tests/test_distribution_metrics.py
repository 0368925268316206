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
