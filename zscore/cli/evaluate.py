"""`zscore eval`: scores against people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from zscore.cli.render import plain
from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore.agreement import Bootstrap, Estimate
    from zscore.evaluation import DimensionReport, Evaluation
    from zscore.human import Aggregation, Ratings
    from zscore.tables import Scores
    from zscore.votes import Gsb

# Metric → how the table calls it.
LABELS = {
    "plcc": "PLCC (Pearson)",
    "srcc": "SRCC (Spearman)",
    "krcc": "KRCC (Kendall tau-b)",
    "hpa": "HPA, tied scores wrong (eq. 17)",
    "hpa_half_ties": "HPA, tied scores count half",
    "hpa_with_human_ties": "HPA, human ties kept",
    "margin_hpa": "margin HPA, tied scores wrong",
    "margin_hpa_half_ties": "margin HPA, tied scores half",
    "nll": "NLL, nats",
    "rps": "RPS",
    "emd": "EMD, rubric points",
    "ece": "ECE",
    "coverage_50": "coverage of 50 % intervals",
    "coverage_80": "coverage of 80 % intervals",
    "coverage_90": "coverage of 90 % intervals",
}
FORMAT_HELP = "table (CSV, parquet), hpdv2, imagereward, pickapic, genai-bench, agiqa-3k, evalmuse or tifa160."
COLUMN_HELP = "ROLE=NAME of a table's column; roles: shard, index, key, group, dimension, rater, score."
BY_HELP = "Scores column whose equal values make a group; for votes, a prompt."
MAP_HELP = "THEIRS=OURS: compare the file's dimension THEIRS with the scores' dimension OURS."


def evaluate(
    scores: Annotated[
        str | None, typer.Argument(metavar="SCORES", help="A scores file, a folder of parts or an fsspec url.")
    ] = None,
    human: Annotated[
        str | None, typer.Argument(metavar="HUMAN", help="Ratings: long or wide table, or --format.")
    ] = None,
    layout: Annotated[str, typer.Option("--format", help=FORMAT_HELP)] = "table",
    column: Annotated[list[str] | None, typer.Option(help=COLUMN_HELP, metavar="ROLE=NAME")] = None,
    names: Annotated[list[str] | None, typer.Option("--map", help=MAP_HELP, metavar="THEIRS=OURS")] = None,
    aggregate: Annotated[
        str, typer.Option(help="Over raters: trimmed (drops highest and lowest) or mean.")
    ] = "trimmed",
    by: Annotated[str | None, typer.Option(help=BY_HELP, show_default="group")] = None,
    margin: Annotated[float, typer.Option(min=0, help="Margin HPA: human gaps above this.")] = 0.5,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out rated samples without a row.")
    ] = False,
    gsb: Annotated[
        str | None, typer.Option(metavar="VOTES", help="Good/same/bad votes (CSV, parquet), with or without SCORES.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=1, max=1_000_000, help="Draws of prompts for the intervals.")] = 1000,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare scores with human ratings: correlation, preference accuracy, distribution quality.

    Ratings are matched by shard (with or without .tar) and key, or by key alone; a column index must be that of the
    sample in its shard, and where there is a key too, both must fit. Intervals draw whole prompts, whatever the number
    of votes on one. The calibration error (ECE) has no interval: drawing prompts again adds to it.
    Distributions are compared on the raters' scale; half levels are split between the whole points beside them.

    \b
    Examples:
      zscore eval scores.parquet ratings.csv
      zscore eval scores.parquet ratings.csv --column key=item_id --column score=answer
      zscore eval scores.parquet test.json --format hpdv2
      zscore eval scores.parquet data.csv --format agiqa-3k --map quality=aesthetics --json
      zscore eval --gsb votes.csv

    \b
    A long table has a rating a row: key, score and perhaps shard, dimension, rater. A wide one has a column per
    dimension. Votes have a column `vote` (good, same, bad) or counts in columns good, same, bad, and perhaps prompt_id.
    """
    from zscore.agreement import Bootstrap

    draws = Bootstrap(replicates=bootstrap, level=level, seed=seed)
    if (scores is None) != (human is None) or (scores is None and gsb is None):
        raise UsageError("give SCORES and HUMAN, or --gsb VOTES, or all three")
    found: dict[str, Any] = {}
    if gsb is not None:
        from zscore.votes import gsb as count
        from zscore.votes import read_votes

        found["votes"] = count(read_votes(gsb), draws)
    if scores is not None and human is not None:
        from zscore.human import aggregation
        from zscore.tables import open_scores

        opened = open_scores(scores, allow_mixed=None)
        ratings = load_ratings(human, opened.metadata["rubric"]["dimensions"], layout, column, names)
        how = aggregation(aggregate)
        if ratings.frame.height:
            found["scores"] = compare(
                opened, ratings, how, bootstrap=draws, margin=margin, by=by, allow_missing=allow_missing
            )
        else:
            typer.echo(plain(f"{human} holds no ratings: nothing to compare"), err=as_json)
    _show(found, as_json=as_json)


def compare(
    scores: Scores,
    ratings: Ratings,
    how: Aggregation,
    *,
    bootstrap: Bootstrap,
    margin: float = 0.5,
    by: str | None = None,
    allow_missing: bool = False,
) -> Evaluation:
    """Ratings aggregated, matched to the scores and compared with them; shared with `zscore demo`."""
    from zscore.evaluation import evaluate as run
    from zscore.human import aggregate
    from zscore.matching import match

    dimensions = scores.metadata["rubric"]["dimensions"]
    per_sample = aggregate(ratings, how)
    matched = match(
        scores.frame, dimensions, ratings, per_sample, by=by, allow_missing=allow_missing, source=scores.name
    )
    return run(matched, scores.values, margin=margin, bootstrap=bootstrap)


def load_ratings(
    human: str, dimensions: Sequence[str], layout: str, column: list[str] | None, names: list[str] | None
) -> Ratings:
    """The ratings that the flags describe."""
    from zscore.human_formats import read_human

    columns, mapped = pairs(column, "--column"), pairs(names, "--map")
    return read_human(human, [*dimensions, "overall"], layout=layout, columns=columns, names=mapped)


def pairs(values: list[str] | None, option: str) -> dict[str, str]:
    """`A=B` arguments as a dict.

    Raises:
        UsageError: one without an equals sign, or an A given twice.
    """
    found: dict[str, str] = {}
    for value in values or []:
        left, equals, right = value.partition("=")
        if not (left and equals and right):
            raise UsageError(f"{option} '{value}': give A=B")
        if left in found:
            raise UsageError(f"{option} gives '{left}' twice")
        found[left] = right
    return found


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps({name: asdict(result) for name, result in found.items()}, indent=1, allow_nan=False))
        return
    lines = [*(_votes_lines(found["votes"]) if "votes" in found else [])]
    lines += _lines(found["scores"]) if "scores" in found else []
    if lines:
        typer.echo("\n".join(plain(line) for line in lines))


def _votes_lines(votes: Gsb) -> list[str]:
    counts = f"{votes.good:,} good, {votes.same:,} same, {votes.bad:,} bad on {votes.prompts:,} prompts"
    return [counts, f"GSB (eq. 21): {_cell(votes.gsb)}{_reason(votes.gsb)}"]


def _lines(result: Evaluation) -> list[str]:
    draws: Bootstrap = result.bootstrap
    left_out = f"not in the scores: {result.missing:,}, without a score: {result.unscored:,}"
    intervals = f"{draws.level:.0%} intervals from {draws.replicates:,} draws of prompts (seed {draws.seed})"
    lines = [
        f"{result.rated:,} rated samples, matched by {result.matched_by}; {left_out}",
        f"{intervals}; margin: human gap above {result.margin:g}",
        "",
        *table(_rows(result.dimensions)),
    ]
    notes = _notes(result)
    return [*lines, *([""] if notes else []), *notes]


def _notes(result: Evaluation) -> list[str]:
    """What the table doesn't say: on what the numbers rest, what was left out, and why a value is missing."""
    notes = [f"{report.dimension}: {report.note}" for report in result.dimensions if report.note]
    notes += [
        f"{report.dimension}: {report.left_out:,} samples left out, whose score or distribution isn't finite"
        for report in result.dimensions
        if report.left_out
    ]
    notes += [
        f"{report.dimension}: distributions on the scale {report.scale}"
        + (f"; {report.outside:,} ratings outside it" if report.outside else "")
        for report in result.dimensions
        if report.scale
    ]
    about: dict[str, list[str]] = {}
    for report in result.dimensions:
        for name, estimate in {**report.metrics, **report.distribution}.items():
            why = estimate.undefined
            if 0 < estimate.draws < result.bootstrap.replicates:
                why = f"the interval is from {estimate.draws:,} draws"
            if why:
                about.setdefault(f"{LABELS[name]}: {why}", []).append(report.dimension)
    notes += [f"{', '.join(names)}, {text}" for text, names in about.items()]
    notes += [f"not compared: {name} (no such dimension in the scores; --map {name}=…)" for name in result.not_compared]
    return notes


def _rows(reports: Sequence[DimensionReport]) -> list[list[str]]:
    rows = [["", *(report.dimension for report in reports)]]
    for label, field in (
        ("samples", "samples"),
        ("groups", "groups"),
        ("prompts", "prompts"),
        ("ratings used", "ratings"),
        ("pairs", "pairs"),
        ("pairs over the margin", "margin_pairs"),
        ("human ties", "human_ties"),
        ("tied scores among the pairs", "score_ties"),
    ):
        rows.append([label, *(f"{getattr(report, field):,}" for report in reports)])
    for name, label in LABELS.items():
        estimates = [{**report.metrics, **report.distribution}.get(name) for report in reports]
        if any(estimate is not None for estimate in estimates):
            rows.append([label, *(_cell(estimate) for estimate in estimates)])
    return rows


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "-"
    interval = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval}"


def _reason(estimate: Estimate) -> str:
    return f" ({estimate.undefined})" if estimate.undefined else ""


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
