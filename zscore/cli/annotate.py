"""`zscore annotations build`: raters' scores to labels and preference pairs."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from zscore.cli.evaluate import COLUMN_HELP, FORMAT_HELP, MAP_HELP, load_ratings, table
from zscore.cli.reading import GroupKey, ImageKeys, MaxImageBytes, MaxTextBytes, PromptKeys, read_options

if TYPE_CHECKING:
    from zscore_trainers.annotations import Annotations


def annotate(
    ratings: Annotated[
        str, typer.Argument(metavar="RATINGS", help="Ratings on the rubric's scale: table or --format.")
    ],
    shards: Annotated[list[str], typer.Argument(metavar="SHARDS...", help="Shards with the rated pictures.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for annotations.parquet and pairs.parquet.")],
    rubric: Annotated[str, typer.Option(help="z-reward, q-align, shapes or a TOML file.")] = "z-reward",
    layout: Annotated[str, typer.Option("--format", help=FORMAT_HELP)] = "table",
    column: Annotated[list[str] | None, typer.Option(help=COLUMN_HELP, metavar="ROLE=NAME")] = None,
    names: Annotated[list[str] | None, typer.Option("--map", help=MAP_HELP, metavar="THEIRS=OURS")] = None,
    aggregate: Annotated[
        str, typer.Option(help="Over raters: trimmed (drops highest and lowest) or mean.")
    ] = "trimmed",
    min_agreement: Annotated[
        float, typer.Option(help="Leave out raters whose Spearman's rho with the others is below this.")
    ] = 0.0,
    test_share: Annotated[float, typer.Option(help="Of the prompts, for evaluation.")] = 0.1,
    image_keys: ImageKeys = None,
    prompt_keys: PromptKeys = None,
    group_key: GroupKey = None,
    max_image_bytes: MaxImageBytes = None,
    max_text_bytes: MaxTextBytes = None,
) -> None:
    """Turn ratings into one score per picture and dimension, and same-prompt pairs, split by prompt.

    \b
    Example:
      zscore annotations build ratings.csv shards/ --out annotated/ --min-agreement 0.3
    """
    from zscore.human import aggregation
    from zscore.rubrics.rubric import load_rubric
    from zscore.shards import expand
    from zscore_trainers.annotations import BuildOptions, build, check_out, write

    chosen = load_rubric(rubric)
    options = BuildOptions(
        values=chosen.values,
        dimensions=chosen.names,
        min_agreement=min_agreement,
        aggregation=aggregation(aggregate),
        test_share=test_share,
        read=read_options(image_keys, prompt_keys, group_key, max_image_bytes, max_text_bytes),
    )
    check_out(out)
    made = build(load_ratings(ratings, chosen.names, layout, column, names), expand(shards), options)
    write(made, out)
    typer.echo("\n".join([*table(_raters(made)), "", *_counts(made), f"written to {out}"]))


def _raters(made: Annotations) -> list[list[str]]:
    rows = [["rater", "ratings", "agreement", ""]]
    for rater in made.raters:
        agreement = "too few shared" if rater.agreement is None else f"{rater.agreement:.3f}"
        rows.append([rater.name, f"{rater.ratings:,}", agreement, "" if rater.kept else "left out"])
    return rows


def _counts(made: Annotations) -> list[str]:
    splits = made.samples["split"].to_list()
    lines = [f"{len(splits):,} pictures ({splits.count('test'):,} for testing), {made.pairs.height:,} pairs"]
    if made.unmatched:
        lines.append(f"{made.unmatched:,} rated pictures aren't in the shards, or can't be read there")
    if made.unread:
        lines.append(f"{made.unread:,} samples of the shards can't be read, the first of them {made.first_unread}")
    return lines
