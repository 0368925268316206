"""Makes a report: reads the table, chooses rows, fetches their pictures, writes the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zscore.errors import UsageError
from zscore.records import Status
from zscore.report.cards import make_card
from zscore.report.columns import columns_of
from zscore.report.page import Page, PageGallery, PageGroup, render
from zscore.report.picks import choose_galleries, group_stats, read_groups
from zscore.report.pictures import read_thumbnails
from zscore.report.summary import (
    correlations,
    count_pictures,
    count_unscored,
    describe,
    grid_for,
    read_numbers,
    read_statuses,
    threshold_bins,
    uncertainty,
)
from zscore.table_output import check_targets, written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore.report.picks import Gallery, Group
    from zscore.report.pictures import Thumbnails
    from zscore.report.summary import Numbers
    from zscore.tables import Scores

MOST_TOP = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What the page shows.

    Raises:
        UsageError: a number that can't hold.
    """

    out: str
    """Path or fsspec url of the page; replaced if it exists."""
    shards: tuple[str, ...] = ()
    """Where the pictures are; without them cards have texts alone."""
    sources: tuple[str, ...] = ()
    """What the suggested filter command calls the table; its files if empty."""
    title: str | None = None
    """Heading of the page; the table's name if None."""
    top: int = 12
    """Pictures in each gallery; half as many groups."""

    def __post_init__(self) -> None:
        if not 0 <= self.top <= MOST_TOP:
            raise UsageError(f"--top {self.top}: give 0 (no pictures) to {MOST_TOP}")


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What `write_report` wrote."""

    rows: int
    scored: int
    pictures: int
    """Thumbnails in the page."""
    faults: tuple[str, ...]
    """One line a picture or shard that couldn't be shown."""
    size: int
    """Bytes of the page."""


def write_report(scores: Scores, options: ReportOptions) -> ReportSummary:
    """Write the page; it appears whole or not at all.

    Raises:
        UsageError: an output that is an input, or shards that aren't there.
        TableError: a table that can't be read, or that names shards which aren't given.
        OutputError: the page can't be written.
    """
    check_targets(scores.files, {"--out": options.out})
    columns = columns_of(scores)
    statuses = read_statuses(scores)
    page = Page(
        title=options.title or _title(options.sources or scores.files),
        sources=options.sources or scores.files,
        metadata=scores.metadata,
        columns=columns,
        levels=scores.values,
        statuses=statuses,
        rows=sum(line.count for line in statuses),
    )
    if any(line.status == Status.OK for line in statuses):
        numbers = read_numbers(scores, columns)
        page.scored = len(numbers)
        page.unscored = count_unscored(scores, numbers)
        if page.scored:
            _add_charts(page, scores, numbers, options)
    html = render(page).encode("utf-8", "replace")
    with written(options.out) as (stream,):
        assert stream is not None
        stream.write(html)
    return ReportSummary(page.rows, page.scored, page.pictures, tuple(page.faults), len(html))


def _title(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"Scores in {sources[0].rstrip('/').rpartition('/')[2]}{more}"


def _add_charts(page: Page, scores: Scores, numbers: Numbers, options: ReportOptions) -> None:
    columns, grid = page.columns, grid_for(scores.values, numbers)
    groups = group_stats(scores, columns, grid, math.ceil(options.top / 2))
    page.grid = grid
    page.distinct = count_pictures(scores)
    page.described = describe(numbers)
    page.groups = groups
    page.correlation = correlations(numbers.score, columns.dimensions) if len(columns.dimensions) > 1 else None
    page.uncertainty = uncertainty(numbers, grid)
    page.thresholds = threshold_bins(numbers, grid)
    if options.top:
        galleries = choose_galleries(scores, columns, numbers, options.top)
        chosen = read_groups(scores, columns, groups.chosen) if groups else []
        _add_cards(page, scores, galleries, chosen, options)


def _add_cards(
    page: Page, scores: Scores, galleries: list[Gallery], groups: list[Group], options: ReportOptions
) -> None:
    rows = [row for gallery in galleries for row in gallery.rows] + [row for group in groups for row in group.rows]
    thumbnails: Thumbnails | None = None
    if options.shards:
        thumbnails = read_thumbnails(rows, options.shards, scores.metadata.get("options", {}))
        page.faults = thumbnails.faults
        page.pictures = sum(not isinstance(made, str) for made in thumbnails.by_sample.values())

    def cards(rows: list[dict[str, Any]]) -> list[Any]:
        return [make_card(row, page.columns, scores.values, thumbnails) for row in rows]

    page.galleries = [PageGallery(gallery.title, gallery.note, cards(gallery.rows)) for gallery in galleries]
    page.chosen = [PageGroup(group, cards(group.rows)) for group in groups]
