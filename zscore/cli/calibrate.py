"""`zscore calibrate`: distributions fitted to people's, and thresholds with a guarantee."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zscore.cli.evaluate import BY_HELP, COLUMN_HELP, FORMAT_HELP, MAP_HELP, load_ratings, table
from zscore.cli.render import plain

if TYPE_CHECKING:
    from zscore.calibration import Calibration


def calibrate(
    scores: Annotated[str, typer.Argument(metavar="SCORES", help="A scores file, a folder of parts or an fsspec url.")],
    human: Annotated[str, typer.Argument(metavar="HUMAN", help="Ratings on the rubric's scale: table or --format.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Path or fsspec url.")] = "calibration.json",
    layout: Annotated[str, typer.Option("--format", help=FORMAT_HELP)] = "table",
    column: Annotated[list[str] | None, typer.Option(help=COLUMN_HELP, metavar="ROLE=NAME")] = None,
    names: Annotated[list[str] | None, typer.Option("--map", help=MAP_HELP, metavar="THEIRS=OURS")] = None,
    aggregate: Annotated[
        str, typer.Option(help="Over raters: trimmed (drops highest and lowest) or mean.")
    ] = "trimmed",
    by: Annotated[str | None, typer.Option(help=BY_HELP, show_default="group")] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out rated samples without a row.")
    ] = False,
    fit_share: Annotated[
        float, typer.Option(help="Of the rated samples, to fit on; the rest backs the guarantee.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, which is by whole prompts.")] = 0,
) -> None:
    """Fit a temperature and a shift per dimension to human ratings, and keep what filter --confidence needs.

    \b
    Examples:
      zscore calibrate scores.parquet ratings.csv --out calibration.json
      zscore filter scores.parquet --calibration calibration.json --min 4.0 --confidence 0.9

    \b
    What --confidence 0.9 promises: if rated and scored pictures are exchangeable (drawn alike), the expected share of
    kept pictures whose human score is below the minimum is at most 10 %. It is an expectation over the draw of both:
    one run may have more. It is about all that this rule keeps: what another filter leaves of it may be worse. Pictures
    of one prompt are alike: rate many prompts rather than many pictures of few.

    \b
    Ratings outside the rubric's levels are refused. Those of a --format with a scale of its own (imagereward 1 to 7,
    agiqa-3k 0 to 5) are mapped to the rubric's, end to end, and so is what the minimum is compared with.
    """
    from zscore.calibration import write_calibration
    from zscore.fitting import calibrate_scores
    from zscore.human import aggregation
    from zscore.table_output import check_targets
    from zscore.tables import open_scores

    opened = open_scores(scores, allow_mixed=None)
    check_targets([*opened.files, human], {"--out": out})
    ratings = load_ratings(human, opened.metadata["rubric"]["dimensions"], layout, column, names)
    if not ratings.frame.height:
        typer.echo(plain(f"{human} holds no ratings: nothing to calibrate with, nothing written"))
        return
    made = calibrate_scores(
        opened,
        ratings,
        aggregation=aggregation(aggregate),
        by=by,
        allow_missing=allow_missing,
        fit_share=fit_share,
        seed=seed,
    )
    write_calibration(made, out)
    typer.echo("\n".join(plain(line) for line in [*table(_rows(made)), "", *_notes(made), f"written to {out}"]))


def _notes(made: Calibration) -> list[str]:
    """What the numbers rest on, where it isn't just the two files."""
    notes = [
        f"{name}: {count:,} rated samples left out, whose score or distribution isn't finite"
        for name, count in made.provenance["left_out"].items()
        if count
    ]
    scale, ends = made.provenance["sources"]["human_scale"], (made.values[0], made.values[-1])
    if scale is not None and tuple(scale) != ends:
        notes.append(f"ratings on {scale[0]:g} to {scale[1]:g}, mapped to {ends[0]:g} to {ends[1]:g}")
    return notes


def _rows(made: Calibration) -> list[list[str]]:
    rows = [["", "fitted on", "temperature", "shift", "NLL before", "after", "for the guarantee", ""]]
    for name in [*made.fits, *(name for name in made.references if name not in made.fits)]:
        fit, reference = made.fits.get(name), made.references.get(name)
        pairs = f"{len(reference.score):,}" if reference else "-"
        if fit is None:
            rows.append([name, "-", "-", "-", "-", "-", pairs, ""])
            continue
        before, after = ("-" if value is None else f"{value:.3f}" for value in (fit.nll_before, fit.nll_after))
        rows.append(
            [name, f"{fit.samples:,}", f"{fit.temperature:.3f}", f"{fit.shift:+.3f}", before, after, pairs, fit.note]
        )
    return rows
