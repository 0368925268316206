"""`zscore report`: one HTML page about a scored table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zscore.report.job import ReportSummary

SHOWN_FAULTS = 3


def report(
    scores: Annotated[
        list[str] | None,
        typer.Argument(
            help="Scored tables: files, folders of parts, globs, fsspec urls.", show_default="scores.parquet"
        ),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", help="Shards as given to score, for thumbnails; repeatable. Texts alone without."),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="The page; replaced if it exists.")] = "report.html",
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default="the table's name")] = None,
    top: Annotated[int, typer.Option(help="Pictures in each gallery, and half as many groups; 0 for none.")] = 12,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Take files that were scored with different rubrics or models.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Write one HTML page: counts, histograms, what a threshold keeps, the best and the worst pictures.

    The page needs no network and loads nothing, so it can be mailed or kept. With --shards, thumbnails are inlined;
    of local shards only the pictures that are shown are read.

    \b
    Examples:
      zscore report
      zscore report scores.parquet --shards shards/ --out report.html
      zscore report scores/ --shards 's3://bucket/run-7/{00000..00099}.tar' --top 24 --title 'Run 7'
    """
    from zscore.cli.render import plain
    from zscore.report.job import ReportOptions, write_report
    from zscore.tables import open_scores

    options = ReportOptions(out=out, shards=tuple(shards or ()), sources=tuple(scores or ()), title=title, top=top)
    table = open_scores(*(scores or ["scores.parquet"]), allow_mixed=allow_mixed)
    summary = write_report(table, options)
    for fault in summary.faults[:SHOWN_FAULTS]:
        # Names of shards and members stand in it; none may steer the terminal.
        typer.echo(f"zscore: no picture: {plain(' '.join(fault.split()))}", err=True)
    if len(summary.faults) > SHOWN_FAULTS:
        typer.echo(f"zscore: and {len(summary.faults) - SHOWN_FAULTS} more; the page lists five", err=True)
    if not quiet:
        _say(summary, out)


def _say(summary: ReportSummary, out: str) -> None:
    from zscore.cli.render import say

    pictures = f", {summary.pictures} thumbnails" if summary.pictures else ""
    say(f"wrote {out}: {summary.rows:,} rows, {summary.scored:,} scored{pictures}, {summary.size / 1e6:.1f} MB")
    if not summary.scored:
        say("no row has a score: the page says why")
