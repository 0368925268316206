"""Scores and human ratings of the same samples, put side by side (`zscore.joining` finds which they are)."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from zscore.errors import TableError
from zscore.human import DECIMALS, OVERALL
from zscore.joining import Table, check_columns, check_one_to_one, find, own_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.human import Ratings


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores and human scores of one dimension, sample by sample. Array legend: N samples, K levels."""

    dimension: str
    score_N: NDArray[np.float64]
    human_N: NDArray[np.float64]
    """Aggregated over raters. Both are rounded to 1e-9, so that equal means tie."""
    group_N: NDArray[np.int64]
    """Number of the sample's group, from 0: pairs are made within it. Its prompt, or the one vote that it is about."""
    prompt_N: NDArray[np.int64]
    """Number of the prompt that the whole group belongs to, from 0: what intervals draw."""
    ratings: pl.Series
    """The kept ratings of each sample, as lists."""
    probs_NK: NDArray[np.float64] | None
    """The model's distributions; None for `overall`, which has none."""
    relative: bool = False
    """Human scores only compare samples of one group."""
    note: str = ""
    left_out: int = 0
    """Rated samples that aren't here, for their score isn't finite or their distribution isn't one."""


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
    source: str = "the scores",
) -> Matched:
    """Put scores and ratings side by side.

    Args:
        scores: rows of scores.parquet, or of a table with some of its columns.
        dimensions: the rubric's.
        ratings: where `aggregated` comes from.
        aggregated: one row per sample and dimension, from `zscore.human.aggregate`.
        by: scores column that holds the groups; default: the ratings' own, else `group`. Votes keep their own groups,
            for them it says which are about one prompt.
        allow_missing: leave rated samples out that have no row, instead of refusing.
        source: what messages call the scores.

    Raises:
        TableError: a sample matches no row or several, a column is missing, or nothing can be compared.
        UsageError: `by` isn't a column.
    """
    samples = aggregated.select(ratings.sample).unique(maintain_order=True).with_row_index(".sample")
    columns = scores.collect_schema().names()
    check_columns(columns, ratings, by, source)
    values = [name for name in (OVERALL, *dimensions) if name in columns]
    shared, derived = _shared(values, aggregated, ratings, source)
    rows, how = find(Table(own_names(scores, values, by), source), samples, ratings)
    check_one_to_one(rows, samples, ratings, allow_missing=allow_missing)
    found = _grouped(_side_by_side(aggregated, samples, rows, ratings), ratings, by)
    comparisons = [_comparison(found, name, relative=ratings.relative) for name in shared]
    if derived:
        whole = set(derived) == set(dimensions) and OVERALL in values
        comparisons.append(_derived_overall(found, derived, pl.col(OVERALL) if whole else None))
    return Matched(
        comparisons=tuple(comparisons),
        by=how,
        rated=samples.height,
        missing=samples.height - rows.height,
        unscored=rows.height - int(rows[".scored"].sum()),
        not_compared=tuple(sorted(set(aggregated["dimension"].unique()) - set(shared))),
    )


def _shared(
    values: Sequence[str], aggregated: pl.DataFrame, ratings: Ratings, source: str
) -> tuple[list[str], list[str]]:
    """Dimensions that both sides have, and those that a derived overall is the mean of."""
    if not values:
        raise TableError(f"{source} has no column with scores: was it made with --columns?")
    rated = aggregated["dimension"].unique().sort().to_list()
    shared = sorted((name for name in values if name in rated), key=lambda name: name == OVERALL)
    if not shared:
        theirs = [name for name in values if name != OVERALL] or [OVERALL]
        near = [match for name in rated for match in get_close_matches(name, theirs, n=1)]
        fix = f"--map {rated[0]}={near[0] if near else theirs[0]}" if rated else "check the file"
        raise TableError(
            f"{ratings.source} rates {', '.join(rated) or 'nothing'}, the scores have {', '.join(theirs)}: "
            f"nothing to compare; try {fix}"
        )
    derived = shared if OVERALL not in shared and len(shared) > 1 and not ratings.relative else []
    return shared, derived


def _side_by_side(
    aggregated: pl.DataFrame, samples: pl.DataFrame, rows: pl.DataFrame, ratings: Ratings
) -> pl.DataFrame:
    theirs = {"dimension": ".dimension", "score": ".human", "ratings": ".ratings"}
    rated = aggregated.join(samples, on=ratings.sample, nulls_equal=True).select(
        ".sample", *(pl.col(name).alias(ours) for name, ours in theirs.items())
    )
    return rated.join(rows, on=".sample")


def _grouped(found: pl.DataFrame, ratings: Ratings, by: str | None) -> pl.DataFrame:
    """The same with numbers of groups and prompts, sorted; a sample that names no group is one of its own."""
    ours = ".group" if by is None else ".by"
    # A vote is about its own pictures only; but twenty votes on one prompt aren't twenty prompts.
    own = "group" in ratings.sample and (by is None or ratings.relative)
    group, prompt = (".rated_group" if own else ours), (ours if ratings.relative or not own else ".rated_group")
    named = {
        name: pl.coalesce(pl.col(column), pl.format("\0{}", ".sample"))
        for name, column in ((".group_number", group), (".prompt_number", prompt))
    }
    found = found.with_columns(**named).sort(".sample", ".dimension")
    # Pairs never straddle what is drawn, even where a vote's two pictures were scored under two prompts.
    found = found.with_columns(pl.col(".prompt_number").first().over(".group_number"))
    return found.with_columns(pl.col(list(named)).rank("dense").cast(pl.Int64) - 1)


def _comparison(found: pl.DataFrame, name: str, *, relative: bool) -> Comparison:
    rated = found.filter(pl.col(".dimension") == name, pl.col(".scored"))
    usable_N = rated[name].is_finite().fill_null(value=False).to_numpy()
    probs_NK = None
    if f"{name}_probs" in found.columns:
        probs_NK, whole_N = _distributions(rated[f"{name}_probs"])
        usable_N = usable_N & whole_N
        probs_NK = probs_NK[usable_N]
    rows = rated.filter(usable_N)
    return Comparison(
        dimension=name,
        score_N=rows[name].cast(pl.Float64).round(DECIMALS).to_numpy(),
        human_N=rows[".human"].to_numpy(),
        group_N=rows[".group_number"].to_numpy(),
        prompt_N=rows[".prompt_number"].to_numpy(),
        ratings=rows[".ratings"],
        probs_NK=probs_NK,
        relative=relative,
        left_out=rated.height - rows.height,
    )


def _distributions(lists: pl.Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Lists as one array, shape (N, K), and which are distributions: whole, finite, not negative, not all zero."""
    if isinstance(lists.dtype, pl.Array):
        lists = lists.arr.to_list()
    lengths_N = lists.list.len().fill_null(0).to_numpy()
    levels = int(lengths_N.max(initial=0))
    whole_N = lengths_N == levels
    probs_NK = np.full((len(lists), levels), np.nan)
    if levels:
        flat = lists.filter(whole_N).explode().cast(pl.Float64)
        probs_NK[whole_N] = flat.to_numpy().reshape(-1, levels)
    usable_N = np.isfinite(probs_NK).all(axis=1) & (probs_NK >= 0).all(axis=1) & (probs_NK.sum(axis=1) > 0)
    return probs_NK, usable_N


def _derived_overall(found: pl.DataFrame, names: Sequence[str], column: pl.Expr | None) -> Comparison:
    """The mean over the rated dimensions on both sides, of the samples that have them all.

    `column` is the scores' own overall, where it is that mean: what a threshold would be compared with.
    """
    mean = pl.mean_horizontal(pl.col(names).cast(pl.Float64), ignore_nulls=False)
    score = (mean if column is None else column.cast(pl.Float64)).alias(".score")
    rated = found.filter(pl.col(".dimension").is_in(names), pl.col(".scored")).with_columns(score)
    complete = (
        rated.group_by(".sample")
        .agg(
            pl.col(".human").mean().round(DECIMALS),
            pl.col(".score", ".group_number", ".prompt_number").first(),
            pl.len(),
        )
        .filter(pl.col("len") == len(names))
        .sort(".sample")
    )
    rows = complete.filter(pl.col(".score").is_finite())
    return Comparison(
        dimension=OVERALL,
        score_N=rows[".score"].round(DECIMALS).to_numpy(),
        human_N=rows[".human"].to_numpy(),
        group_N=rows[".group_number"].to_numpy(),
        prompt_N=rows[".prompt_number"].to_numpy(),
        ratings=rows.select(pl.concat_list(".human")).to_series(),
        probs_NK=None,
        note=f"mean of {', '.join(names)}",
        left_out=complete.height - rows.height,
    )
