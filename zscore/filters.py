"""Decides which rows of a scored table to keep, and says of every other one why not.

The reasons, in the order in which they are looked for; a row is dropped for the first that applies:

    <status>               it has no scores: bad_image, missing_prompt, …
    nonfinite_score        NaN, infinity or nothing in a score that a criterion reads, or as the score that is ranked;
                           in what `where` reads NaN and infinity, for there null can be asked for
    min:NAME, max:NAME     `overall` or a dimension is beyond its bound
    prob:NAME              too little of the distribution lies where it should
    max_std:NAME           the distribution is too wide
    where                  the SQL expression isn't true
    duplicate              an earlier row that passed all of the above has the same picture bytes
    fraction               the best of what is left are others

Two passes, both streamed: the first reads only the columns that decide and leaves a byte a row, the second copies the
rows that are kept. Memory beyond that byte grows with the rows only for `fraction` (8 bytes) and `dedupe` (8 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import reduce
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import polars as pl

from zscore.criteria import row_criteria
from zscore.errors import TableError, UsageError
from zscore.expressions import ScoreExpression
from zscore.store import refuse_foreign
from zscore.table_output import check_targets, derived, failures, fetch, sink, written
from zscore.tables import ROW, is_ok

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.criteria import Criterion, FilterOptions
    from zscore.tables import Scores

    Mask = NDArray[np.bool_]

KEPT = 0
NOT_OK = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterTargets:
    """Where `filter_scores` writes; paths or fsspec urls."""

    kept: str
    dropped: str | None = None
    """All columns of the dropped rows, and `reason`."""
    npy: str | None = None
    """DataComp's subset file: sorted 128-bit uids of the kept rows."""
    columns: tuple[str, ...] | None = None
    """Of the kept table; all where this is None."""


@dataclass(frozen=True, slots=True)
class FilterSummary:
    """What `filter_scores` did, or would do."""

    rows: int
    kept: int
    dropped: dict[str, int]
    """Rows by reason, most of them first."""
    hint: str
    """Where nothing is kept: what the table has instead."""

    def counts(self) -> dict[str, object]:
        """For the metadata."""
        return {"rows": self.rows, "kept": self.kept, "dropped": self.dropped}


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to become of every row."""

    code_N: NDArray[np.uint8]
    """`KEPT`, `NOT_OK`, or the position of a reason plus one."""
    reasons: tuple[str, ...]
    dropped: dict[str, int]
    """Rows by reason, most of them first; statuses stand for themselves."""
    predicate: pl.Expr | None
    """Keeps the same rows without looking at `code_N`; None where the whole table decided."""

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return len(self.code_N)

    @property
    def kept(self) -> int:
        """Rows that are kept."""
        return int((self.code_N == KEPT).sum())

    def keep(self, scores: Scores) -> pl.LazyFrame:
        """The rows that are kept, in their order."""
        # Where it can, polars reads the deciding columns first and decodes the others for kept rows only.
        if self.predicate is not None:
            return scores.frame.filter(self.predicate)
        return scores.where(self.code_N == KEPT).drop(ROW)

    def drop(self, scores: Scores) -> pl.LazyFrame:
        """The other rows, in their order, with a column `reason`."""
        # Null behind the reasons, where NOT_OK leads: such a row's reason is its status.
        names, codes = pl.Series(["", *self.reasons, None], dtype=pl.String), self.code_N
        reason = pl.col(ROW).map_batches(
            lambda rows: names.gather(np.minimum(codes[rows.to_numpy()], len(names) - 1)).alias(ROW),
            return_dtype=pl.String,
            is_elementwise=True,
        )
        dropped = scores.where(self.code_N != KEPT)
        return dropped.with_columns(reason=pl.coalesce(reason, pl.col("status").cast(pl.String))).drop(ROW)


def filter_scores(scores: Scores, options: FilterOptions, targets: FilterTargets, *, dry_run: bool) -> FilterSummary:
    """Decide, and write what is asked for; all files appear together, replacing earlier ones.

    Raises:
        UsageError: an option that can't hold, or an output that is an input.
        TableError: a table that can't be read or lacks a column.
        OutputError: an output can't be written.
    """
    outputs = {"--out": targets.kept, "--dropped": targets.dropped, "--npy": targets.npy}
    refuse_foreign({name: outputs[name] for name in ("--out", "--dropped")})
    check_targets(scores.files, outputs, scores.sources)
    _check_columns(scores, targets.columns or ())
    if targets.npy is not None:
        scores.require(_uid_column(scores))
    decision = decide(scores, options)
    summary = FilterSummary(decision.rows, decision.kept, decision.dropped, _why_empty(scores, options, decision))
    if not dry_run:
        _write(scores, decision, targets, derived(scores.metadata, "filter", options.described(), summary.counts()))
    return summary


def _check_columns(scores: Scores, columns: Sequence[str]) -> None:
    for place, column in enumerate(columns):
        scores.check_column(column, "--columns")
        if column in columns[:place]:
            raise UsageError(f"--columns: '{column}' is given twice")


def _write(scores: Scores, decision: Decision, targets: FilterTargets, metadata: dict[str, Any]) -> None:
    with written(targets.kept, targets.dropped, targets.npy) as (kept_stream, dropped_stream, npy_stream):
        assert kept_stream is not None
        kept = decision.keep(scores)
        sink(kept.select(targets.columns) if targets.columns else kept, kept_stream, metadata, scores.name)
        if dropped_stream is not None:
            sink(decision.drop(scores), dropped_stream, metadata, scores.name)
        if npy_stream is not None:
            write_uids(scores, kept, npy_stream)


def _uid_column(scores: Scores) -> str:
    return "uid" if "uid" in scores.schema else "sha256"


def write_uids(scores: Scores, kept: pl.LazyFrame, stream: IO[bytes]) -> None:
    """Write the rows' uids as DataComp's tools read them: pairs of uint64 (high, low), sorted, each once.

    A row's uid is its column `uid`, if the table has one (32 hexadecimal digits, as in DataComp's metadata), else the
    first 32 digits of the picture's sha256.

    Raises:
        TableError: a uid that isn't hexadecimal.
    """
    column = _uid_column(scores)
    halves = [
        pl.col(column).str.slice(start, 16).str.to_integer(base=16, dtype=pl.UInt64, strict=False).alias(name)
        for name, start in (("high", 0), ("low", 16))
    ]
    digits = 32 if column == "uid" else 64
    bad = (pl.col(column).str.len_bytes() != digits).fill_null(value=True).alias("bad")
    found = fetch(kept.select(*halves, bad), scores.name)
    broken = found["bad"] | found["high"].is_null() | found["low"].is_null()
    if broken.any():
        raise TableError(f"--npy: {broken.sum()} kept rows haven't {digits} hexadecimal digits in '{column}'")
    high, low = found["high"].to_numpy(), found["low"].to_numpy()
    order = np.lexsort((low, high))
    uids = np.empty(len(order), dtype=np.dtype("u8,u8"))
    uids["f0"], uids["f1"] = high[order], low[order]
    first = np.ones(len(uids), dtype=bool)
    first[1:] = uids[1:] != uids[:-1]
    np.save(stream, uids[first], allow_pickle=False)


def _why_empty(scores: Scores, options: FilterOptions, decision: Decision) -> str:
    """Where nothing is kept: which bound the table doesn't reach, if one alone is to blame."""
    if decision.kept or not decision.rows:
        return "" if decision.rows else f"{scores.name} has no rows"
    if options.confidence is not None:
        return _why_unsure(scores, options, options.confidence)
    asked = [("highest", "--min", name, bound) for name, bound in options.minimum.items()]
    asked += [("lowest", "--max", name, bound) for name, bound in options.maximum.items()]
    if not asked:
        return ""
    numbers = {name: pl.col(name).filter(pl.col(name).is_finite()) for _, _, name, _ in asked}
    ends = [numbers[name].max() if end == "highest" else numbers[name].min() for end, _, name, _ in asked]
    scored = _decided_by(scores, options).filter(is_ok())
    found = fetch(scored.select(end.alias(str(place)) for place, end in enumerate(ends)), scores.name).row(0)
    return "; ".join(
        f"the {end} {name} is {value:.4g}, {option} asks for {bound:g}"
        for (end, option, name, bound), value in zip(asked, found, strict=True)
        if value is not None and _is_beyond(value, np.float32(bound), end)
    )


def _is_beyond(value: float, bound: np.float32, end: str) -> bool:
    """Whether the best of a column misses the bound, compared as the criteria do."""
    return bool(np.float32(value) < bound if end == "highest" else np.float32(value) > bound)


def _why_unsure(scores: Scores, options: FilterOptions, confidence: float) -> str:
    """What a confidence lacks: ratings, or scores above those of the pictures that people rated below the minimum."""
    from zscore.human import DECIMALS

    assert options.calibration is not None
    ((name, bound),) = options.minimum.items()
    reference, share = options.calibration.references[name], round(1 - confidence, 12)
    ratings, needed = len(reference.human), math.ceil(round(1 / share, 6)) - 1
    if ratings < needed:
        return f"the calibration has {ratings} ratings of {name}, --confidence {confidence:g} needs at least {needed}"
    rated = zip(reference.score, reference.human, strict=True)
    threshold = max((score for score, human in rated if round(human, DECIMALS) < bound), default=-math.inf)
    scored = _decided_by(scores, options).filter(is_ok() & pl.col(name).is_finite())
    counts = scored.select(pl.len().alias("all"), (pl.col(name) > threshold).sum().alias("above"))
    total, above = fetch(counts, scores.name).row(0)
    if not total:
        return ""
    return (
        f"{above} of {total} pictures have {name} above {threshold:.4g}, the highest of those that people rated below"
        f" {bound:g}; with {ratings} ratings --confidence {confidence:g} asks for"
        f" {math.ceil(round(total / ((ratings + 1) * share), 6))} there"
    )


def decide(scores: Scores, options: FilterOptions) -> Decision:
    """Look at every row once.

    Raises:
        UsageError: an option that names what isn't there, or can't hold.
        TableError: a column is missing, or the table can't be read.
    """
    options.check()
    scores.require("status", "shard", "index")
    frame = _decided_by(scores, options)
    ranking = _ranking(scores, options)
    criteria = row_criteria(scores, frame, options, ranking)
    passes = [is_ok(), *(criterion.passes for criterion in criteria)]
    found = _look(scores, frame, _columns(criteria, options, ranking), options.where)
    code_N = found["code"].to_numpy(writable=True)
    reasons = [criterion.reason for criterion in criteria]
    if options.dedupe:
        reasons.append("duplicate")
        code_N[_duplicates(scores, found["picture"], code_N == KEPT)] = len(reasons)
    if options.fraction is not None:
        reasons.append("fraction")
        code_N[_beyond_fraction(scores, found["rank"], code_N == KEPT, options.fraction)] = len(reasons)
    looks_at_rows = options.where is None and options.calibration is None
    is_local = looks_at_rows and not options.dedupe and options.fraction is None
    predicate = reduce(lambda one, other: one & other, passes) if is_local else None
    return Decision(code_N, tuple(reasons), _count(scores, code_N, reasons), predicate)


def _look(scores: Scores, frame: pl.LazyFrame, columns: list[pl.Expr], where: str | None) -> pl.DataFrame:
    """The first pass.

    Raises:
        UsageError: the SQL condition can't be computed at some row.
        TableError: the table can't be read.
    """
    try:
        return fetch(frame.select(columns), scores.name)
    except TableError as error:
        if where is None:
            raise
        # Whose fault it is shows when the same columns are read and nothing is computed from them.
        names = sorted({name for column in columns for name in column.meta.root_names()})
        decoded = pl.struct(names).map_batches(pl.Series.is_null, return_dtype=pl.Boolean, is_elementwise=True)
        fetch(frame.select(decoded.any()), scores.name)
        raise UsageError(f"--where '{where}': {str(error.__cause__).splitlines()[0]}") from error


def _decided_by(scores: Scores, options: FilterOptions) -> pl.LazyFrame:
    if options.calibration is None:
        return scores.frame
    from zscore.calibration import apply_calibration, check_made_for

    check_made_for(options.calibration, scores.metadata, scores.name)
    return apply_calibration(scores.frame, options.calibration)


def _ranking(scores: Scores, options: FilterOptions) -> ScoreExpression | None:
    if options.fraction is None:
        return None
    if not 0 < options.fraction <= 1:
        raise UsageError(f"--fraction {options.fraction:g}: give a share above 0 and at most 1, like 0.3")
    return ScoreExpression(options.ranked_by, scores.dimensions)


def _columns(criteria: Sequence[Criterion], options: FilterOptions, ranking: ScoreExpression | None) -> list[pl.Expr]:
    """The first pass: a code a row, and what dedupe and fraction need besides."""
    code = pl.lit(KEPT, pl.UInt8)
    for number, criterion in reversed(list(enumerate(criteria, 1))):
        code = pl.when(criterion.passes).then(code).otherwise(pl.lit(number, pl.UInt8))
    columns = [pl.when(is_ok()).then(code).otherwise(pl.lit(NOT_OK, pl.UInt8)).alias("code")]
    if options.dedupe:
        columns.append(pl.col("sha256").hash().alias("picture"))
    if ranking is not None:
        columns.append(ranking.exact().alias("rank"))
    return columns


def _duplicates(scores: Scores, picture: pl.Series, passing: Mask) -> Mask:
    """Passing rows whose picture an earlier passing row has."""
    hash_N = picture.to_numpy()
    sorted_M = np.sort(hash_N[passing])
    repeated = np.unique(sorted_M[1:][sorted_M[1:] == sorted_M[:-1]])
    if not repeated.size:
        return np.zeros_like(passing)
    # Equal hashes are almost surely equal pictures; these few are compared in full.
    candidates = passing & (repeated[np.searchsorted(repeated, hash_N).clip(max=repeated.size - 1)] == hash_N)
    names = fetch(scores.where(candidates).select("sha256"), scores.name)["sha256"]
    again = ~(names.is_first_distinct() | names.is_null())
    mask = np.zeros_like(passing)
    mask[np.flatnonzero(candidates)[again.to_numpy()]] = True
    return mask


def _beyond_fraction(scores: Scores, rank: pl.Series, passing: Mask, fraction: float) -> Mask:
    """Passing rows that aren't among the best; of equal scores the first by (shard, index), then by row."""
    score_N = rank.to_numpy()
    total = int(passing.sum())
    wanted = int((Decimal(repr(fraction)) * total).to_integral_value(ROUND_HALF_UP))
    if wanted == 0:
        return passing
    cut = np.partition(score_N[passing], total - wanted)[total - wanted]  # the worst that is kept
    better = passing & (score_N > cut)
    tied = passing & (score_N == cut)
    free = wanted - int(better.sum())
    if free < int(tied.sum()):
        rows = fetch(scores.where(tied).select("shard", "index"), scores.name)
        order = rows.select(pl.col("shard").cast(pl.String), "index").with_row_index(ROW).sort("shard", "index", ROW)
        mask = np.zeros_like(passing)
        mask[np.flatnonzero(tied)[order[ROW].to_numpy()[:free]]] = True
        tied = mask
    return np.asarray(passing & ~better & ~tied)


def _count(scores: Scores, code_N: NDArray[np.uint8], reasons: Sequence[str]) -> dict[str, int]:
    """Dropped rows by reason; those without scores by their status."""
    counts = np.bincount(code_N, minlength=256)
    found: dict[str, int] = {}
    for number, reason in enumerate(reasons, 1):  # two criteria may share a reason
        if counts[number]:
            found[reason] = found.get(reason, 0) + int(counts[number])
    if counts[NOT_OK]:
        found |= failures(scores)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
