"""`zscore show`: a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from zscore.overview import Overview
    from zscore.tables import Scores

BAR = 40


def show(
    scores: Annotated[
        list[str] | None,
        typer.Argument(
            help="Scored tables: files, folders of parts, globs, fsspec urls.", show_default="scores.parquet"
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="First rows to list.")] = 10,
    row: Annotated[
        int | None, typer.Option(help="Row to show in full, from 0; -1 is the last.", show_default="first scored")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Row to show in full: KEY or SHARD/KEY; the first of several.")
    ] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Take files that were scored with different rubrics or models.")
    ] = False,
) -> None:
    """Show what a scored table holds: a summary, its first rows, and one row with its distributions.

    \b
    Examples:
      zscore show
      zscore show kept.parquet --rows 20
      zscore show scores/ --key 000123.tar/0042
      zscore show s3://bucket/scores.parquet --rows 0 --row 17
    """
    from zscore.cli.render import say
    from zscore.cli.render import show as put
    from zscore.errors import UsageError
    from zscore.overview import head, one_row, overview, rows_with_key
    from zscore.tables import open_scores

    if key is not None and row is not None:
        raise UsageError("--key and --row both name the row to show in full: give one of them")
    opened = open_scores(*(scores or ["scores.parquet"]), allow_mixed=allow_mixed)
    named = rows_with_key(opened, key) if key is not None else []  # first: a wrong --key needs no summary
    found = one_row(opened, number=named[0] if named else row)
    summary = overview(opened)
    put(*_summary(opened, summary))
    if not summary.rows:
        say(f"{opened.name} has no rows")
        return
    if rows:
        put(_head(head(opened, rows).to_dicts()))
    if found is not None:
        put(_row(opened, found))
    if len(named) > 1:
        say(f"{len(named) - 1:,} more rows are called '{key}', the next is --row {named[1]}")


def _summary(scores: Scores, summary: Overview) -> Iterator[Table]:
    from zscore.cli.render import share, table

    yield table(scores.name, ("", ""), _provenance(scores, summary), left=2)
    if summary.statuses:
        counts = [(status, count, share(count, summary.rows)) for status, count in summary.statuses.items()]
        yield table("status", ("", "rows", "share"), counts)
    if summary.spreads:
        names = ("mean", "std", "min", "25 %", "median", "75 %", "max")
        fields = ("mean", "std", "smallest", "quarter", "median", "three_quarters", "largest")
        spreads = [(one.name, *(f"{getattr(one, field):.3f}" for field in fields)) for one in summary.spreads]
        yield table("scores", ("", *names), spreads)


def _provenance(scores: Scores, summary: Overview) -> Iterator[tuple[str, object]]:
    counts = {"rows": summary.rows, "groups": summary.groups, "different pictures": summary.pictures}
    counts |= {"files": len(scores.files) if len(scores.files) > 1 else None}
    counts |= {f"{name} missing, NaN or infinite": count for name, count in summary.nonfinite.items()}
    yield from ((name, count) for name, count in counts.items() if count is not None)
    metadata = scores.metadata
    rubric = metadata["rubric"]
    yield "rubric", f"{rubric.get('name')} ({', '.join(rubric['dimensions'])})"
    if scores.values:
        yield "levels", f"{len(scores.values)} from {scores.values[0]:g} to {scores.values[-1]:g}"
    fields = [
        field for name in ("model", "engine", "layout", "max_pixels", "version") for field in (name, f"mixed_{name}")
    ]
    yield from ((field.replace("_", " "), _short(metadata[field])) for field in fields if field in metadata)
    if "created" in metadata:
        yield "scored", f"{metadata['created']} to {metadata.get('finished', '?')}"
    for step in metadata.get("derived", []):
        yield f"then {step.get('command')}", _short(step.get("criteria"))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return "; ".join(_short(entry) for entry in value)
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def _head(rows: list[dict[str, Any]]) -> Table:
    from zscore.cli.render import listing

    names = [(name, any(isinstance(row[name], str) for row in rows)) for name in rows[0]]
    lines = [[_cell(row[name]) for name, _ in names] for row in rows]
    return listing(f"the first {len(rows)} rows", names, lines)


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _row(scores: Scores, row: dict[str, Any]) -> Table:
    from zscore.cli.render import table

    lines: list[tuple[str, object]] = []
    distributions = {f"{name}_probs" for name in scores.dimensions}
    for name, value in row.items():
        if name in distributions and value is not None and len(value) == len(scores.values):
            lines += [(name if k == 0 else "", _bar(scores.values[k], p)) for k, p in enumerate(value)]
        elif isinstance(value, float):
            lines.append((name, f"{value:.4f}"))
        else:
            lines.append((name, "–" if value is None else value))
    return table("one row in full", ("column", "value"), lines, left=2)


def _bar(level: float, probability: float | None) -> str:
    if probability is None:
        return f"{level:5.2f} {'–':>6}"
    filled = round(probability * BAR) if 0 <= probability <= 1 else 0
    return f"{level:5.2f} {probability:6.1%} {'█' * filled}"
