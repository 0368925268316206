"""A scored table at a glance: counts, the spread of every score, its first rows, and one row in full.

Tables that were made from scores (kept rows, pairs) may lack columns; what isn't there isn't shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from zscore.errors import UsageError
from zscore.records import Status
from zscore.table_output import fetch
from zscore.tables import OVERALL, ROW, is_ok

if TYPE_CHECKING:
    from zscore.tables import Scores


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one score over the rows that have it."""

    name: str
    mean: float
    std: float
    smallest: float
    quarter: float
    median: float
    three_quarters: float
    largest: float


@dataclass(frozen=True, slots=True)
class Overview:
    """Counts and spreads of a table."""

    rows: int
    statuses: dict[str, int]
    """Rows by status, `ok` first, then most of them first."""
    groups: int | None
    """None where the table has no such column."""
    pictures: int | None
    """Different ones, by their bytes."""
    nonfinite: dict[str, int]
    """Scored rows with no value, NaN or infinity, by column."""
    spreads: tuple[Spread, ...]


def overview(scores: Scores) -> Overview:
    """Read the table once.

    Raises:
        TableError: it can't be read.
    """
    has_status = "status" in scores.schema
    statuses = scores.frame.group_by(pl.col("status").cast(pl.String)).len() if has_status else None
    counts = dict(fetch(statuses, scores.name).iter_rows()) if statuses is not None else {}
    names = [name for name in (OVERALL, *scores.dimensions) if name in scores.schema]
    aggregates = [pl.len().alias("rows")]
    # Hashes take 8 bytes a row where the texts would take a hundred.
    named = [name for name in ("group", "sha256") if name in scores.schema]
    aggregates += [pl.col(name).drop_nulls().hash().n_unique().alias(name) for name in named]
    total = fetch(scores.frame.select(aggregates), scores.name).row(0, named=True)
    scored = scores.frame.filter(is_ok()) if has_status else scores.frame
    found = [_spread(scores, scored, name) for name in names]
    return Overview(
        rows=total["rows"],
        statuses=dict(sorted(counts.items(), key=lambda pair: (pair[0] != "ok", -pair[1]))),
        groups=total.get("group"),
        pictures=total.get("sha256"),
        nonfinite={name: bad for name, (_, bad) in zip(names, found, strict=True) if bad},
        spreads=tuple(spread for spread, _ in found if spread is not None),
    )


def _spread(scores: Scores, scored: pl.LazyFrame, name: str) -> tuple[Spread | None, int]:
    """Spread of the finite scores, and how many aren't; one column at a time, so that memory holds one."""
    column = fetch(scored.select(pl.col(name).cast(pl.Float64)), scores.name).to_series()
    finite = column.filter(column.is_finite().fill_null(value=False))
    if finite.is_empty():
        return None, len(column)
    values = pl.select(
        mean=finite.mean(),
        std=finite.std(ddof=0),
        smallest=finite.min(),
        quarter=finite.quantile(0.25, "linear"),
        median=finite.median(),
        three_quarters=finite.quantile(0.75, "linear"),
        largest=finite.max(),
    )
    return Spread(name, **values.row(0, named=True)), len(column) - len(finite)


def head(scores: Scores, rows: int) -> pl.DataFrame:
    """The first rows: where they are, what they show, their scores; of a table without scores its first columns."""
    rows = min(rows, scores.rows)
    if OVERALL not in scores.schema and not scores.dimensions:
        return fetch(scores.frame.head(rows).select(scores.schema.names()[:6]), scores.name)
    wanted = ["shard", "key", "status", "prompt", "reason", OVERALL, *scores.dimensions, "select_rank", "select_score"]
    found = fetch(scores.frame.head(rows).select(name for name in wanted if name in scores.schema), scores.name)
    all_ok = "status" in found.columns and (found["status"].cast(pl.String) == Status.OK).all()
    return found.drop("status") if all_ok else found


def rows_with_key(scores: Scores, key: str) -> list[int]:
    """Numbers of the rows that are called KEY or SHARD/KEY; keys may repeat over shards.

    Raises:
        UsageError: there is no such row.
    """
    scores.require("shard", "key")
    path = pl.concat_str(pl.col("shard").cast(pl.String), pl.lit("/"), pl.col("key"))
    found = fetch(scores.numbered.filter((pl.col("key") == key) | (path == key)).select(ROW), scores.name)
    if found.is_empty():
        raise UsageError(f"--key {key}: {scores.name} has no such row; give KEY or SHARD/KEY as the table has them")
    return sorted(found[ROW].to_list())


def one_row(scores: Scores, *, number: int | None = None) -> dict[str, Any] | None:
    """A row in full: by number from 0 (negative from the end), or the first that has scores.

    Raises:
        UsageError: there is no such row.
    """
    if number is not None:
        if not -scores.rows <= number < scores.rows:
            raise UsageError(f"--row {number}: {scores.name} has {scores.rows} rows, numbered from 0")
        found = fetch(scores.frame.slice(number, 1), scores.name)
    else:
        rows_with_scores = scores.frame.filter(is_ok()) if "status" in scores.schema else scores.frame
        found = fetch(rows_with_scores.head(1), scores.name)
        found = fetch(scores.frame.head(1), scores.name) if found.is_empty() else found
    return None if found.is_empty() else found.row(0, named=True)
