"""How well the model's distributions match the raters' histograms: NLL, RPS, EMD, calibration error, coverage.

Raters mostly give whole points where a rubric may have half ones. Both sides are put on the raters' scale first: mass
between two of its points is split so that the mean stays (two-hot). Otherwise a model that says 3.5 of a picture which
one rater calls 3 and the next 4 would be infinitely wrong.

Array legend: N samples, K levels of the rubric, J points of the raters' scale, R ratings of all samples, M forecasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

    from zscore.agreement import Floats

# float32 probabilities underflow to 0; one such sample would make the mean NLL infinite.
FLOOR = 1e-7
BINS = 10
COVERAGE_LEVELS = (0.5, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class Scale:
    """The raters' scale."""

    points_J: Floats
    from_levels_KJ: Floats
    """Splits a distribution over levels into one over the points; rows sum to 1."""

    def __str__(self) -> str:
        """As a user would write it."""
        return ", ".join(f"{point:g}" for point in self.points_J)


def raters_scale(values_K: Floats, ratings_R: Floats) -> Scale:
    """The rubric's whole points where all ratings are whole and its ends are too, else all its levels."""
    whole_K = values_K == np.round(values_K)
    only_whole = bool(np.all(ratings_R == np.round(ratings_R))) and whole_K[0] and whole_K[-1]
    points_J = values_K[whole_K] if only_whole else values_K
    return Scale(points_J, two_hot(values_K, points_J))


def two_hot(values_R: Floats, points_J: Floats) -> Floats:
    """Each value as weights on its two neighbouring points, with the same mean; outside, all on the end. (R, J)."""
    clipped_R = np.clip(values_R, points_J[0], points_J[-1])
    right_R = np.clip(np.searchsorted(points_J, clipped_R, side="left"), 1, points_J.size - 1)
    share_R = (clipped_R - points_J[right_R - 1]) / (points_J[right_R] - points_J[right_R - 1])
    weights_RJ = np.zeros((values_R.size, points_J.size))
    rows_R = np.arange(values_R.size)
    weights_RJ[rows_R, right_R - 1] = 1 - share_R
    weights_RJ[rows_R, right_R] = share_R
    return weights_RJ


def flat_ratings(ratings: pl.Series) -> tuple[Floats, NDArray[np.int64]]:
    """All ratings of a list column, and the sample that each is of."""
    counts_N = ratings.list.len().to_numpy().astype(np.int64)
    return ratings.list.explode().to_numpy().astype(np.float64), np.repeat(np.arange(counts_N.size), counts_N)


def histograms(ratings: pl.Series, scale: Scale) -> tuple[Floats, int]:
    """Raters' distributions on the scale, shape (N, J), and how many ratings lay outside it (counted at its ends)."""
    values_R, sample_R = flat_ratings(ratings)
    weights_RJ = two_hot(values_R, scale.points_J)
    sums_NJ = np.stack([np.bincount(sample_R, column_R, len(ratings)) for column_R in weights_RJ.T], axis=1)
    outside = int(np.sum((values_R < scale.points_J[0]) | (values_R > scale.points_J[-1])))
    return sums_NJ / sums_NJ.sum(axis=1, keepdims=True), outside


def nll(probs_NJ: Floats, human_NJ: Floats) -> Floats:
    """Mean negative log-likelihood of a sample's ratings in nats, shape (N,); probabilities are floored at 1e-7."""
    return np.asarray(-(human_NJ * np.log(np.maximum(probs_NJ, FLOOR))).sum(axis=1))


def rps(probs_NJ: Floats, human_NJ: Floats, points_J: Floats) -> Floats:
    """Ranked probability score ∫(F − H)² in rubric units, shape (N,)."""
    gap_NJ = np.cumsum(probs_NJ - human_NJ, axis=1)[:, :-1]
    return np.asarray((gap_NJ**2 * np.diff(points_J)).sum(axis=1))


def emd(probs_NJ: Floats, human_NJ: Floats, points_J: Floats) -> Floats:
    """Earth mover's (1-Wasserstein) distance ∫|F − H| in rubric units, shape (N,)."""
    gap_NJ = np.cumsum(probs_NJ - human_NJ, axis=1)[:, :-1]
    return np.asarray((np.abs(gap_NJ) * np.diff(points_J)).sum(axis=1))


def coverage(probs_NJ: Floats, human_NJ: Floats, level: float) -> Floats:
    """Share of a sample's ratings inside the model's central interval of that level, shape (N,).

    The interval ends on points of the scale, so it holds at least `level`: a calibrated model covers that or more.
    """
    below_NJ = np.cumsum(probs_NJ, axis=1)
    tail = (1 - level) / 2
    # 1e-9: a sum of float32 probabilities that is the tail but for rounding.
    low_N1 = np.argmax(below_NJ > tail + 1e-9, axis=1)[:, None]
    high_N1 = np.argmax(below_NJ >= 1 - tail - 1e-9, axis=1)[:, None]
    point_J = np.arange(probs_NJ.shape[1])
    return np.asarray(np.where((point_J >= low_N1) & (point_J <= high_N1), human_NJ, 0.0).sum(axis=1))


def calibration_error(probs_NJ: Floats, human_NJ: Floats) -> float:
    """Expected calibration error: mean |predicted − observed| over bins, weighted by their forecasts.

    Each sample makes J − 1 forecasts P(score ≥ point), one for every point but the lowest; the outcome is the share of
    its raters at or above that point. Chance differences in a bin count as error, so it is too large on few samples.
    """
    forecast_M = np.clip(1 - np.cumsum(probs_NJ, axis=1)[:, :-1], 0, 1).ravel()
    outcome_M = np.clip(1 - np.cumsum(human_NJ, axis=1)[:, :-1], 0, 1).ravel()
    bin_M = np.minimum((forecast_M * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bin_M, forecast_M - outcome_M, BINS)
    return float(np.abs(gaps).sum() / max(forecast_M.size, 1))
