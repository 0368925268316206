"""Which scored row a human rating is about, and the two put side by side.

Samples match by (shard, index) or (shard, key), by key alone where the ratings name no shard. Shard names match with
and without `.tar`, keys with and without the picture's suffix. Where not a single one matches, base names are tried.
Whatever then matches no row, or more than one, is an error that counts and shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from zscore.errors import TableError, UsageError
from zscore.human import DECIMALS, OVERALL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.human import Ratings

TAR_SUFFIX = r"(?i)\.(tar|tgz|tar\.gz)$"
# From the first dot after the last slash: what webdataset cuts off to get the key.
FILE_SUFFIX = r"\.[^/]*$"
FOLDER = r"^.*/"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores and human scores of one dimension, sample by sample. Array legend: N samples, K levels."""

    dimension: str
    score_N: NDArray[np.float64]
    human_N: NDArray[np.float64]
    """Aggregated over raters. Both are rounded to 1e-9, so that equal means tie."""
    group_N: NDArray[np.int64]
    """Number of the sample's group (its prompt), from 0."""
    ratings: pl.Series
    """The kept ratings of each sample, as lists."""
    probs_NK: NDArray[np.float64] | None
    """The model's distributions; None for `overall`, which has none."""
    relative: bool = False
    """Human scores only compare samples of one group."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Matched:
    """Everything that can be compared, and what can't."""

    comparisons: tuple[Comparison, ...]
    by: str
    """How samples were matched, in words."""
    rated: int
    """Samples that have ratings."""
    missing: int
    """Of those, not in the scores."""
    unscored: int
    """Of those, in the scores but without one (their status isn't ok)."""
    not_compared: tuple[str, ...]
    """Rated dimensions that the scores don't have."""


def match(
    scores: pl.LazyFrame,
    dimensions: Sequence[str],
    ratings: Ratings,
    aggregated: pl.DataFrame,
    *,
    by: str | None = None,
    allow_missing: bool = False,
) -> Matched:
    """Put scores and ratings side by side.

    Args:
        scores: rows of scores.parquet.
        dimensions: the rubric's.
        ratings: where `aggregated` comes from.
        aggregated: one row per sample and dimension, from `zscore.human.aggregate`.
        by: scores column that holds the groups; default: the ratings' own, else `group`.
        allow_missing: leave rated samples out that have no row, instead of refusing.

    Raises:
        TableError: a sample matches no row or several, or nothing can be compared.
        UsageError: `by` isn't a column.
    """
    samples = aggregated.select(ratings.sample).unique(maintain_order=True).with_row_index("sample")
    columns = scores.collect_schema().names()
    if by is not None and by not in columns:
        near = get_close_matches(by, columns, n=1)
        raise UsageError(f"--by {by}: no such column{f', did you mean {near[0]}?' if near else ''}")
    shared, derived = _shared(dimensions, aggregated, ratings)
    rows, how = _find(scores, samples, [*_value_columns(columns, dimensions), *([by] if by else [])])
    _check_one_to_one(rows, samples, ratings, allow_missing=allow_missing)
    # The index tells rows of one shard apart; a rating's own group wins over the scores' (a vote is about one pair).
    group = by or ("sample_group" if "group" in ratings.sample else "group")
    found = aggregated.join(samples, on=ratings.sample, nulls_equal=True).join(rows, on="sample", suffix="_scored")
    # A sample that names no group is one of its own.
    named = pl.coalesce(pl.col(group).cast(pl.String), pl.format("\0{}", "sample"))
    found = found.with_columns(_group=named.rank("dense").cast(pl.Int64) - 1).sort("sample", "dimension")
    comparisons = [_comparison(found, name, relative=ratings.relative) for name in shared]
    if derived:
        whole = set(derived) == set(dimensions) and OVERALL in rows.columns
        comparisons.append(_derived_overall(found, derived, pl.col(OVERALL) if whole else None))
    scored = rows.drop_nulls(OVERALL).height if OVERALL in rows.columns else rows.height
    return Matched(
        comparisons=tuple(comparisons),
        by=how,
        rated=samples.height,
        missing=samples.height - rows.height,
        unscored=rows.height - scored,
        not_compared=tuple(sorted(set(aggregated["dimension"].unique()) - set(shared))),
    )


def _value_columns(columns: Sequence[str], dimensions: Sequence[str]) -> list[str]:
    wanted = [OVERALL, *dimensions, *(f"{name}_probs" for name in dimensions)]
    return [name for name in wanted if name in columns]


def _shared(dimensions: Sequence[str], aggregated: pl.DataFrame, ratings: Ratings) -> tuple[list[str], list[str]]:
    """Dimensions that both sides have, and those that a derived overall is the mean of."""
    rated = aggregated["dimension"].unique().sort().to_list()
    shared = [name for name in (*dimensions, OVERALL) if name in rated]
    if not shared:
        near = [match for name in rated for match in get_close_matches(name, dimensions, n=1)]
        fix = f"--map {rated[0]}={near[0] if near else dimensions[0]}" if rated else "check the file"
        raise TableError(
            f"{ratings.source} rates {', '.join(rated) or 'nothing'}, the scores have {', '.join(dimensions)}: "
            f"nothing to compare; try {fix}"
        )
    derived = shared if OVERALL not in shared and len(shared) > 1 and not ratings.relative else []
    return shared, derived


def _find(scores: pl.LazyFrame, samples: pl.DataFrame, values: Sequence[str]) -> tuple[pl.DataFrame, str]:
    """Rows of the scores that are rated, with the number of their sample, and how they were found."""
    on = [name for name in ("shard", "index" if "index" in samples.columns else "key") if name in samples.columns]
    text = {name for name in on if name != "index"}
    wanted = list(dict.fromkeys(["shard", "index", "key", "group", *values]))
    left = scores.select(wanted).with_columns(pl.col("shard", "key", "group").cast(pl.String))
    steps = [(_name, " and ".join(on))]
    if text:
        steps.append((_base_name, " and ".join(f"base name of the {name}" if name in text else name for name in on)))
    rows = pl.DataFrame()
    for clean, how in steps:
        keyed = left.with_columns(clean(name).alias(f"_{name}") if name in text else _kept(name) for name in on)
        right = samples.select(
            "sample",
            *(clean(name).alias(f"_{name}") if name in text else _kept(name) for name in on),
            *([pl.col("group").alias("sample_group")] if "group" in samples.columns else []),
        )
        marks = [f"_{name}" for name in on]
        rows = keyed.join(right.lazy(), on=marks, how="inner").drop(marks).collect()
        if rows.height:
            return rows, how
    first = scores.select("shard", "index", "key").head(1).collect()
    shown = ", ".join(f"{name} {value!r}" for name, value in first.row(0, named=True).items()) if first.height else "-"
    raise TableError(
        f"none of the {samples.height:,} rated samples is in the scores: the ratings name {_shown(samples)}, "
        f"the scores {shown}"
    )


def _kept(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64).alias(f"_{name}")


def _name(column: str) -> pl.Expr:
    suffix = TAR_SUFFIX if column == "shard" else FILE_SUFFIX
    return pl.col(column).str.strip_prefix("./").str.replace(suffix, "")


def _base_name(column: str) -> pl.Expr:
    return _name(column).str.replace(FOLDER, "")


def _check_one_to_one(rows: pl.DataFrame, samples: pl.DataFrame, ratings: Ratings, *, allow_missing: bool) -> None:
    many = rows.group_by("sample").len().filter(pl.col("len") > 1)
    if many.height:
        first = rows.filter(pl.col("sample") == many["sample"].min()).sort("shard", "index")
        where = " and ".join(f"'{shard}' (index {index})" for shard, index in first.select("shard", "index").rows()[:2])
        raise TableError(
            f"{many.height:,} samples of {ratings.source} match more than one scored row; the first: key "
            f"'{first['key'][0]}' is in {where}: add a shard column (or shard and index) to the ratings"
        )
    row = ["shard", "index", *(["sample_group"] if "sample_group" in rows.columns else [])]
    again = rows.group_by(row, maintain_order=True).agg(pl.col("sample")).filter(pl.col("sample").list.len() > 1)
    if again.height:
        both = samples.filter(pl.col("sample").is_in(again["sample"][0].to_list())).drop("sample")
        raise TableError(
            f"{again.height:,} scored rows are rated under more than one name in {ratings.source}; the first: "
            f"{both.rows()[0]} and {both.rows()[1]}: keep one of them"
        )
    missing = samples.join(rows, on="sample", how="anti")
    if missing.height and not allow_missing:
        raise TableError(
            f"{missing.height:,} of the {samples.height:,} rated samples of {ratings.source} aren't in the scores; the "
            f"first: {_shown(missing)}: score them too, or leave them out with --allow-missing"
        )


def _shown(samples: pl.DataFrame) -> str:
    first: dict[str, Any] = samples.row(0, named=True)
    return ", ".join(f"{name} {value!r}" for name, value in first.items() if name not in {"sample", "group"})


def _comparison(found: pl.DataFrame, name: str, *, relative: bool) -> Comparison:
    column = f"{name}_probs"
    # `score` is the ratings' aggregated column; the model's is named after the dimension.
    rows = found.filter(pl.col("dimension") == name, pl.col(name).is_finite())
    probs = None
    if column in found.columns:
        probs = rows[column].list.to_array(_width(rows[column])) if rows[column].dtype == pl.List else rows[column]
    return Comparison(
        dimension=name,
        score_N=rows[name].cast(pl.Float64).round(DECIMALS).to_numpy(),
        human_N=rows["score"].to_numpy(),
        group_N=rows["_group"].to_numpy(),
        ratings=rows["ratings"],
        probs_NK=None if probs is None else probs.to_numpy().astype(np.float64),
        relative=relative,
    )


def _width(lists: pl.Series) -> int:
    longest = lists.list.len().max()
    return int(longest) if isinstance(longest, int) else 0


def _derived_overall(found: pl.DataFrame, names: Sequence[str], column: pl.Expr | None) -> Comparison:
    """The mean over the rated dimensions on both sides, of the samples that have them all.

    `column` is the scores' own overall, where it is that mean: what a threshold would be compared with.
    """
    score = pl.mean_horizontal(pl.col(names).cast(pl.Float64)) if column is None else column.cast(pl.Float64)
    rows = found.filter(pl.col("dimension").is_in(names)).with_columns(_score=score)
    complete = (
        rows.group_by("sample")
        .agg(pl.col("score").mean().round(DECIMALS), pl.col("_score", "_group").first(), pl.len())
        .filter(pl.col("len") == len(names), pl.col("_score").is_finite())
        .sort("sample")
    )
    return Comparison(
        dimension=OVERALL,
        score_N=complete["_score"].cast(pl.Float64).round(DECIMALS).to_numpy(),
        human_N=complete["score"].to_numpy(),
        group_N=complete["_group"].to_numpy(),
        ratings=complete.select(pl.concat_list("score"))["score"],
        probs_NK=None,
        note=f"mean of {', '.join(names)}",
    )
