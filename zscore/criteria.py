"""The criteria that `zscore filter` looks at row by row, as polars expressions with their reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl

from zscore.errors import TableError, UsageError
from zscore.table_output import fetch
from zscore.tables import OVERALL, is_ok, known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zscore.calibration import Calibration
    from zscore.expressions import Probability, ScoreExpression
    from zscore.tables import Scores

# float32 probabilities sum to 1 within a few 1e-7; asking for a share of 1 must be possible. It is a part of what is
# asked for: no share at all is never enough.
SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """What `filter_scores` keeps; every criterion must hold."""

    minimum: Mapping[str, float] = field(default_factory=dict)
    """Least score by dimension or `overall`, compared in the column's own float32."""
    maximum: Mapping[str, float] = field(default_factory=dict)
    max_std: Mapping[str, float] = field(default_factory=dict)
    """Largest std by dimension; `overall` stands for every dimension."""
    prob: tuple[Probability, ...] = ()
    """Least share of a distribution beyond a value."""
    where: str | None = None
    """A polars SQL expression; null counts as false."""
    dedupe: bool = False
    """Of rows with the same picture bytes, keep the first that passes the criteria above."""
    fraction: float | None = None
    """Share of the rows that pass everything else, best first."""
    score: str | None = None
    """Expression that `fraction` ranks by; None is `overall`."""
    calibration: Calibration | None = None
    """Decide by calibrated scores (what is written stays as it was)."""
    confidence: float | None = None
    """Turn the one minimum into the conformal threshold of `zscore.calibration`; nothing else may decide then."""

    @property
    def ranked_by(self) -> str:
        """What `fraction` ranks by."""
        return self.score if self.score is not None else OVERALL

    def check(self) -> None:
        """Refuse options that go together in no table.

        Raises:
            UsageError: a score that nothing is ranked by; a confidence without what it needs, or beside what would
                break its promise.
        """
        if self.score is not None and self.fraction is None:
            raise UsageError(f"--score '{self.score}' is what --fraction ranks by: give --fraction too")
        if self.confidence is not None:
            self._check_promise(self.confidence)

    def _check_promise(self, confidence: float) -> None:
        """The promise is about all rows that reach one minimum: a part of them may hold all the bad ones."""
        if self.calibration is None:
            raise UsageError("--confidence needs --calibration: make one with `zscore calibrate`")
        if not self.minimum:
            raise UsageError("--confidence needs --min: the score that kept pictures are to have")
        if len(self.minimum) > 1:
            raise UsageError(
                f"--confidence {confidence:g} holds for one --min, not for {' and '.join(self.minimum)} together:"
                " run it on the whole table once for each, or calibrate and filter on overall"
            )
        beside = {
            "--max": bool(self.maximum),
            "--prob": bool(self.prob),
            "--max-std": bool(self.max_std),
            "--where": self.where is not None,
            "--dedupe": self.dedupe,
            "--fraction": self.fraction is not None,
        }
        for option, is_given in beside.items():
            if is_given:
                raise UsageError(
                    f"--confidence {confidence:g} holds for --min alone, what {option} leaves of it may be worse:"
                    f" run `zscore filter` with {option} on the kept file, a set without a promise"
                )

    def described(self) -> dict[str, object]:
        """The criteria that are set, for the metadata."""
        found: dict[str, object] = {
            "min": dict(self.minimum),
            "max": dict(self.maximum),
            "max_std": dict(self.max_std),
            "prob": [str(wanted) for wanted in self.prob],
            "where": self.where,
            "dedupe": self.dedupe,
            "fraction": self.fraction,
            "score": self.ranked_by if self.fraction is not None else None,
            "confidence": self.confidence,
            "calibrated": self.calibration is not None,
        }
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True, slots=True)
class Criterion:
    """Something that a row must pass."""

    reason: str
    passes: pl.Expr
    columns: tuple[str, ...] = ()
    """Scores that it reads; they must be finite."""
    nullable: tuple[str, ...] = ()
    """Columns of floats that may also be null."""


def row_criteria(
    scores: Scores, frame: pl.LazyFrame, options: FilterOptions, ranking: ScoreExpression | None
) -> list[Criterion]:
    """All row-wise criteria in the order of their reasons.

    Raises:
        UsageError: an option that names what isn't there, or can't hold.
        TableError: a column is missing.
    """
    minimum = _minimum(scores, frame, options)
    found = [*minimum, *_maximum(scores, options), *_probabilities(scores, options), *_stds(scores, options)]
    if options.where is not None:
        found.append(_where(scores, frame, options.where))
    if options.dedupe:
        scores.require("sha256")
    finite = _finite(scores, found, ranking)
    return [*([Criterion("nonfinite_score", pl.all_horizontal(finite))] if finite else []), *found]


def _finite(scores: Scores, found: Sequence[Criterion], ranking: ScoreExpression | None) -> list[pl.Expr]:
    """Whether what decides is a number; where no criterion reads a score, `overall` must be one."""
    read = {name: None for criterion in found for name in criterion.columns}
    read |= dict.fromkeys(ranking.columns() if ranking else ())
    nullable = {name for criterion in found for name in criterion.nullable}
    if not read and OVERALL in scores.schema and OVERALL not in nullable:
        read = {OVERALL: None}
    scores.require(*read)
    finite = [pl.col(name).is_finite().fill_null(value=False) for name in read]
    finite += [pl.col(name).is_finite().fill_null(value=True) for name in sorted(nullable - set(read))]
    if ranking is not None:
        finite.append(ranking.exact().is_finite().fill_null(value=False))
    return finite


def _minimum(scores: Scores, frame: pl.LazyFrame, options: FilterOptions) -> list[Criterion]:
    if options.confidence is None:
        return [
            Criterion(f"min:{name}", pl.col(scores.check_score(name, "--min")) >= _float32(bound), (name,))
            for name, bound in options.minimum.items()
        ]
    return [_confident(scores, frame, options, options.confidence)]


def _confident(scores: Scores, frame: pl.LazyFrame, options: FilterOptions, confidence: float) -> Criterion:
    """What the one minimum becomes with a confidence."""
    from zscore.calibration import confident_threshold
    from zscore.human import DECIMALS

    _check_whole(scores)
    assert options.calibration is not None
    ((name, bound),) = options.minimum.items()
    column = scores.check_score(name, "--min")
    scored = fetch(frame.filter(is_ok()).select(column), scores.name).to_series()
    threshold = confident_threshold(scored, options.calibration, bound, confidence, column)
    # The threshold was found among scores that were rounded like this, so that equal ones tie.
    return Criterion(f"confidence:{name}", pl.col(column).cast(pl.Float64).round(DECIMALS) > threshold, (name,))


def _check_whole(scores: Scores) -> None:
    """Refuse a table that a confidence has chosen from before: its rows aren't drawn like the rated ones any more."""
    histories = [scores.metadata.get("derived"), *scores.metadata.get("mixed_derived", [])]
    if any("confidence" in step.get("criteria", {}) for history in histories for step in history or []):
        raise UsageError(
            f"{scores.name} was kept with --confidence before, and what a second one keeps carries no promise:"
            " give the whole table"
        )


def _maximum(scores: Scores, options: FilterOptions) -> list[Criterion]:
    return [
        Criterion(f"max:{name}", pl.col(scores.check_score(name, "--max")) <= _float32(bound), (name,))
        for name, bound in options.maximum.items()
    ]


def _float32(value: float) -> pl.Expr:
    """A bound as the column would hold it: 3.7 in the table is at least --min 3.7."""
    return pl.lit(value, pl.Float32)


def _stds(scores: Scores, options: FilterOptions) -> list[Criterion]:
    found = []
    for name, bound in options.max_std.items():
        for dimension in scores.dimensions if name == OVERALL else [name]:
            column = f"{scores.check_score(dimension, '--max-std', overall=False)}_std"
            found.append(Criterion(f"max_std:{dimension}", pl.col(column) <= _float32(bound), (column,)))
    return found


def _probabilities(scores: Scores, options: FilterOptions) -> list[Criterion]:
    found = []
    for wanted in options.prob:
        column = f"{scores.check_score(wanted.dimension, '--prob', overall=False)}_probs"
        scores.require(column)
        if not scores.values:
            raise TableError(f"--prob {wanted}: the files' rubrics have different levels; filter them one by one")
        if not wanted.levels(scores.values):
            raise UsageError(
                f"--prob {wanted}: no level is {wanted.comparison} {wanted.value:g};"
                f" they go from {scores.values[0]:g} to {scores.values[-1]:g}"
            )
        share = pl.sum_horizontal(scores.level(column, k).cast(pl.Float64) for k in wanted.levels(scores.values))
        passes = (share.is_finite() & (share >= wanted.minimum * (1 - SLACK))).fill_null(value=False)
        found.append(Criterion(f"prob:{wanted.dimension}", passes, (wanted.dimension,)))
    return found


def _where(scores: Scores, frame: pl.LazyFrame, text: str) -> Criterion:
    """The SQL expression, null as false.

    For polars NaN is larger than every number, so a row with NaN in a column that is read takes no part; where the
    expression itself makes one of numbers (`0.0 / 0`), polars' order holds.

    Raises:
        UsageError: it can't be parsed, names no column, or isn't a condition.
    """
    try:
        condition = pl.sql_expr(text)
        names = list(dict.fromkeys(condition.meta.root_names()))
        for name in names:
            known(name, list(scores.schema), f"--where '{text}'", "column")
        kind = frame.head(0).select(condition).collect().dtypes[0]  # some errors show only when it runs
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"--where '{text}': {str(error).splitlines()[0]}") from error
    if kind != pl.Boolean:
        raise UsageError(f"--where '{text}' is a {kind}, not a condition: write something like 'width >= 512'")
    floats = tuple(name for name in names if scores.schema[name].is_float())
    return Criterion("where", condition.fill_null(value=False), nullable=floats)
