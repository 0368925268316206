"""`zscore select`: the best of each group, preference pairs, and what choosing brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from zscore.group_statistics import GroupStatistics
    from zscore.selection import SelectSummary, SelectTargets


def select(
    scores: Annotated[
        list[str] | None,
        typer.Argument(
            help="Scored tables: files, folders of parts, globs, fsspec urls.", show_default="scores.parquet"
        ),
    ] = None,
    best: Annotated[int, typer.Option(help="Candidates to keep of each group; smaller groups are kept whole.")] = 1,
    by: Annotated[str, typer.Option(help="Column whose equal values make a group.")] = "group",
    score: Annotated[
        str, typer.Option(help="What is ranked: overall, a dimension, '0.5*alignment+0.5*realism', 'min(...)'.")
    ] = "overall",
    risk: Annotated[float, typer.Option(help="Rank by mean - risk * std instead of the mean.")] = 0.0,
    out: Annotated[str, typer.Option(help="The best rows; replaced if it exists.")] = "best.parquet",
    pairs: Annotated[str | None, typer.Option(help="Also write preference pairs for DPO training.")] = None,
    min_gap: Annotated[
        float | None, typer.Option(help="Least difference of scores in a pair.", show_default="0")
    ] = None,
    max_pairs: Annotated[
        int | None,
        typer.Option(min=0, help="Pairs per group, the widest gaps first; 0 takes all that differ.", show_default="1"),
    ] = None,
    stats: Annotated[str | None, typer.Option(help="Also write a row per group: candidates, best, mean, gain.")] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Take files that were scored with different rubrics or models.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the statistics and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Keep the best of N candidates per group, and say what choosing brings.

    A higher score wins; of equal scores (they are float32) the row that comes first in the input, which in a table of
    zscore score is the one with the smaller (shard, index). Rows without scores or with NaN take no part. The
    selected rows stay in the order of the input and get the columns select_score and select_rank.

    With --risk, every dimension counts with mean - risk * std. The std of overall is the mean of its dimensions':
    the largest that it can have.

    \b
    Examples:
      zscore select
      zscore select scores.parquet --best 2 --score 'min(alignment, realism)' --out best.parquet
      zscore select scores/ --risk 1.0 --stats groups.parquet
      zscore select --pairs pairs.parquet --min-gap 0.5 --max-pairs 4

    \b
    Pairs have the columns prompt, chosen and rejected that TRL's DPO trainers read, the latter two as SHARD/KEY; then
    shard, index, key, sha256 and score of both sides, the gap, and the probability that the chosen one is better
    under the model's two distributions (ties count half, dimensions are taken as independent). A row without a
    distribution of everything that --score reads is in no pair.
    """
    from zscore.pairs import PairOptions
    from zscore.selection import SelectOptions, SelectTargets
    from zscore.selection import select as run
    from zscore.tables import open_scores

    options = SelectOptions(
        best=best,
        by=by,
        score=score,
        risk=risk,
        pairs=PairOptions(min_gap=min_gap or 0.0, max_pairs=1 if max_pairs is None else max_pairs or None)
        if any(option is not None for option in (pairs, min_gap, max_pairs))
        else None,
    )
    targets = SelectTargets(best=out, pairs=pairs, statistics=stats)
    table = open_scores(*(scores or ["scores.parquet"]), allow_mixed=allow_mixed)
    summary = run(table, options, targets, dry_run=dry_run)
    if not quiet:
        _report(summary, targets, dry_run=dry_run)


def _report(summary: SelectSummary, targets: SelectTargets, *, dry_run: bool) -> None:
    from zscore.cli.render import say, share, show, table

    found = summary.statistics
    rows: list[tuple[str, object, str]] = [("selected", summary.selected, share(summary.selected, summary.rows))]
    rows += [(f"no part: {reason}", count, share(count, summary.rows)) for reason, count in summary.dropped.items()]
    show(table(f"{summary.rows} rows, {found.groups} groups", ("", "rows", "share"), rows))
    if found.groups:
        say(
            f"{found.smallest} to {found.largest} candidates a group, median {found.median:g};"
            f" best {found.best:.3f}, random {found.random:.3f}, gain {found.gain:.3f}"
        )
        show(_curve(found))
    else:
        say("nothing is selected: no row has a group and a score")
    if summary.pairs is not None:
        say(f"{summary.pairs} pairs" if summary.pairs else "no pairs: no group has scores that differ enough")
    if summary.unpaired:
        say(f"{summary.unpaired} rows are in no pair: they have a score and no distribution")
    files = [name for name in (targets.best, targets.pairs, targets.statistics) if name]
    say("dry run: nothing is written" if dry_run else f"wrote {', '.join(files)}")


def _curve(found: GroupStatistics) -> Table:
    from zscore.cli.render import table

    rows = [(point.n, point.groups, f"{point.best:.3f}", f"{point.best - point.random:+.3f}") for point in found.curve]
    return table("expected best of n", ("n", "groups with n", "best of n", "over a random pick"), rows, left=0)
