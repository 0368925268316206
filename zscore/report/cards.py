"""A row as the page shows it: shortened texts, scores, and each distribution as the path of its bars."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from zscore.report.pictures import sample_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore.report.columns import Columns
    from zscore.report.pictures import Thumbnail, Thumbnails

# A prompt may have a megabyte; what is behind this helps nobody to judge a picture.
MOST_PROMPT = 1200
MOST_NAME = 160
MOST_FAULT = 320
# In units of the drawing: a level is as wide as this, bars leave a gap between them.
LEVEL, GAP, HEIGHT = 10, 2, 24


@dataclass(frozen=True, slots=True)
class Drawing:
    """A distribution as SVG: the bars, and a line at the mean."""

    bars: str
    mean: str
    width: int
    label: str
    """For those who can't see it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What one dimension says of a picture."""

    name: str
    mean: float
    std: float | None
    drawing: Drawing | None


@dataclass(frozen=True, slots=True)
class Picture:
    """A thumbnail where a page shows it."""

    thumbnail: Thumbnail
    number: int
    """The same wherever the page shows these bytes."""
    is_first: bool
    """Whether the page holds the bytes here; later places refer to them."""


@dataclass(slots=True)
class Album:
    """Hands out thumbnails in the order of the page, so that it holds each one's bytes once."""

    thumbnails: Thumbnails
    numbers: dict[str, int] = field(default_factory=dict)

    def take(self, row: dict[str, Any]) -> Picture | str:
        """The row's picture, or why there is none."""
        sample = sample_of(row)
        if sample is None:
            return "the row doesn't say which sample it is"
        found = self.thumbnails.by_sample.get(sample, "the picture couldn't be read")
        if isinstance(found, str):
            return shorten(found, MOST_FAULT)
        is_first = found.url not in self.numbers
        return Picture(found, self.numbers.setdefault(found.url, len(self.numbers) + 1), is_first)


@dataclass(frozen=True, slots=True)
class Card:
    """A picture and what was found of it."""

    place: str
    """SHARD, sample INDEX, as far as the row says it."""
    key: str
    prompt: str
    size: str
    score: float
    width: float | None
    """Mean of the dimensions' standard deviations."""
    marks: list[Mark]
    picture: Picture | None
    fault: str
    """Why there is no picture although one was asked for."""


def make_card(row: dict[str, Any], columns: Columns, values: Sequence[float], album: Album | None) -> Card:
    """The card of one row."""
    sample = f"sample {row['index']}" if row["index"] is not None else ""
    picture = album.take(row) if album else ""
    return Card(
        place=", ".join(part for part in (shorten(str(row["shard"] or ""), MOST_NAME), sample) if part),
        key=shorten(str(row["key"]), MOST_NAME),
        prompt=shorten(str(row["prompt"]), MOST_PROMPT),
        size=f"{row['width']} × {row['height']}" if row.get("width") and row.get("height") else "",
        score=row[columns.lead],
        width=_mean([row[f"{name}_std"] for name in columns.stds]),
        marks=[_mark(row, name, columns, values) for name in columns.dimensions],
        picture=picture if isinstance(picture, Picture) else None,
        fault="" if isinstance(picture, Picture) else picture,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None and math.isfinite(value)]
    return sum(there) / len(there) if there else None


def _mark(row: dict[str, Any], name: str, columns: Columns, values: Sequence[float]) -> Mark:
    std = row[f"{name}_std"] if name in columns.stds else None
    probs = row[f"{name}_probs"] if name in columns.probs else None
    drawing = draw(probs, values, row[name]) if probs else None
    return Mark(name, row[name], std, drawing)


def shorten(text: str, most: int) -> str:
    """At most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def draw(probs: Sequence[float], values: Sequence[float], mean: float) -> Drawing:
    """A bar a level, the highest as high as the drawing.

    Args:
        probs: of the levels; what isn't a number is drawn as nothing.
        values: of the levels; empty where files of different rubrics are mixed.
        mean: where the line stands, in the units of `values`.
    """
    shares = [share if share is not None and math.isfinite(share) else 0.0 for share in probs]
    highest = max(shares) or 1.0
    bars = ""
    for k, share in enumerate(shares):
        height = round(share / highest * HEIGHT, 1)
        if height > 0:
            bars += f"M{k * LEVEL + GAP // 2} {HEIGHT}v-{height:g}h{LEVEL - GAP}v{height:g}z"
    names = (
        [f"{value:g}" for value in values] if len(values) == len(shares) else [str(k + 1) for k in range(len(shares))]
    )
    line = ""
    if len(values) == len(shares) and math.isfinite(mean):
        at = float(np.interp(mean, values, [k * LEVEL + LEVEL / 2 for k in range(len(values))]))
        line = f"M{at:.1f} 0v{HEIGHT}"
    spoken = ", ".join(f"{name}: {share:.0%}" for name, share in zip(names, shares, strict=True) if share >= 0.005)
    return Drawing(bars, line, LEVEL * len(shares), spoken)
