"""The numbers behind the threshold charts, for those who can't see or don't run them."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore.report.summary import Grid

# About as many rows as people read.
MOST_LINES = 12


def threshold_table(thresholds: dict[str, Any], grid: Grid, levels: Sequence[float], rows: int) -> list[dict[str, Any]]:
    """A line for every level that is a threshold of the grid: share and mean of what it keeps, by score."""
    stops = grid.stops
    places = [stops.index(level) for level in levels if level in stops]
    if not 2 <= len(places) <= MOST_LINES:
        places = list(range(0, len(stops), max(1, len(stops) // (MOST_LINES - 2))))
    kept = [_from(counts) for counts in thresholds["counts"]]
    own = [_from(sums[s]) for s, sums in enumerate(thresholds["sums"])]
    return [
        {
            "threshold": f"{stops[at]:.{grid.decimals}f}",
            "cells": [
                (kept[s][at] / rows, own[s][at] / kept[s][at] if kept[s][at] else None) for s in range(len(kept))
            ],
        }
        for at in places
    ]


def _from(bins: Sequence[float]) -> list[float]:
    """What lies at or above each stop: bin 0 is below the first."""
    return list(accumulate(reversed(bins[1:])))[::-1]
