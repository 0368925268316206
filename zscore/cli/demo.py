"""`zscore demo`: the main job on shards that it writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Argument(help="Where the shards and the scores go.")] = Path("demo-out"),
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "transformers",
) -> None:
    """Write a few shards of drawn pictures, score them with the demo student and show the table.

    \b
    Example:
      zscore demo demo-out
    """
    from rich.console import Console

    from zscore.cli.score import execute
    from zscore.demo.shards import write_demo_shards
    from zscore.demo.student import demo_student
    from zscore.judge import JudgeOptions
    from zscore.score import ScoreOptions

    shards = folder / "demo-shards"
    scores = folder / "demo-scores.parquet"
    paths = write_demo_shards(shards)
    console = Console()
    console.print(f"wrote {len(paths)} shards to {shards}", highlight=False, soft_wrap=True)
    options = ScoreOptions(inputs=tuple(map(str, paths)), out=str(scores), overwrite=True)
    execute(options, JudgeOptions(model=str(demo_student()), engine=engine))
    console.print(_table(scores))
    console.print(
        f"All rows, with a distribution per dimension: {scores.resolve()}\n"
        "The demo student is untrained: its scores only show the format. Score your own shards with a real one:\n"
        f"  zscore score SHARDS/ --model STUDENT --out scores.parquet",
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
