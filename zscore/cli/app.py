"""The Typer application: which commands there are, and how they are described."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zscore.cli.annotate import annotate
from zscore.cli.calibrate import calibrate
from zscore.cli.demo import demo
from zscore.cli.doctor import doctor
from zscore.cli.evaluate import evaluate
from zscore.cli.filter import filter_scores
from zscore.cli.report import report
from zscore.cli.reshard import reshard
from zscore.cli.score import score
from zscore.cli.select import select
from zscore.cli.show import show
from zscore.cli.train import train

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS: dict[str, Callable[..., None]] = {
    "score": score,
    "filter": filter_scores,
    "select": select,
    "show": show,
    "eval": evaluate,
    "calibrate": calibrate,
    "reshard": reshard,
    "report": report,
    "train": train,
    "demo": demo,
    "doctor": doctor,
}

ANNOTATIONS = """Make what students and teachers learn from.

\b
Example:
  zscore annotations build ratings.csv shards/ --out annotated/
"""

GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "annotations": (ANNOTATIONS, {"build": annotate}),
}

CONTEXT = {"help_option_names": ["-h", "--help"]}


ABOUT = """Score text-to-image pictures as distributions over rubric levels, then decide from the scores.

\b
Examples:
  zscore demo
  zscore score shards/ --model ./student --out scores.parquet
  zscore filter scores.parquet --min 4.0 --out kept.parquet
  zscore select scores.parquet --best 1
"""


def build_app() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="zscore",
        help=ABOUT,
        no_args_is_help=True,
        rich_markup_mode=None,  # importing rich for help costs twice what typer itself does
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings=CONTEXT,
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
        ] = False,
    ) -> None:
        del version

    for name, command in COMMANDS.items():
        app.command(name, context_settings=CONTEXT)(command)
    for group, (about, commands) in GROUPS.items():
        part = typer.Typer(help=about, no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)
        for name, command in commands.items():
            part.command(name, context_settings=CONTEXT)(command)
        app.add_typer(part, name=group)
    return app


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"zscore {version('zscore-reward')}")
        raise typer.Exit
