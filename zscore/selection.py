"""Best of N: ranks the candidates of each group, keeps the best, and says what choosing brings.

Candidates are the rows whose status is ok, whose score is finite and that have a group. The tie rule is that of
`zscore.ranking`. Selected rows keep the order of the input and all their columns, and get two more: `select_score`
(float32) and `select_rank` (from 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from zscore.errors import UsageError
from zscore.expressions import ScoreExpression
from zscore.group_statistics import group_statistics, write_statistics
from zscore.pairs import choose_pairs, has_distribution, write_pairs
from zscore.ranking import rank
from zscore.store import refuse_foreign
from zscore.table_output import check_targets, derived, failures, fetch, sink, written
from zscore.tables import OVERALL, ROW, is_ok, looked_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zscore.group_statistics import GroupStatistics
    from zscore.pairs import PairOptions
    from zscore.ranking import Ranking
    from zscore.tables import Scores

SCORE, RANK = "select_score", "select_rank"
_TAKEN, _NONFINITE, _NO_GROUP, _NOT_OK = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions:
    """What `select` ranks, and by what."""

    best: int = 1
    """Candidates to keep of each group; a group with fewer keeps all."""
    by: str = "group"
    """Column whose equal values make a group."""
    score: str = OVERALL
    """Score expression."""
    risk: float = 0.0
    """Rank by mean − risk × std (see `ScoreExpression.expr`)."""
    pairs: PairOptions | None = None
    """Which preference pairs to take; None takes none."""

    def described(self) -> dict[str, object]:
        """The options, for the metadata."""
        found: dict[str, object] = {"best": self.best, "by": self.by, "score": self.score, "risk": self.risk}
        if self.pairs is not None:
            found |= {"min_gap": self.pairs.min_gap, "max_pairs": self.pairs.max_pairs}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectTargets:
    """Where `select` writes; paths or fsspec urls."""

    best: str
    pairs: str | None = None
    statistics: str | None = None
    """A row per group."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The rows that take part, ranked, and why the others don't."""

    expression: ScoreExpression
    ranking: Ranking
    rows: int
    """Of the whole table."""
    dropped: dict[str, int]
    """By reason: a status, `nonfinite_score` or `no_group`."""
    pairable: Ranking
    """Those that pairs are made of."""


@dataclass(frozen=True, slots=True)
class SelectSummary:
    """What `select` did, or would do."""

    rows: int
    selected: int
    dropped: dict[str, int]
    statistics: GroupStatistics
    pairs: int | None
    """None where none were asked for."""
    unpaired: int
    """Candidates that are in no pair, for they have no distribution."""

    def counts(self) -> dict[str, object]:
        """For the metadata."""
        found: dict[str, object] = {"rows": self.rows, "selected": self.selected, "dropped": self.dropped}
        return {**found, "groups": self.statistics.groups, "pairs": self.pairs or 0, "unpaired": self.unpaired}


def select(scores: Scores, options: SelectOptions, targets: SelectTargets, *, dry_run: bool) -> SelectSummary:
    """Rank, and write what is asked for; all files appear together, replacing earlier ones.

    Raises:
        UsageError: an option that can't hold, or an output that is an input.
        TableError: a table that can't be read or lacks a column.
        OutputError: an output can't be written.
    """
    expression = _check(scores, options, targets)
    found = candidates(scores, options, expression)
    pairs = choose_pairs(found.pairable, options.pairs) if options.pairs is not None else None
    summary = SelectSummary(
        rows=found.rows,
        selected=int(np.minimum(found.ranking.sizes(), options.best).sum()),
        dropped=found.dropped,
        statistics=group_statistics(found.ranking),
        pairs=None if pairs is None else len(pairs),
        unpaired=len(found.ranking.key_M) - len(found.pairable.key_M),
    )
    if not dry_run:
        metadata = derived(scores.metadata, "select", options.described(), summary.counts())
        with written(targets.best, targets.pairs, targets.statistics) as (best_stream, pair_stream, statistics_stream):
            if best_stream is not None:
                sink(best_rows(scores, options, found), best_stream, metadata, scores.name)
            if pair_stream is not None and pairs is not None:
                write_pairs(scores, pairs, pair_stream, metadata, by=options.by, expression=expression)
            if statistics_stream is not None:
                write_statistics(scores, options.by, found.ranking, statistics_stream, metadata)
    return summary


def _check(scores: Scores, options: SelectOptions, targets: SelectTargets) -> ScoreExpression:
    """The score, once nothing is left that can't hold."""
    outputs = {"--out": targets.best, "--pairs": targets.pairs, "--stats": targets.statistics}
    refuse_foreign(outputs)
    check_targets(scores.files, outputs, scores.sources)
    if options.best < 1:
        raise UsageError(f"--best {options.best}: keep at least 1 of each group")
    if not 0 <= options.risk < float("inf"):
        raise UsageError(f"--risk {options.risk:g}: give 0 or more; 1 ranks by mean − std")
    if options.pairs is not None and targets.pairs is None:
        raise UsageError("--min-gap and --max-pairs say which pairs are taken: give --pairs FILE too")
    if options.pairs is None and targets.pairs is not None:
        raise UsageError(f"--pairs {targets.pairs}: no pairs are asked for; set SelectOptions.pairs")
    expression = ScoreExpression(options.score, scores.dimensions)
    if options.pairs is not None:
        options.pairs.check(scores, expression)
    return expression


def candidates(scores: Scores, options: SelectOptions, expression: ScoreExpression) -> Candidates:
    """Read groups and scores, and rank.

    Raises:
        UsageError: `by` isn't a column.
        TableError: a column is missing, or the table can't be read.
    """
    columns = expression.columns(options.risk)
    scores.require("status", *columns)
    group = pl.col(scores.check_column(options.by, "--by"))
    score = expression.expr(options.risk)
    finite = pl.all_horizontal([*(pl.col(name).is_finite() for name in columns), score.is_finite()])
    code = (
        pl.when(~is_ok())
        .then(pl.lit(_NOT_OK, pl.UInt8))
        .when(group.is_null())
        .then(pl.lit(_NO_GROUP, pl.UInt8))
        .when(~finite.fill_null(value=False))
        .then(pl.lit(_NONFINITE, pl.UInt8))
        .otherwise(pl.lit(_TAKEN, pl.UInt8))
    )
    whole = has_distribution(scores, expression) if options.pairs is not None else pl.lit(value=True)
    query = scores.frame.select(group=group.hash(), score=score, code=code, whole=whole)
    found = fetch(query, scores.name)
    taken = found["code"].to_numpy() == _TAKEN
    ranking = _rank(found, taken)
    paired = taken & found["whole"].to_numpy()
    counts = np.bincount(found["code"].to_numpy(), minlength=4)
    dropped = {"nonfinite_score": int(counts[_NONFINITE]), "no_group": int(counts[_NO_GROUP])}
    dropped |= failures(scores) if counts[_NOT_OK] else {}
    by_count = sorted(dropped.items(), key=lambda pair: (-pair[1], pair[0]))
    dropped = {reason: count for reason, count in by_count if count}
    pairable = ranking if np.array_equal(paired, taken) else _rank(found, paired)
    return Candidates(expression, ranking, len(taken), dropped, pairable)


def _rank(found: pl.DataFrame, taken: NDArray[np.bool_]) -> Ranking:
    return rank(
        found["group"].to_numpy()[taken],
        found["score"].to_numpy()[taken],
        np.flatnonzero(taken).astype(np.uint32),
    )


def best_rows(scores: Scores, options: SelectOptions, found: Candidates) -> pl.LazyFrame:
    """The best of each group, in the order of the input, with score and rank."""
    rank_N = np.zeros(found.rows, dtype=np.uint32)
    for place in range(options.best):
        rows_G = found.ranking.rows_at(place)
        if not rows_G.size:
            break
        rank_N[rows_G] = place + 1
    rows = scores.where(rank_N > 0)
    score = found.expression.expr(options.risk).alias(SCORE)
    return rows.with_columns(score, looked_up(rank_N, pl.UInt32).alias(RANK)).drop(ROW)
