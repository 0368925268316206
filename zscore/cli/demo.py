"""`zscore demo`: the main job on shards that it draws itself, compared with what is true of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zscore.evaluation import Evaluation

SHARDS = 4
SEED = 1
"""Of the drawings; their prompts are of the split that no training sees."""


def demo(
    folder: Annotated[Path, typer.Argument(help="Where the shards and the scores go.")] = Path("demo-out"),
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "transformers",
    prompts: Annotated[int, typer.Option(min=SHARDS, max=100_000, help="To draw four pictures for.")] = 240,
) -> None:
    """Draw shards of shapes, score them with the demo student and compare the scores with the truth.

    \b
    Examples:
      zscore demo demo-out
      zscore demo demo-out --prompts 64 --engine vllm
    """
    from rich.console import Console

    from zscore.cli.score import execute
    from zscore.demo.trained import demo_student
    from zscore.judge import JudgeOptions
    from zscore.score import ScoreOptions
    from zscore_trainers.world.shards import WorldOptions, write_world

    shards, scores = folder / "demo-shards", folder / "demo-scores.parquet"
    console = Console()
    drawn = WorldOptions(split="test", prompts=prompts, per_shard=-(-prompts // SHARDS), seed=SEED)
    paths = write_world(shards, drawn)
    console.print(f"drew {len(paths)} shards of {prompts} prompts into {shards}", highlight=False, soft_wrap=True)
    options = ScoreOptions(inputs=tuple(map(str, paths)), out=str(scores), overwrite=True)
    execute(options, JudgeOptions(model=str(demo_student()), engine=engine))
    console.print(_table(scores))
    console.print(_agreement(_compared(scores, shards / "truth.csv")))
    console.print(
        f"All rows, with a distribution per dimension: {scores.resolve()}\n"
        f"All of the comparison: zscore eval {scores} {shards / 'truth.csv'}\n"
        "The demo student knows drawn shapes only. Score your own shards with a real one:\n"
        "  zscore score SHARDS/ --model STUDENT --out scores.parquet",
        highlight=False,
        soft_wrap=True,
    )


def _table(scores: Path) -> object:
    """A few rows, readable at 80 columns."""
    import polars as pl
    from rich.table import Table

    frame = pl.read_parquet(scores)
    dimensions = [name.removesuffix("_probs") for name in frame.columns if name.endswith("_probs")]
    table = Table(title=f"{frame.height} rows; the first of each shard", title_justify="left", box=None)
    table.add_column("key", no_wrap=True)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=22)
    for column in ("overall", *dimensions):
        table.add_column(column, justify="right", no_wrap=True)
    heads = frame.group_by("shard", maintain_order=True).head(2)
    for row in heads.iter_rows(named=True):
        table.add_row(row["key"], row["prompt"], *(f"{row[name]:.2f}" for name in ("overall", *dimensions)))
    return table


def _compared(scores: Path, truth: Path) -> Evaluation:
    """As `zscore eval` compares them."""
    from zscore.agreement import Bootstrap
    from zscore.cli.evaluate import compare, load_ratings
    from zscore.tables import open_scores

    opened = open_scores(str(scores))
    ratings = load_ratings(str(truth), opened.metadata["rubric"]["dimensions"], "table", None, None)
    return compare(opened, ratings, "mean", bootstrap=Bootstrap())


def _agreement(found: Evaluation) -> object:
    """PLCC, SRCC and HPA, with their intervals."""
    from rich.table import Table

    table = Table(title="Agreement with the truth, on unseen prompts", title_justify="left", box=None)
    for column in ("", "PLCC", "SRCC", "HPA", "95 % interval", "pairs"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for report in found.dimensions:
        cells = [f"{report.metrics[name].value:.3f}" for name in ("plcc", "srcc", "hpa")]
        hpa = report.metrics["hpa"]
        table.add_row(report.dimension, *cells, f"{hpa.low:.3f} - {hpa.high:.3f}", f"{report.pairs:,}")
    return table
