"""Makes a report: reads the table, chooses rows, fetches their pictures, writes the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zscore.errors import UsageError
from zscore.records import Status
from zscore.report.cards import Album, make_card
from zscore.report.columns import columns_of
from zscore.report.page import Page, PageGallery, PageGroup, render
from zscore.report.picks import choose_galleries, group_stats, read_groups
from zscore.report.pictures import MOST_BYTES, read_thumbnails, samples_of
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
from zscore.shards import expand
from zscore.table_output import check_targets, written

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zscore.records import ShardRef
    from zscore.report.cards import Card
    from zscore.report.picks import Gallery, Group
    from zscore.report.summary import Numbers
    from zscore.tables import Scores

MOST_TOP = 60
# Bytes of the whole file, which is to be mailed.
MOST_PAGE = 10_000_000
# Of these, what stands around a picture that is inlined, with a key of `MOST_NAME` characters to be escaped.
FRAME = 1_500
# And what the page says of pictures that couldn't be shown.
NOTICES = 50_000


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


@dataclass(slots=True)
class _Shown:
    """The rows that have cards."""

    galleries: list[Gallery] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        parts = [gallery.rows for gallery in self.galleries] + [group.rows for group in self.groups]
        return [row for rows in parts for row in rows]


def write_report(scores: Scores, options: ReportOptions) -> ReportSummary:
    """Write the page; it appears whole or not at all.

    Raises:
        UsageError: an output that is an input, or shards that aren't there.
        TableError: a table that can't be read, or that names shards which aren't given.
        OutputError: the page can't be written.
    """
    shards = expand(options.shards) if options.shards else []
    check_targets(scores.files, {"--out": options.out}, scores.sources, shards=[shard.url for shard in shards])
    columns = columns_of(scores)
    statuses = read_statuses(scores)
    page = Page(
        title=options.title or _title(options.sources or scores.files),
        sources=options.sources or scores.files,
        mixed=scores.mixed,
        metadata=scores.metadata,
        columns=columns,
        levels=scores.values,
        statuses=statuses,
        rows=sum(line.count for line in statuses),
    )
    shown = _Shown()
    if any(line.status == Status.OK for line in statuses):
        numbers = read_numbers(scores, columns)
        page.scored = len(numbers)
        page.unscored = count_unscored(scores, numbers)
        if page.scored:
            shown = _add_charts(page, scores, numbers, options)
    html = render(page).encode("utf-8", "replace")
    if shards and shown.rows:
        _illustrate(page, scores, shown, shards, MOST_PAGE - len(html))
        html = render(page).encode("utf-8", "replace")
    with written(options.out) as (stream,):
        assert stream is not None
        stream.write(html)
    return ReportSummary(page.rows, page.scored, page.pictures, tuple(page.faults), len(html))


def _title(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"Scores in {sources[0].rstrip('/').rpartition('/')[2]}{more}"


def _add_charts(page: Page, scores: Scores, numbers: Numbers, options: ReportOptions) -> _Shown:
    """Everything but pictures; returns the rows that want one."""
    columns, grid = page.columns, grid_for(scores.values, numbers)
    groups = group_stats(scores, columns, grid, math.ceil(options.top / 2))
    page.grid = grid
    page.distinct = count_pictures(scores, columns)
    page.described = describe(numbers)
    page.groups = groups
    page.correlation = correlations(numbers.score, columns.dimensions) if len(columns.dimensions) > 1 else None
    page.uncertainty = uncertainty(numbers, grid)
    page.thresholds = threshold_bins(numbers, grid)
    shown = _Shown()
    if options.top:
        shown.galleries = choose_galleries(scores, columns, numbers, options.top)
        shown.groups = read_groups(scores, columns, groups.chosen) if groups else []
        _add_cards(page, scores, shown)
    return shown


def _add_cards(page: Page, scores: Scores, shown: _Shown, album: Album | None = None) -> None:
    def cards(rows: list[dict[str, Any]]) -> list[Card]:
        return [make_card(row, page.columns, scores.values, album) for row in rows]

    page.galleries = [PageGallery(gallery.title, gallery.note, cards(gallery.rows)) for gallery in shown.galleries]
    page.chosen = [PageGroup(group, cards(group.rows)) for group in shown.groups]


def _illustrate(page: Page, scores: Scores, shown: _Shown, shards: Sequence[ShardRef], room: int) -> None:
    """Add the pictures; their thumbnails share the room in bytes that the page has left."""
    rows = shown.rows
    room -= NOTICES + len(rows) * FRAME
    # In base64 three bytes take four.
    most = room * 3 // 4 // max(1, len(samples_of(rows)))
    thumbnails = read_thumbnails(rows, shards, _options(scores.metadata), min(MOST_BYTES, most))
    page.faults = thumbnails.faults
    page.pictures = sum(not isinstance(made, str) for made in thumbnails.by_sample.values())
    _add_cards(page, scores, shown, Album(thumbnails))


def _options(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the files were scored with; of files that differ, all that occur."""
    found = metadata.get("mixed_options", [metadata.get("options")])
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
