"""What choosing from a group brings: the best, a random pick, and the expected best of n candidates.

The expected best of n is exact, not sampled: of the N candidates of a group, the one with rank j (from 0) is the best
of n drawn without replacement with probability C(N − 1 − j, n − 1) / C(N, n). At n = 1 this is the mean, at n = N the
maximum.

Array legend: G groups, N candidates of a group, M candidates of all, C points of the curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import polars as pl

from zscore.table_output import fetch, sink

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zscore.ranking import Ranking
    from zscore.tables import Scores

# Every n up to here, then doubling: a curve is flat by then.
DENSE_POINTS = 32


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The expected best of n, over the groups that have as many candidates."""

    n: int
    groups: int
    best: float
    random: float
    """Mean of the same groups: what a random pick scores."""


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Means over groups, each group counted once; NaN where there are none."""

    groups: int
    candidates: int
    smallest: int
    median: float
    largest: int
    """Candidates of a group."""
    best: float
    random: float
    curve: tuple[CurvePoint, ...]

    @property
    def gain(self) -> float:
        """Of the best over a random pick."""
        return self.best - self.random


def group_statistics(ranking: Ranking) -> GroupStatistics:
    """Statistics of all groups."""
    scores_M, sizes = ranking.scores(), ranking.sizes()
    # Of all groups of one size: how many, and the sum of their j-th best scores.
    totals: dict[int, tuple[int, NDArray[np.float64]]] = {}
    for groups, at in ranking.by_size():
        count, sum_N = totals.get(at.shape[1], (0, np.zeros(at.shape[1])))
        totals[at.shape[1]] = count + len(groups), sum_N + scores_M[at].sum(axis=0, dtype=np.float64)
    count = max(ranking.groups, 1)
    points = curve_points(max(totals, default=0))
    best_C, groups_C, random_C = (np.zeros(len(points)) for _ in range(3))
    for size, (number, sum_N) in totals.items():
        reached = points <= size
        best_C[reached] += sum_N @ weights(size, points[reached])
        groups_C[reached] += number
        random_C[reached] += sum_N.sum() / size
    curve = (
        CurvePoint(int(n), int(number), float(best / number), float(random / number))
        for n, number, best, random in zip(points, groups_C, best_C, random_C, strict=True)
    )
    return GroupStatistics(
        groups=ranking.groups,
        candidates=len(ranking.key_M),
        smallest=min(totals, default=0),
        median=float(np.median(sizes)) if len(sizes) else 0.0,
        largest=max(totals, default=0),
        best=sum(float(sum_N[0]) for _, sum_N in totals.values()) / count if totals else float("nan"),
        random=sum(float(sum_N.mean()) for _, sum_N in totals.values()) / count if totals else float("nan"),
        curve=tuple(curve),
    )


def curve_points(largest: int) -> NDArray[np.int64]:
    """Numbers of candidates for which the curve is computed: every one up to 32, then doubling, and the largest."""
    points = list(range(1, min(largest, DENSE_POINTS) + 1))
    while points and points[-1] < largest:
        points.append(min(points[-1] * 2, largest))
    return np.array(points, dtype=np.int64)


def weights(size: int, points: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(the candidate of rank j is the best of n drawn from `size`), shape (size, C); columns sum to 1."""
    weight_NC = np.zeros((size, len(points)))
    weight_NC[0] = points / size
    for j in range(size - 1):
        weight_NC[j + 1] = weight_NC[j] * np.maximum(size - j - points, 0) / (size - 1 - j)
    return weight_NC


def write_statistics(scores: Scores, by: str, ranking: Ranking, stream: IO[bytes], metadata: dict[str, Any]) -> None:
    """Write a row per group, in the order of the groups' first rows: its name, candidates, best, mean and gain."""
    scores_M, start_G = ranking.scores(), ranking.start_G[:-1]
    order_G = np.argsort(ranking.first_G)
    sums_G = np.add.reduceat(scores_M, start_G, dtype=np.float64) if len(start_G) else np.zeros(0)
    first_N = np.zeros(scores.rows, dtype=bool)
    first_N[ranking.first_G] = True
    found = fetch(scores.where(first_N).select(by), scores.name)
    best, mean = scores_M[start_G], (sums_G / ranking.sizes()).astype(np.float32)
    found = found.with_columns(
        candidates=pl.Series(ranking.sizes()[order_G]),
        best=pl.Series(best[order_G]),
        mean=pl.Series(mean[order_G]),
        gain=pl.Series((best - mean)[order_G]),
    )
    sink(found.lazy(), stream, metadata, scores.name)
