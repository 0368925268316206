"""`zscore calibrate`: distributions fitted to people's, and thresholds with a guarantee."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zscore.cli.evaluate import COLUMN_HELP, FORMAT_HELP, MAP_HELP, load_ratings, table

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
    by: Annotated[
        str | None, typer.Option(help="Scores column whose equal values make a group.", show_default="group")
    ] = None,
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
    """
    from zscore.calibration import calibrate_scores, write_calibration
    from zscore.human import aggregation
    from zscore.tables import open_scores

    opened = open_scores(scores)
    ratings = load_ratings(human, opened.metadata["rubric"]["dimensions"], layout, column, names)
    if not ratings.frame.height:
        typer.echo(f"{human} holds no ratings: nothing to calibrate with, nothing written")
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
    typer.echo("\n".join([*table(_rows(made)), "", f"written to {out}"]))


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
