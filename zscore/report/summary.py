"""What the charts and tables of a report show, counted over the whole table.

Charts get bins and never rows, so the page of a million pictures is as small as that of a hundred. Bins end at the
thresholds that the page offers. They are float32 and the scores what the table has (float64 in some made elsewhere),
as `zscore filter --min` compares them, so what the page counts at a threshold is what the command keeps.

Array legend: N scored rows, S scores (overall and dimensions), D dimensions, B bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from zscore.records import Status
from zscore.report.cards import MOST_FAULT, MOST_NAME, shorten
from zscore.report.columns import scored
from zscore.table_output import fetch
from zscore.tables import ROW, is_ok

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from zscore.report.columns import Columns
    from zscore.tables import Scores

# A slider of 350 px, a phone's, still has three pixels a stop.
MOST_STOPS = 100
WIDTH_BINS = 25
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BANDS = 4


@dataclass(frozen=True, slots=True)
class StatusCount:
    """How many rows have a status, and the first of them."""

    status: str
    count: int
    example: str
    """SHARD, sample INDEX; empty for `ok`."""
    error: str


@dataclass(frozen=True, slots=True)
class Grid:
    """The thresholds that the page offers, at equal steps over the range of the levels."""

    low: float
    step: float
    steps: int
    decimals: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The finest round step (1, 2 or 5 times a power of ten) that has at most `MOST_STOPS` over the range."""
        extent = max(high - low, 1e-6)
        power = math.floor(math.log10(extent / MOST_STOPS))
        # The tolerance lets (5 - 1) / 0.04 be 100 in spite of binary fractions.
        sizes = ((digit, exponent) for exponent in (power, power + 1) for digit in (1, 2, 5))
        digit, exponent = next(
            (digit, exponent) for digit, exponent in sizes if extent / (digit * 10.0**exponent) <= MOST_STOPS + 1e-6
        )
        step, decimals = digit * 10.0**exponent, max(0, -exponent)
        start = math.floor(low / step + 1e-6)
        steps = max(1, math.ceil(high / step - 1e-6) - start)
        return cls(round(start * step, decimals), round(step, decimals), steps, decimals)

    @property
    def stops(self) -> list[float]:
        """All thresholds, as people write them."""
        return [round(self.low + i * self.step, self.decimals) for i in range(self.steps + 1)]

    @property
    def high(self) -> float:
        """The last threshold."""
        return self.stops[-1]

    def bins(self, values_N: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Number of the stops that each value reaches: 0 is below the lowest, `steps` + 1 at or above the highest."""
        found: NDArray[np.int64] = np.searchsorted(np.asarray(self.stops, np.float32), values_N, side="right")
        return found

    def count(self, values_N: NDArray[np.floating[Any]], weights_N: NDArray[Any] | None = None) -> list[float]:
        """Rows, or their weights, by bin."""
        counted = np.bincount(self.bins(values_N), weights_N, minlength=self.steps + 2)
        return [float(value) for value in counted] if weights_N is not None else [int(value) for value in counted]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Every score and width of the table, in its own type, in memory: 36 bytes a row for four dimensions of float32."""

    row_N: NDArray[np.uint32]
    """Position in the table."""
    score: dict[str, NDArray[np.floating[Any]]]
    std: dict[str, NDArray[np.floating[Any]]]
    """NaN where the table has none."""

    def __len__(self) -> int:
        return len(self.row_N)


def read_statuses(scores: Scores) -> list[StatusCount]:
    """Rows by status, `ok` first, then the most frequent."""
    error = pl.col("error").cast(pl.String) if "error" in scores.schema else pl.lit(None, pl.String)
    found = fetch(
        scores.frame.with_row_index(ROW)
        .group_by(pl.col("status").cast(pl.String))
        .agg(
            pl.len().alias("count"),
            pl.col("shard").cast(pl.String).sort_by(ROW).first(),
            pl.col("index").sort_by(ROW).first(),
            error.sort_by(pl.col(ROW)).first().alias("error") if "error" in scores.schema else error.alias("error"),
        ),
        scores.name,
    )
    made = [
        StatusCount(
            status=shorten(str(row["status"]), MOST_NAME),
            count=row["count"],
            example=""
            if row["status"] == Status.OK
            else f"{shorten(str(row['shard']), MOST_NAME)}, sample {row['index']}",
            error=shorten(row["error"] or "", MOST_FAULT),
        )
        for row in found.iter_rows(named=True)
    ]
    return sorted(made, key=lambda line: (line.status != Status.OK, -line.count, line.status))


def read_numbers(scores: Scores, columns: Columns) -> Numbers:
    """All rows that have scores."""
    stds = [f"{name}_std" for name in columns.stds]
    wanted = [_number(scores, name) for name in (*columns.scores, *stds)]
    found = fetch(scored(scores, columns).select(ROW, *wanted), scores.name)
    return Numbers(
        row_N=found[ROW].to_numpy(),
        score={name: found[name].to_numpy() for name in columns.scores},
        std={name: found[f"{name}_std"].fill_null(math.nan).to_numpy() for name in columns.stds},
    )


def _number(scores: Scores, name: str) -> pl.Expr:
    """The column as numpy has it: float64 stays, as rounding it would lift scores over a threshold."""
    return pl.col(name) if scores.schema[name] == pl.Float64 else pl.col(name).cast(pl.Float32)


def count_unscored(scores: Scores, numbers: Numbers) -> int:
    """Rows whose status is ok although a score is NaN, infinite or missing."""
    return int(fetch(scores.frame.filter(is_ok()).select(pl.len()), scores.name).item()) - len(numbers)


def count_pictures(scores: Scores, columns: Columns) -> int | None:
    """Different pictures among the scored rows; None where the table doesn't say, or not of all."""
    if "sha256" not in scores.schema:
        return None
    digests = pl.col("sha256")
    found = fetch(scored(scores, columns).select(digests.n_unique(), nulls=digests.null_count()), scores.name)
    return None if found["nulls"][0] else int(found["sha256"][0])


def grid_for(values: Sequence[float], numbers: Numbers) -> Grid:
    """The grid over the levels, or over the scores where files of different levels are mixed."""
    if values:
        return Grid.over(min(values), max(values))
    low = min(float(score_N.min()) for score_N in numbers.score.values())
    return Grid.over(low, max(float(score_N.max()) for score_N in numbers.score.values()))


def describe(numbers: Numbers) -> list[dict[str, Any]]:
    """Mean, std and quantiles of every score."""
    lines = []
    for name, score_N in numbers.score.items():
        wide_N = score_N.astype(np.float64)
        quantiles = [float(value) for value in np.quantile(wide_N, QUANTILES)]
        ends = {"lowest": float(score_N.min()), "highest": float(score_N.max())}
        lines.append(
            {"name": name, "mean": float(wide_N.mean()), "std": float(wide_N.std()), "quantiles": quantiles, **ends}
        )
    return lines


def threshold_bins(numbers: Numbers, grid: Grid) -> dict[str, Any]:
    """For every score: rows by bin, and the sum of every score by bin, which give the means of what is kept."""
    counts, sums = [], []
    for by_N in numbers.score.values():
        counts.append(grid.count(by_N))
        sums.append([[round(total, 4) for total in grid.count(by_N, of_N)] for of_N in numbers.score.values()])
    return {"counts": counts, "sums": sums}


def correlations(score: Mapping[str, NDArray[np.floating[Any]]], names: Sequence[str]) -> dict[str, Any]:
    """Spearman's and Pearson's correlation of every two dimensions; None where one doesn't vary."""
    frame = pl.DataFrame({name: score[name].astype(np.float64) for name in names})
    ranks = frame.select(pl.all().rank())
    return {"names": list(names), "spearman": _matrix(ranks), "pearson": _matrix(frame)}


def _matrix(frame: pl.DataFrame) -> list[list[float | None]]:
    values_DN = frame.to_numpy().T
    varies_D = [bool(row.size and row.min() < row.max()) for row in values_DN]
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix_DD = np.atleast_2d(np.corrcoef(values_DN)) if frame.height > 1 else np.zeros((len(varies_D),) * 2)
    return [
        [round(float(matrix_DD[i, j]), 4) if varies_D[i] and varies_D[j] else None for j in range(len(varies_D))]
        for i in range(len(varies_D))
    ]


def uncertainty(numbers: Numbers, grid: Grid) -> list[dict[str, Any]]:
    """For every dimension that has a std: rows by cell of mean and std, and the typical std by band of the mean.

    The widest distribution with mean m on levels from a to b has the std sqrt((m - a)(b - m)), at most half the range;
    that half is the height of the chart.
    """
    tallest = (grid.high - grid.low) / 2
    found = []
    for name, std_N in numbers.std.items():
        there_N = np.isfinite(std_N)
        mean_N, wide_N = numbers.score[name][there_N], std_N[there_N]
        # Two stops make a column; the stops at both ends belong to the columns beside them.
        column_N = np.clip(grid.bins(mean_N) - 1, 0, grid.steps - 1) // 2
        # Clipped before the cast: what int64 can't hold would come out as its lowest number.
        height_N = np.clip(wide_N, 0, tallest) / tallest * WIDTH_BINS
        row_N = np.minimum(height_N.astype(np.int64), WIDTH_BINS - 1)
        cells = np.bincount(column_N * WIDTH_BINS + row_N)
        taken = np.flatnonzero(cells)
        found.append(
            {
                "name": name,
                "cells": [[int(at // WIDTH_BINS), int(at % WIDTH_BINS), int(cells[at])] for at in taken],
                "bands": _bands(mean_N, wide_N, grid),
            }
        )
    return found


def _bands(mean_N: NDArray[np.floating[Any]], std_N: NDArray[np.floating[Any]], grid: Grid) -> list[dict[str, Any]]:
    """Count, median and 90 % quantile of the std in `BANDS` equal parts of the range."""
    edges = np.linspace(grid.low, grid.high, BANDS + 1)
    band_N = np.clip(np.searchsorted(edges, mean_N, side="right") - 1, 0, BANDS - 1)
    bands = []
    for band in range(BANDS):
        inside = std_N[band_N == band]
        low, high = float(edges[band]), float(edges[band + 1])
        median, most = (float(value) for value in np.quantile(inside, (0.5, 0.9))) if inside.size else (None, None)
        bands.append({"low": low, "high": high, "count": int(inside.size), "median": median, "p90": most})
    return bands
