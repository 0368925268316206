"""How well scores agree with people: correlations and pairwise accuracy, with cluster-bootstrap intervals.

Samples of one prompt aren't independent, so whole prompts are drawn with replacement. A replicate is a row of
multiplicities W_BG, and every statistic is a function of W_BG, so that all replicates are computed at once. The point
values come from scipy.

Array legend: N samples, G groups (prompts), B bootstrap replicates, U distinct values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Replicated = Callable[[Floats], Floats]

MIN_SAMPLES = 3
# Kendall's pairs are held as group × group matrices up to here (3 × 32 MB); above, scipy ranks every replicate anew.
KENDALL_MATRIX_SAMPLES = 2048
# Bounds that loop: 200 replicates of 100,000 samples take some 10 s. Fewer would be no interval.
KENDALL_LOOP_WORK = 20_000_000
MIN_DRAWS = 200
# Elements of one block of replicates: 32 MB of float64.
BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval, or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    undefined: str = ""
    """Why `value`, or else the interval, is None."""
    draws: int = 0
    """Replicates that the interval is made of: those that have a value, and no more than can be afforded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Percentile intervals from resampled prompts."""

    replicates: int = 1000
    level: float = 0.95
    seed: int = 0

    def blocks(self, groups: int, width: int) -> Iterator[Floats]:
        """Multiplicities W_BG, the same ones for the same seed and number of groups, in blocks of B × width ≤ BLOCK."""
        rng = np.random.default_rng(self.seed)
        rows = max(1, BLOCK // max(groups, width, 1))
        for start in range(0, self.replicates, rows):
            count = min(rows, self.replicates - start)
            drawn_BG = rng.integers(0, groups, size=(count, groups)) + groups * np.arange(count)[:, None]
            yield np.bincount(drawn_BG.ravel(), minlength=count * groups).reshape(count, groups).astype(np.float64)

    def estimates(self, points: dict[str, Estimate], functions: dict[str, Replicated], sizes: tuple[int, int]) -> None:
        """Fill in the intervals of the defined `points`; sizes = (groups, samples)."""
        groups, width = sizes
        wanted = {name: function for name, function in functions.items() if points[name].value is not None}
        if groups < 2:
            for name in wanted:
                points[name] = Estimate(points[name].value, undefined="one prompt only, so there is no interval")
            return
        values: dict[str, list[Floats]] = {name: [] for name in wanted}
        for W_BG in self.blocks(groups, width):
            for name, function in wanted.items():
                values[name].append(function(W_BG))
        for name, parts in values.items():
            points[name] = self._interval(points[name].value, np.concatenate(parts))

    def _interval(self, value: float | None, replicates_B: Floats) -> Estimate:
        if not replicates_B.size:
            return Estimate(value, undefined="too many samples for an interval")
        defined = replicates_B[np.isfinite(replicates_B)]
        # A replicate may draw one prompt only, and be constant; if most are, the rest say little.
        if defined.size * 2 < replicates_B.size or not defined.size:
            return Estimate(value, undefined="too few prompts for an interval")
        tail = (1 - self.level) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return Estimate(value, float(low), float(high), draws=defined.size)


def group_sums(values_NC: Floats, group_N: NDArray[np.int64], groups: int) -> Floats:
    """Sums of each column over each group, shape (G, C)."""
    columns = [np.bincount(group_N, weights=column, minlength=groups) for column in values_NC.T]
    return np.stack(columns, axis=1)


def mean_of(values_N: Floats, group_N: NDArray[np.int64], groups: int) -> Replicated:
    """Replicated mean of a per-sample quantity."""
    sums_G2 = group_sums(np.stack([np.ones_like(values_N), values_N], axis=1), group_N, groups)

    def replicated(W_BG: Floats) -> Floats:
        total_B2 = W_BG @ sums_G2
        return np.asarray(total_B2[:, 1] / total_B2[:, 0])

    return replicated


def correlations(
    score_N: Floats, human_N: Floats, group_N: NDArray[np.int64], groups: int
) -> tuple[dict[str, Estimate], dict[str, Replicated]]:
    """PLCC, SRCC and KRCC (tau-b): their values, and their functions of W_BG."""
    why = undefined_correlation(score_N, human_N)
    if why:
        return {name: Estimate(None, undefined=why) for name in ("plcc", "srcc", "krcc")}, {}
    # Centred: scipy warns of inputs that are nearly constant against their mean.
    x_N, y_N = score_N - score_N.mean(), human_N - human_N.mean()
    values = {
        "plcc": stats.pearsonr(x_N, y_N).statistic,
        "srcc": stats.spearmanr(score_N, human_N).statistic,
        "krcc": stats.kendalltau(score_N, human_N).statistic,
    }
    functions = {
        "plcc": _pearson(x_N, y_N, group_N, groups),
        "srcc": _spearman(score_N, human_N, group_N),
        "krcc": _kendall(score_N, human_N, group_N, groups),
    }
    return {name: Estimate(float(value)) for name, value in values.items()}, functions


def undefined_correlation(score_N: Floats, human_N: Floats) -> str:
    """Why a correlation has no value; empty where it has one."""
    if score_N.size < MIN_SAMPLES:
        return f"{score_N.size} samples, at least {MIN_SAMPLES} are needed"
    if np.ptp(score_N) == 0:
        return "all scores are equal"
    if np.ptp(human_N) == 0:
        return "all human scores are equal"
    return ""


def _ratio(top_B: Floats, squares_B: Floats) -> Floats:
    """Quotient top / √squares, NaN where the square is zero up to rounding."""
    safe_B = np.where(squares_B > 1e-12, squares_B, 1.0)
    return np.where(squares_B > 1e-12, np.clip(top_B / np.sqrt(safe_B), -1, 1), np.nan)


def _pearson(x_N: Floats, y_N: Floats, group_N: NDArray[np.int64], groups: int) -> Replicated:
    x_N, y_N = x_N / x_N.std(), y_N / y_N.std()
    moments_N6 = np.stack([np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=1)
    sums_G6 = group_sums(moments_N6, group_N, groups)

    def replicated(W_BG: Floats) -> Floats:
        total_B6 = W_BG @ sums_G6
        mean_B5 = total_B6[:, 1:] / total_B6[:, :1]
        x, y, xx, yy, xy = mean_B5.T
        return _ratio(xy - x * y, np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))

    return replicated


def _spearman(x_N: Floats, y_N: Floats, group_N: NDArray[np.int64]) -> Replicated:
    rankings = [_ranking(x_N), _ranking(y_N)]

    def replicated(W_BG: Floats) -> Floats:
        W_BN = W_BG[:, group_N]
        total_B1 = W_BN.sum(axis=1, keepdims=True)
        # Shares of the sample, so that squares are about 1 whatever its size.
        x_BN, y_BN = ((ranks(W_BN) / total_B1) - 0.5 for ranks in rankings)
        W_BN /= total_B1
        x_BN -= np.einsum("bn,bn->b", W_BN, x_BN)[:, None]
        y_BN -= np.einsum("bn,bn->b", W_BN, y_BN)[:, None]
        top_B = np.einsum("bn,bn,bn->b", W_BN, x_BN, y_BN)
        return _ratio(top_B, np.einsum("bn,bn->b", W_BN, x_BN**2) * np.einsum("bn,bn->b", W_BN, y_BN**2))

    return replicated


def _ranking(values_N: Floats) -> Replicated:
    """Average ranks of all samples in a replicate, as a function of their multiplicities W_BN."""
    distinct_U, value_N = np.unique(values_N, return_inverse=True)
    order_N = np.argsort(value_N, kind="stable")
    starts_U = np.searchsorted(value_N[order_N], np.arange(distinct_U.size))

    def ranks(W_BN: Floats) -> Floats:
        tied_BU = np.add.reduceat(W_BN[:, order_N], starts_U, axis=1)
        return np.asarray((np.cumsum(tied_BU, axis=1) - (tied_BU - 1) / 2)[:, value_N])

    return ranks


def _kendall(x_N: Floats, y_N: Floats, group_N: NDArray[np.int64], groups: int) -> Replicated:
    if x_N.size > KENDALL_MATRIX_SAMPLES:
        return _kendall_loop(x_N, y_N, group_N)
    # Signs of all pairs, summed over pairs of groups: a replicate is then a quadratic form. A sample drawn twice ties
    # with itself in both, and tau-b counts that pair nowhere, just as its sign 0 does.
    member_NG = np.zeros((x_N.size, groups))
    member_NG[np.arange(x_N.size), group_N] = 1
    sign_x_NN = np.sign(x_N[:, None] - x_N[None, :])
    sign_y_NN = np.sign(y_N[:, None] - y_N[None, :])
    pairs_3GG = [
        member_NG.T @ (signs_NN @ member_NG)
        for signs_NN in (sign_x_NN * sign_y_NN, np.abs(sign_x_NN), np.abs(sign_y_NN))
    ]

    def replicated(W_BG: Floats) -> Floats:
        top_B, x_B, y_B = (((W_BG @ pairs_GG) * W_BG).sum(axis=1) for pairs_GG in pairs_3GG)
        return _ratio(top_B, x_B * y_B)

    return replicated


def _kendall_loop(x_N: Floats, y_N: Floats, group_N: NDArray[np.int64]) -> Replicated:
    left = KENDALL_LOOP_WORK // x_N.size
    if left < MIN_DRAWS:
        return lambda _: np.empty(0)

    def replicated(W_BG: Floats) -> Floats:
        nonlocal left
        values = []
        for W_G in W_BG[:left].astype(np.int64):
            drawn = np.repeat(np.arange(x_N.size), W_G[group_N])
            x, y = x_N[drawn], y_N[drawn]
            values.append(math.nan if undefined_correlation(x, y) else stats.kendalltau(x, y).statistic)
        left -= len(values)
        return np.asarray(values, dtype=np.float64)

    return replicated


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Same-group pairs, counted per group; each array has shape (G,)."""

    right_G: Floats
    """Both order the pair alike."""
    score_tied_G: Floats
    """People prefer one, the scores tie."""
    pairs_G: Floats
    """People prefer one: the pairs of eq. 17."""
    human_tied_G: Floats
    """People don't prefer one."""
    both_tied_G: Floats
    """Of those, the scores tie too."""

    def summed(self, prompt_G: NDArray[np.int64], prompts: int) -> PairCounts:
        """The same, counted per prompt, where several groups are about one."""
        return PairCounts(*group_sums(np.stack(astuple(self), axis=1), prompt_G, prompts).T)


def count_pairs(
    score_N: Floats, human_N: Floats, group_N: NDArray[np.int64], groups: int, margin: float = 0.0
) -> PairCounts:
    """Count the pairs whose human gap is over `margin` (and, as human ties, those with no gap)."""
    order = np.argsort(group_N, kind="stable")
    x_N, y_N, g_N = score_N[order], human_N[order], group_N[order]
    counts = np.zeros((5, groups))
    largest = int(np.bincount(group_N, minlength=1).max()) if group_N.size else 0
    # Members of a group are adjacent now: pairs at distance 1, 2, … are shifted copies of the arrays.
    for distance in range(1, largest):
        same = g_N[distance:] == g_N[:-distance]
        group = g_N[distance:][same]
        dx = (x_N[distance:] - x_N[:-distance])[same]
        # Rounded, for 2.3 − 1.8 is over 0.5 in floating point.
        dy = np.round((y_N[distance:] - y_N[:-distance])[same], 9)
        over, tied = np.abs(dy) > margin, dy == 0
        for row, found in enumerate((over & (dx * dy > 0), over & (dx == 0), over, tied, tied & (dx == 0))):
            counts[row] += np.bincount(group[found], minlength=groups)
    return PairCounts(*counts)


def accuracies(counts: PairCounts, prefix: str = "") -> tuple[dict[str, Estimate], dict[str, Replicated]]:
    """Human preference accuracy (paper eq. 17), with ties counted each way.

    Returns:
        `hpa`: tied scores count as wrong, human ties are left out (the paper's). `hpa_half_ties`: tied scores count
        half. `hpa_with_human_ties`: human ties stay in and are right only where the scores tie too.
    """
    parts = {
        "hpa": (counts.right_G, counts.pairs_G),
        "hpa_half_ties": (counts.right_G + 0.5 * counts.score_tied_G, counts.pairs_G),
        "hpa_with_human_ties": (counts.right_G + counts.both_tied_G, counts.pairs_G + counts.human_tied_G),
    }
    points, functions = {}, {}
    for name, (right_G, all_G) in parts.items():
        total = all_G.sum()
        why = "" if total else "no pair of one prompt" + (" over the margin" if prefix else " with a human preference")
        points[prefix + name] = Estimate(float(right_G.sum() / total) if total else None, undefined=why)
        functions[prefix + name] = _share(right_G, all_G)
    return points, functions


def _share(right_G: Floats, all_G: Floats) -> Replicated:
    def replicated(W_BG: Floats) -> Floats:
        right_B, all_B = W_BG @ right_G, W_BG @ all_G
        return np.where(all_B > 0, right_B / np.maximum(all_B, 1), np.nan)

    return replicated
