"""`zscore filter`: keep the rows that meet every criterion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zscore.calibration import Calibration
    from zscore.filters import FilterSummary, FilterTargets


def filter_scores(
    scores: Annotated[
        list[str] | None,
        typer.Argument(
            help="Scored tables: files, folders of parts, globs, fsspec urls.", show_default="scores.parquet"
        ),
    ] = None,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", help="Least score: 4.0 for overall, realism=3.5 for a dimension.")
    ] = None,
    maximum: Annotated[list[str] | None, typer.Option("--max", help="Largest score, written as for --min.")] = None,
    prob: Annotated[
        list[str] | None,
        typer.Option(help="Least probability that a score is in a range: 'alignment>=4:0.8' asks for P(>= 4) >= 0.8."),
    ] = None,
    max_std: Annotated[
        list[str] | None,
        typer.Option(help="Largest std of the distribution: 0.8 for all dimensions, realism=0.8 for one."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="SQL condition on the columns: 'width >= 512 AND height >= 512'.")
    ] = None,
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Of pictures with the same bytes keep the first that meets the above.")
    ] = False,
    fraction: Annotated[
        float | None, typer.Option(help="Best share of what meets all the above: 0.3. Ties go by (shard, index).")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="What --fraction ranks by: overall, a dimension, 'min(alignment, realism)'.", show_default="overall"
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Decide by calibrated scores: a file made by zscore calibrate.")
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="With --calibration and one --min: keep so much that the expected share that truly reaches --min is at"
            " least this: 0.9."
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="Kept rows; replaced if it exists.")] = "kept.parquet",
    columns: Annotated[
        str | None, typer.Option(help="Columns of --out, separated by commas.", show_default="all")
    ] = None,
    dropped: Annotated[str | None, typer.Option(help="Also write the dropped rows, with a column 'reason'.")] = None,
    npy: Annotated[
        str | None, typer.Option(help="Also write the kept uids as DataComp's tools read them: sorted uint64 pairs.")
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Take files that were scored with different rubrics or models.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the counts and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Keep the rows that meet every criterion, and say why the others were dropped.

    Rows without scores are dropped with their status, NaN with nonfinite_score. Bounds are compared in the table's
    own float32. The order of the rows is that of the input, and files appear whole or not at all.

    \b
    Examples:
      zscore filter --min 4.0
      zscore filter scores.parquet --min 3.5 --min realism=4 --max-std 1.0 --out kept.parquet
      zscore filter scores/ --prob 'alignment>=4:0.8' --dedupe --fraction 0.3 --dropped dropped.parquet
      zscore filter --where "width >= 512 AND prompt LIKE '%cat%'" --dry-run
      zscore filter --calibration calibration.json --min 4.0 --confidence 0.9

    \b
    The uids of --npy are the table's column 'uid', or the first 32 digits of the pictures' sha256.

    \b
    What --confidence 0.9 promises: if rated and scored pictures are exchangeable (drawn alike), the expected share of
    kept pictures whose human score is below --min is at most 10 %, over the draw of both; an empty set counts as 0,
    and one run may have more. That is a promise about everything that the rule keeps: a part of it may hold all the
    bad ones. So --confidence takes one --min and no other criterion, and a table that wasn't filtered before; what a
    second filter makes of the kept file carries no promise.
    """
    from zscore.criteria import FilterOptions
    from zscore.expressions import parse_bounds, parse_probability
    from zscore.filters import FilterTargets
    from zscore.filters import filter_scores as run
    from zscore.tables import open_scores

    options = FilterOptions(
        minimum=parse_bounds(minimum or [], "--min"),
        maximum=parse_bounds(maximum or [], "--max"),
        max_std=parse_bounds(max_std or [], "--max-std"),
        prob=tuple(parse_probability(text) for text in prob or []),
        where=where,
        dedupe=dedupe,
        fraction=fraction,
        score=score,
        calibration=_calibration(calibration),
        confidence=confidence,
    )
    wanted = tuple(name.strip() for name in columns.split(",")) if columns is not None else None
    targets = FilterTargets(kept=out, dropped=dropped, npy=npy, columns=wanted)
    table = open_scores(*(scores or ["scores.parquet"]), allow_mixed=allow_mixed)
    summary = run(table, options, targets, dry_run=dry_run)
    if not quiet:
        _report(summary, targets, dry_run=dry_run)


def _calibration(path: str | None) -> Calibration | None:
    if path is None:
        return None
    from zscore.calibration import read_calibration

    return read_calibration(path)


def _report(summary: FilterSummary, targets: FilterTargets, *, dry_run: bool) -> None:
    from zscore.cli.render import say, share, show, table

    rows = [("kept", summary.kept, share(summary.kept, summary.rows))]
    rows += [(f"dropped: {reason}", count, share(count, summary.rows)) for reason, count in summary.dropped.items()]
    show(table(f"{summary.rows} rows", ("", "rows", "share"), rows))
    if not summary.kept:
        say(f"nothing is kept{': ' + summary.hint if summary.hint else ''}")
    files = [name for name in (targets.kept, targets.dropped, targets.npy) if name]
    say("dry run: nothing is written" if dry_run else f"wrote {', '.join(files)}")
