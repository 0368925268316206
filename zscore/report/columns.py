"""Which columns of a table a report can draw: tables made with `--columns` or from several rubrics have fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from zscore.errors import TableError
from zscore.tables import OVERALL, ROW, is_ok

if TYPE_CHECKING:
    from zscore.tables import Scores


@dataclass(frozen=True, slots=True)
class Columns:
    """The scores, widths and distributions that a table has."""

    scores: tuple[str, ...]
    """`overall`, if it is there, and the dimensions. The first leads: it ranks pictures and groups."""
    dimensions: tuple[str, ...]
    stds: tuple[str, ...]
    """Dimensions that have a std."""
    probs: tuple[str, ...]
    """Dimensions that have a distribution."""

    @property
    def lead(self) -> str:
        """The score that pictures and groups are ranked by."""
        return self.scores[0]


def columns_of(scores: Scores) -> Columns:
    """What is there.

    Raises:
        TableError: no score at all, or rows that can't be named.
    """
    scores.require("status", "shard", "index", "key", "prompt")
    dimensions = scores.dimensions
    found = (*((OVERALL,) if OVERALL in scores.schema else ()), *dimensions)
    if not found:
        raise TableError(f"{scores.name} has no score column: was it made with --columns?")
    return Columns(
        scores=found,
        dimensions=dimensions,
        stds=tuple(name for name in dimensions if f"{name}_std" in scores.schema),
        probs=tuple(name for name in dimensions if f"{name}_probs" in scores.schema),
    )


def scored(scores: Scores, columns: Columns) -> pl.LazyFrame:
    """The rows that have a number for every score, with their position in the table as `ROW`."""
    finite = [pl.col(name).is_finite().fill_null(value=False) for name in columns.scores]
    return scores.frame.with_row_index(ROW).filter(is_ok(), *finite)
