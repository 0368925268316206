"""Finds the scored row that each rated sample is about.

Samples match by (shard, key) or (shard, index), by all three where the ratings have them, by key alone where they name
no shard. Shard names match with and without `.tar`, keys with and without the picture's suffix. Where not a single one
matches, base names are tried. Whatever then matches no row, or more than one, or a row whose index isn't the rated
one, is an error that counts and shows it.

Every column of the join but the scores' own values starts with a dot: a dimension is an identifier, so that none can
be called so.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import polars as pl

from zscore.errors import TableError, UsageError
from zscore.table_output import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zscore.human import Ratings

# What names a sample.
PLACE = ("shard", "index", "key")
TAR_SUFFIX = r"(?i)\.(tar|tgz|tar\.gz)$"
# From the first dot after the last slash: what webdataset cuts off to get the key.
FILE_SUFFIX = r"\.[^/]*$"
FOLDER = r"^.*/"


@dataclass(frozen=True, slots=True)
class Table:
    """Scores under the names of the join."""

    frame: pl.LazyFrame
    """From `own_names`."""
    name: str
    """For messages."""


def check_columns(columns: Sequence[str], ratings: Ratings, by: str | None, source: str) -> None:
    """Refuse scores that lack what samples are found or grouped by.

    Raises:
        TableError: names the column and what for.
        UsageError: `by` isn't a column.
    """
    if by is not None and by not in columns:
        near = get_close_matches(by, columns, n=1)
        raise UsageError(f"--by {by}: no such column{f', did you mean {near[0]}?' if near else ''}")
    wanted = {name: f"{ratings.source} names samples by it" for name in PLACE if name in ratings.sample}
    if by is None and ("group" not in ratings.sample or ratings.relative):
        wanted["group"] = "which says what pictures are of one prompt (or another column does, with --by)"
    for name, why in wanted.items():
        if name not in columns:
            raise TableError(f"{source} has no column '{name}', but {why}: was it made with --columns?")


def own_names(scores: pl.LazyFrame, values: Sequence[str], by: str | None) -> pl.LazyFrame:
    """Values and their distributions as they are called; what samples are found by, and row numbers, behind a dot."""
    columns = scores.collect_schema().names()
    names = [pl.col(name).cast(pl.String).alias(f".{name}") for name in ("shard", "key", "group") if name in columns]
    names += [pl.col("index").cast(pl.Int64).alias(".index")] if "index" in columns else []
    names += [pl.col(by).cast(pl.String).alias(".by")] if by is not None else []
    probs = [f"{name}_probs" for name in values if f"{name}_probs" in columns]
    scored = pl.any_horizontal(pl.col(name).is_not_null() for name in values).alias(".scored")
    return scores.select(*names, *values, *probs, scored).with_row_index(".row")


def find(table: Table, samples: pl.DataFrame, ratings: Ratings) -> tuple[pl.DataFrame, str]:
    """Rows of the scores that are rated, with the number of their sample, and how they were found.

    Raises:
        TableError: there is none, or the ratings' index and key name different rows.
    """
    on = [name for name in PLACE if name in samples.columns]
    steps = [(_name, [*on])]
    if on != ["index"]:
        steps.append((_base_name, [name if name == "index" else f"base name of the {name}" for name in on]))
    for clean, how in steps:
        rows = fetch(_joined(table.frame, samples, on, clean), table.name)
        if "index" in on and "key" in on:
            _check_index_and_key(table, samples.join(rows, on=".sample", how="anti"), clean, ratings)
        if rows.height:
            return rows, " and ".join(filter(None, [", ".join(how[:-1]), how[-1]]))
    there = [f".{name}" for name in PLACE if f".{name}" in table.frame.collect_schema()]
    first = fetch(table.frame.select(there).head(1), table.name)
    raise TableError(
        f"none of the {samples.height:,} rated samples is in the scores: the ratings name {_shown(samples)}, "
        f"the scores {_shown(first) if first.height else '-'}"
    )


def _joined(
    frame: pl.LazyFrame, samples: pl.DataFrame, on: Sequence[str], clean: Callable[[str, str], pl.Expr]
) -> pl.LazyFrame:
    marks = [f".on_{name}" for name in on]

    def marked(prefix: str) -> list[pl.Expr]:
        return [
            (pl.col(f"{prefix}index").cast(pl.Int64) if name == "index" else clean(f"{prefix}{name}", name)).alias(mark)
            for name, mark in zip(on, marks, strict=True)
        ]

    group = [pl.col("group").alias(".rated_group")] if "group" in samples.columns else []
    return (
        frame.with_columns(marked("."))
        .join(samples.lazy().select(".sample", *group, *marked("")), on=marks)
        .drop(marks)
    )


def _check_index_and_key(
    table: Table, missing: pl.DataFrame, clean: Callable[[str, str], pl.Expr], ratings: Ratings
) -> None:
    """Refuse an `index` that counts something else, like the ratings' own rows, before it moves a rating elsewhere."""
    if not missing.height:
        return
    on = [name for name in ("shard", "key") if name in missing.columns]
    elsewhere = fetch(_joined(table.frame, missing, on, clean), table.name).sort(".sample", ".row")
    if elsewhere.height:
        first = elsewhere.row(0, named=True)
        theirs = missing.row(by_predicate=pl.col(".sample") == first[".sample"], named=True)
        count = elsewhere[".sample"].n_unique()
        raise TableError(
            f"{count:,} samples of {ratings.source} have an index that isn't their key's; the first: key "
            f"{theirs['key']!r} is at index {first['.index']} in the scores and {theirs['index']} in the ratings: "
            "leave the column index out, or name the right one with --column index=NAME"
        )


def _name(column: str, role: str) -> pl.Expr:
    suffix = TAR_SUFFIX if role == "shard" else FILE_SUFFIX
    return pl.col(column).str.strip_prefix("./").str.replace(suffix, "")


def _base_name(column: str, role: str) -> pl.Expr:
    return _name(column, role).str.replace(FOLDER, "")


def check_one_to_one(rows: pl.DataFrame, samples: pl.DataFrame, ratings: Ratings, *, allow_missing: bool) -> None:
    """Refuse samples without a row or with several, and rows that are rated twice.

    Raises:
        TableError: counts them, shows the first, and says what to do.
    """
    many = rows.group_by(".sample").len().filter(pl.col("len") > 1)
    if many.height:
        first = rows.filter(pl.col(".sample") == many[".sample"].min()).sort(".row").head(2)
        where = " and ".join(_place(row) for row in first.iter_rows(named=True))
        which = samples.filter(pl.col(".sample") == first[".sample"][0])
        raise TableError(
            f"{many.height:,} samples of {ratings.source} match more than one scored row; the first: {_shown(which)} "
            f"is in {where}: add a shard column (or shard and index) to the ratings"
        )
    row = [".row", *([".rated_group"] if ".rated_group" in rows.columns else [])]
    again = rows.group_by(row, maintain_order=True).agg(".sample").filter(pl.col(".sample").list.len() > 1)
    if again.height:
        both = samples.filter(pl.col(".sample").is_in(again[".sample"][0].to_list())).drop(".sample")
        raise TableError(
            f"{again.height:,} scored rows are rated under more than one name in {ratings.source}; the first: "
            f"{both.rows()[0]} and {both.rows()[1]}: keep one of them"
        )
    missing = samples.join(rows, on=".sample", how="anti")
    if missing.height and not allow_missing:
        raise TableError(
            f"{missing.height:,} of the {samples.height:,} rated samples of {ratings.source} aren't in the scores; the "
            f"first: {_shown(missing)}: score them too, or leave them out with --allow-missing"
        )


def _place(row: dict[str, Any]) -> str:
    if ".shard" in row and ".index" in row:
        return f"{row['.shard']!r} (index {row['.index']})"
    return f"row {row['.row']:,}"


def _shown(samples: pl.DataFrame) -> str:
    first = {name.removeprefix("."): value for name, value in samples.row(0, named=True).items()}
    return ", ".join(f"{name} {value!r}" for name, value in first.items() if name in PLACE)
