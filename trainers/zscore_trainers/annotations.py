"""Raters' scores → one rubric score per picture and dimension, and same-prompt pairs (paper, section 2).

    ratings ── quality check by rater ──► trimmed mean ──► nearest level ──┐
    shards ── prompt, group, place of every sample ────────────────────────┴─► annotations.parquet, pairs.parquet

A rater is checked against the mean of all others on what they rated in common (Spearman's rho, dimension by dimension,
averaged); one who stays below the threshold is left out, and named.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy import stats

from zscore.errors import TableError, UsageError
from zscore.human import Aggregation, Ratings, aggregate
from zscore.samples import ReadOptions, read_samples
from zscore_trainers.targets import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from zscore.records import Sample, ShardRef

FEWEST_SHARED = 5
"""Ratings that a rater must share with others in a dimension to be checked there."""
TAR_SUFFIX = r"(?i)\.(tar|tgz|tar\.gz)$"
SAMPLE = {"shard": pl.String, "index": pl.Int64, "key": pl.String, "prompt": pl.String, "group": pl.String}
ANNOTATIONS, PAIRS = "annotations.parquet", "pairs.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How annotations are made of ratings."""

    values: tuple[float, ...]
    """The rubric's levels; a score becomes the nearest, the higher of two."""
    min_agreement: float = 0.0
    """Raters below this are left out; -1 keeps all."""
    dimensions: tuple[str, ...] = ()
    """The rubric's; ratings of others are refused. None given: whatever was rated."""
    aggregation: Aggregation = "trimmed"
    test_share: float = 0.1
    """Of the prompts, for evaluation: by the prompt's hash, so the same whatever else there is."""
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        """Refuse shares that are none.

        Raises:
            UsageError: names the option.
        """
        if not 0 <= self.test_share < 1:
            raise UsageError(f"--test-share {self.test_share}: from 0 to below 1")
        if not -1 <= self.min_agreement <= 1:
            raise UsageError(f"--min-agreement {self.min_agreement}: from -1 to 1")


@dataclass(frozen=True, slots=True)
class Rater:
    """One rater's quality check."""

    name: str
    ratings: int
    agreement: float | None
    """Spearman's rho with the mean of the others; None where too few are shared, and then nothing speaks against it."""
    kept: bool


@dataclass(frozen=True, slots=True)
class Annotations:
    """What was made."""

    samples: pl.DataFrame
    """shard, index, key, prompt, group, split, and a column per dimension (null where it wasn't rated)."""
    pairs: pl.DataFrame
    """dimension, group, winner and loser (rows of `samples`), gap (above 0), split."""
    raters: tuple[Rater, ...]
    unmatched: int
    """Rated samples that the shards don't hold, or that can't be read there."""
    unread: int = 0
    """Samples of the shards that can't be read, rated or not."""
    first_unread: str = ""
    """Which the first of them is, and why."""


def check_raters(ratings: Ratings, min_agreement: float) -> tuple[Rater, ...]:
    """Every rater's agreement with the others, best first; none where no rater is named.

    Raises:
        TableError: some ratings name a rater and some don't.
    """
    unnamed = ratings.frame["rater"].null_count()
    if unnamed == ratings.frame.height:
        return ()
    if unnamed:
        raise TableError(f"{ratings.source}: {unnamed:,} of {ratings.frame.height:,} ratings name no rater: name all")
    by = [*ratings.sample, "dimension"]
    total = ratings.frame.with_columns(
        sum=pl.col("score").sum().over(by), count=pl.len().over(by), own=pl.len().over(*by, "rater")
    )
    others = total.filter(pl.col("count") > pl.col("own")).with_columns(
        others=(pl.col("sum") - pl.col("score").sum().over(*by, "rater")) / (pl.col("count") - pl.col("own"))
    )
    counts = dict(ratings.frame.group_by("rater").len().iter_rows())
    found = []
    for name in sorted(counts):
        agreement = _agreement(others.filter(pl.col("rater") == name))
        found.append(Rater(name, counts[name], agreement, agreement is None or agreement >= min_agreement))
    return tuple(sorted(found, key=lambda rater: (-2.0 if rater.agreement is None else -rater.agreement, rater.name)))


def _agreement(rows: pl.DataFrame) -> float | None:
    """Mean of Spearman's rho over the dimensions where it exists."""
    found = []
    for (_,), part in rows.group_by("dimension"):
        if part.height >= FEWEST_SHARED and part["score"].n_unique() > 1 and part["others"].n_unique() > 1:
            found.append(float(stats.spearmanr(part["score"].to_numpy(), part["others"].to_numpy()).statistic))
    return float(np.mean(found)) if found else None


def build(ratings: Ratings, shards: Iterable[ShardRef], options: BuildOptions) -> Annotations:
    """Annotate the samples of shards.

    Raises:
        TableError: ratings that aren't the rubric's; no rater is left, or no rated sample is in the shards.
    """
    _check(ratings, options)
    raters = check_raters(ratings, options.min_agreement)
    kept = [rater.name for rater in raters if rater.kept]
    if raters and not kept:
        raise TableError(f"no rater reaches --min-agreement {options.min_agreement}: lower it")
    admitted = ratings.frame.filter(pl.col("rater").is_in(kept)) if raters else ratings.frame
    scored = aggregate(Ratings(admitted, ratings.relative, ratings.source), options.aggregation)
    label_N = np.asarray(options.values)[nearest(scored["score"].to_numpy(), options.values)]
    labels = scored.with_columns(label=pl.Series(label_N))
    wide = labels.pivot("dimension", index=ratings.sample, values="label")
    found = [replace(sample, image=b"") for shard in shards for sample in read_samples(shard, options.read)]
    bad = [f"'{one.key}' of {one.shard}: {one.failure.error}" for one in found if one.failure]
    if bad and len(bad) == len(found):
        raise TableError(f"none of the {len(bad):,} samples of the shards can be read; {bad[0]}")
    samples = _with_samples(wide, ratings, [one for one in found if one.failure is None], options)
    dimensions = [name for name in wide.columns if name not in ratings.sample]
    if not samples.height:
        raise TableError(f"none of the {wide.height} rated samples is in the shards: are the keys the same?")
    unmatched = wide.height - samples.height
    return Annotations(samples, _pairs(samples, dimensions), raters, unmatched, len(bad), bad[0] if bad else "")


def _check(ratings: Ratings, options: BuildOptions) -> None:
    """Refuse ratings of dimensions that the rubric hasn't, and beyond its scale."""
    if not ratings.frame.height:
        raise TableError(f"{ratings.source} holds no ratings")
    known = options.dimensions
    other = ratings.frame.filter(~pl.col("dimension").is_in(known)) if known else ratings.frame.clear()
    if other.height:
        name = other["dimension"][0]
        raise TableError(
            f"{ratings.source}: {other.height:,} ratings of other dimensions, such as '{name}'; the rubric has"
            f" {', '.join(known)}: rename with --map {name}=…, or leave them out"
        )
    low, high = options.values[0], options.values[-1]
    beyond = ratings.frame.filter(~pl.col("score").is_between(low, high))
    if beyond.height:
        raise TableError(
            f"{ratings.source}: {beyond.height:,} scores beyond the rubric's scale of {low:g} to {high:g}, such as"
            f" {beyond['score'][0]:g} on {beyond['dimension'][0]}: give ratings on that scale"
        )


def check_out(out: Path) -> None:
    """Refuse what no folder can be made of.

    Raises:
        UsageError: a part of the path is a file, or nothing may be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out} can't be made a folder: {error.strerror}: give another") from error


def _with_samples(
    wide: pl.DataFrame, ratings: Ratings, samples: Iterable[Sample], options: BuildOptions
) -> pl.DataFrame:
    rows = [(one.shard, one.index, one.key, one.prompt, one.group) for one in samples]
    found = pl.DataFrame(rows, schema=SAMPLE, orient="row")
    by: list[str] = [name for name in ("index", "key") if name in ratings.sample]
    if "shard" in ratings.sample:  # ratings may call a shard without its suffix
        bare = pl.col("shard").str.replace(TAR_SUFFIX, "")
        found, wide = found.with_columns(_shard=bare), wide.with_columns(_shard=bare).drop("shard")
        by.append("_shard")
    wide = wide.drop("group", strict=False)
    _check_single(found.join(wide, on=by, how="semi"), by, ratings)
    joined = found.join(wide, on=by, how="inner", validate="1:1").drop("_shard", strict=False)
    split = pl.col("prompt").map_elements(lambda prompt: _split(prompt, options.test_share), return_dtype=pl.String)
    return joined.with_columns(split=split).sort("shard", "index")


def _check_single(rated: pl.DataFrame, by: Sequence[str], ratings: Ratings) -> None:
    """Refuse ratings of which nobody can tell whose they are."""
    twice = rated.filter(pl.struct(by).is_duplicated())
    if twice.height:
        one, other = twice.filter(pl.struct(by) == twice.select(pl.struct(by)).row(0)[0]).head(2).iter_rows(named=True)
        whose = " and ".join(f"sample {row['index']} of {row['shard']}" for row in (one, other))
        raise TableError(
            f"{ratings.source}: key '{one['key']}' is of {whose}: name the samples in the ratings by shard and index"
        )


def _split(prompt: str, test_share: float) -> str:
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test_share else "train"


def _pairs(samples: pl.DataFrame, dimensions: Sequence[str]) -> pl.DataFrame:
    """Every two samples of a group with unequal scores, once for each dimension."""
    numbered = samples.with_row_index("row").select("row", "group", "split", *dimensions)
    long = numbered.unpivot(dimensions, index=["row", "group", "split"], variable_name="dimension", value_name="score")
    both = long.join(long.drop("split"), on=["group", "dimension"], suffix="_loser")
    return (
        both.filter(pl.col("score") > pl.col("score_loser"))
        .select(
            "dimension",
            "group",
            winner="row",
            loser="row_loser",
            gap=pl.col("score") - pl.col("score_loser"),
            split="split",
        )
        .sort("dimension", "winner", "loser")
    )


def write(made: Annotations, out: Path) -> None:
    """Write both tables.

    Raises:
        UsageError: `out` can't be made a folder.
    """
    check_out(out)
    made.samples.write_parquet(out / ANNOTATIONS)
    made.pairs.write_parquet(out / PAIRS)
