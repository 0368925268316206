"""The rows that a report shows: best, worst, most uncertain, and some groups side by side.

Ties go by the position in the table. A picture that lies in it several times is shown once a gallery, and is among the
best or the worst but not both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from zscore.report.columns import scored
from zscore.table_output import fetch
from zscore.tables import ROW

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from zscore.report.columns import Columns
    from zscore.report.summary import Grid, Numbers
    from zscore.tables import Scores

# Rows that are looked at together, so that only so many become numbers of Python's own.
LOOK = 1 << 12
GROUP_SIZE = 8
_BASE = ("shard", "index", "key", "prompt", "group", "width", "height", "sha256")


@dataclass(frozen=True, slots=True)
class Gallery:
    """Rows under one heading."""

    title: str
    note: str
    """How they were chosen."""
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates for one prompt, best first."""

    name: str
    prompt: str
    size: int
    gain: float
    """Of the best over the mean."""
    rows: list[dict[str, Any]]
    """All, or the best and the worst half of `GROUP_SIZE`."""


@dataclass(frozen=True, slots=True)
class GroupStats:
    """All groups of a table; rows without a group are left out."""

    groups: int
    several: int
    """Groups of at least two scored candidates; what follows is about them."""
    sizes: tuple[int, int, int]
    """Fewest, median and most candidates."""
    mean: float
    """Of a candidate picked at random, averaged over the groups."""
    best: float
    """Of the best candidate, averaged over the groups."""
    covered: list[list[float]]
    """For every score: groups by the bin of their best candidate (all groups, also those of one)."""
    chosen: list[str]
    """The groups whose candidates differ most, widest first."""


def choose_galleries(scores: Scores, columns: Columns, numbers: Numbers, top: int) -> list[Gallery]:
    """Best, worst and most uncertain rows, `top` of each at most; no picture is among the best and the worst."""
    lead_N = numbers.score[columns.lead]
    picture_N = _pictures(scores, numbers)
    each = min(top, (len(np.unique(picture_N)) + 1) // 2)
    name = columns.lead
    best = _choose(_order(-lead_N), picture_N, each)
    worst = _choose(_order(lead_N), picture_N, each, frozenset(picture_N[best].tolist()))
    chosen = [("Best", f"The highest {name}.", best), ("Worst", f"The lowest {name}.", worst)]
    if columns.stds:
        wide_N = np.asarray([numbers.std[dimension] for dimension in columns.stds], np.float64).mean(axis=0)
        note = "The widest distributions, by the mean of the dimensions’ standard deviations."
        chosen.append(("Most uncertain", note, _choose(_order(-wide_N), picture_N, top)))
    kept = [(title, note, numbers.row_N[places].tolist()) for title, note, places in chosen if places]
    details = read_rows(scores, columns, {row for _, _, rows in kept for row in rows})
    return [Gallery(title, note, [details[row] for row in rows]) for title, note, rows in kept]


def _order(keys_N: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Positions by their keys, the smallest first, ties in order; NaN comes last."""
    return np.argsort(keys_N, kind="stable")


def _choose(
    order_N: NDArray[np.int64], picture_N: NDArray[np.uint64], count: int, taken: frozenset[int] = frozenset()
) -> list[int]:
    """The first `count` positions in the order that show different pictures, none of which is taken."""
    chosen: list[int] = []
    seen = set(taken)
    for start in range(0, len(order_N), LOOK):
        places = order_N[start : start + LOOK]
        for place, picture in zip(places.tolist(), picture_N[places].tolist(), strict=True):
            if len(chosen) == count:
                return chosen
            if picture not in seen:
                seen.add(picture)
                chosen.append(place)
    return chosen


def _pictures(scores: Scores, numbers: Numbers) -> NDArray[np.uint64]:
    """A number for the picture of every scored row, 8 bytes a row; a row without a digest has a picture of its own."""
    if "sha256" not in scores.schema:
        return numbers.row_N.astype(np.uint64)
    digest = pl.coalesce(pl.col("sha256").cast(pl.String), pl.col(ROW).cast(pl.String)).hash()
    found = fetch(scores.frame.with_row_index(ROW).select(ROW, digest.alias("picture")), scores.name)
    by_row = np.empty(found.height, np.uint64)
    by_row[found[ROW].to_numpy()] = found["picture"].to_numpy()
    return by_row[numbers.row_N]


def _rows(scores: Scores, rows: Iterable[int]) -> pl.LazyFrame:
    wanted = pl.Series(sorted(rows), dtype=pl.UInt32)
    return scores.frame.with_row_index(ROW).filter(pl.col(ROW).is_in(wanted.implode()))


def read_rows(scores: Scores, columns: Columns, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
    """All that a card shows, by position in the table."""
    wanted = [name for name in _BASE if name in scores.schema]
    wanted += [*columns.scores, *(f"{name}_std" for name in columns.stds), *(f"{name}_probs" for name in columns.probs)]
    found = fetch(_rows(scores, rows).select(ROW, *wanted), scores.name)
    return {row[ROW]: row for row in found.iter_rows(named=True)}


def group_stats(scores: Scores, columns: Columns, grid: Grid, count: int) -> GroupStats | None:
    """What best-of-N has to choose from; None where the table has no groups. A row without a group is in none.

    Args:
        scores: the table.
        columns: of it.
        grid: bins for the groups' best candidates.
        count: how many groups to choose.
    """
    if "group" not in scores.schema:
        return None
    lead = pl.col(columns.lead).cast(pl.Float64)
    best = [pl.col(name).max().alias(f"best_{s}") for s, name in enumerate(columns.scores)]
    found = fetch(
        scored(scores, columns)
        .filter(pl.col("group").is_not_null())
        .group_by(pl.col("group").cast(pl.String))
        .agg(pl.len().alias("size"), lead.mean().alias("mean"), (lead.max() - lead.min()).alias("spread"), *best),
        scores.name,
    )
    if found.is_empty():
        return None
    several = found.filter(pl.col("size") > 1)
    sizes = several["size"]
    widest = several.sort("spread", "group", descending=[True, False]).head(count)
    return GroupStats(
        groups=found.height,
        several=several.height,
        sizes=(int(sizes.min() or 0), int(sizes.median() or 0), int(sizes.max() or 0)),  # type: ignore[arg-type]
        mean=_mean(several["mean"]),
        best=_mean(several["best_0"]),
        covered=[grid.count(found[f"best_{s}"].to_numpy()) for s in range(len(columns.scores))],
        chosen=widest["group"].to_list(),
    )


def _mean(values: pl.Series) -> float:
    mean = values.cast(pl.Float64).mean()
    return float(mean) if isinstance(mean, float) else 0.0


def read_groups(scores: Scores, columns: Columns, chosen: list[str]) -> list[Group]:
    """The candidates of the chosen groups, best first; ties by the position in the table."""
    if not chosen:
        return []
    lead = columns.lead
    group = pl.col("group").cast(pl.String)
    members = fetch(
        scored(scores, columns)
        .filter(group.is_in(pl.Series(chosen).implode()))
        .select(ROW, group, pl.col(lead).cast(pl.Float64)),
        scores.name,
    ).sort(lead, ROW, descending=[True, False])
    by_group = {str(part["group"][0]): part for part in members.partition_by("group")}
    shown = {name: _ends(by_group[name][ROW].to_list()) for name in chosen}
    details = read_rows(scores, columns, {row for rows in shown.values() for row in rows})
    made = []
    for name in chosen:
        rows = [details[row] for row in shown[name]]
        of_group = by_group[name][lead]
        gain = float(of_group[0]) - _mean(of_group)
        made.append(Group(name, rows[0]["prompt"], len(of_group), gain, rows))
    return made


def _ends(rows: list[int]) -> list[int]:
    if len(rows) <= GROUP_SIZE:
        return rows
    return rows[: GROUP_SIZE // 2] + rows[-GROUP_SIZE // 2 :]
