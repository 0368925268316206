"""`zscore train`: a student from people's labels or from a teacher's distributions."""

from __future__ import annotations

from functools import partial
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from zscore.cli.reading import GroupKey, ImageKeys, MaxImageBytes, MaxTextBytes, PromptKeys, read_options
from zscore.cli.render import plain
from zscore.errors import InterruptedRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from zscore_trainers.recipes import Recipe
    from zscore_trainers.train import TrainOptions


def train(
    algorithm: Annotated[
        str, typer.Argument(metavar="ALGORITHM", help="sft, risd, rewarddance, grpo, gdso or opd: see below.")
    ],
    shards: Annotated[list[str], typer.Argument(metavar="SHARDS...", help="Shards with the pictures.")],
    data: Annotated[str, typer.Option(help="What to learn from: see below.", metavar="TABLE")],
    model: Annotated[str, typer.Option(help="Checkpoint to start from: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    recipe: Annotated[
        str, typer.Option(help="All settings by one name: tiny, z-reward-9b, z-reward-27b.")
    ] = "z-reward-9b",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Checkpoint of opd's teacher.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what the run takes of 8, 16 and 32 GPUs' memory, and all settings; stop."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")] = False,
    without: Annotated[
        str | None,
        typer.Option(help="annotations.parquet whose test prompts are left out of --data, too.", metavar="TABLE"),
    ] = None,
    image_keys: ImageKeys = None,
    prompt_keys: PromptKeys = None,
    group_key: GroupKey = None,
    max_image_bytes: MaxImageBytes = None,
    max_text_bytes: MaxTextBytes = None,
) -> None:
    """Train a student that gives score distributions at once, or a teacher that reasons first.

    \b
      sft          annotations.parquet     students: labels of people
      risd         scores.parquet          students: a teacher's distributions (paper, algorithm 2)
      rewarddance  reasoning.jsonl         teachers: reasonings that are given
      grpo, gdso   annotations.parquet     teachers: their own reasonings, rewarded (gdso: algorithm 1)
      opd          any of the two tables   students that reason: the words of --teacher

    \b
    Examples:
      zscore annotations build ratings.csv shards/ --out annotated/
      zscore train sft shards/ --data annotated/annotations.parquet --model Qwen/Qwen3.5-9B --out run/
      zscore train risd shards/ --data teacher.parquet --model Qwen/Qwen3.5-9B --out run/ --set learning_rate=2e-5
      zscore score shards/ --model run/model --out scores.parquet

    \b
    A run that was interrupted goes on with --resume as if it hadn't been. Prompts are held out by their hash
    (held_out, 5 %) and evaluated on as the run goes: PLCC, and the share of same-prompt pairs in the right order.

    \b
    On several GPUs, each with a share of the weights and of the batch:
      torchrun --nproc-per-node 8 -m zscore train risd shards/ --data teacher.parquet --model ... --out run/
    """
    from zscore_trainers.recipes import load_recipe
    from zscore_trainers.train import TrainOptions, check

    chosen = load_recipe(recipe, changes or [], algorithm)
    options = TrainOptions(
        algorithm=algorithm,
        data=data,
        shards=tuple(shards),
        model=model,
        out=out,
        resume=resume,
        teacher=teacher,
        without=without,
        read=read_options(image_keys, prompt_keys, group_key, max_image_bytes, max_text_bytes),
    )
    if dry_run:
        check(options, chosen)
        typer.echo(_planned(chosen, recipe, model))
    else:
        _run(options, chosen, quiet=quiet)


def _run(options: TrainOptions, recipe: Recipe, *, quiet: bool) -> None:
    """Train, and say on the first process what came of it."""
    from rich.console import Console

    from zscore_trainers.parallel import rank
    from zscore_trainers.train import train

    console = Console(stderr=True)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    try:
        made = train(
            options,
            recipe,
            None if quiet else _shown(console, recipe.engine.steps),
            None if quiet else lambda *counts: say(_about(options.data, *counts)),
            lambda: say(f"no checkpoint in {options.out} yet: starting from the beginning"),
        )
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: the same command with --resume goes on from the last checkpoint in {options.out}, if any"
        ) from None
    if rank():
        return
    for name, value in made.metrics.items():
        typer.echo(f"{name:<20} {value:.3f}")
    for reason, count in made.left_out.items():
        typer.echo(plain(f"{count:,} samples of {options.data} {reason}"))
    typer.echo(f"{made.steps:,} steps on {made.samples:,} samples: {made.model}")


def _planned(chosen: Recipe, recipe: str, model: str) -> str:
    """Memory and settings."""
    from zscore_trainers.budget import plan
    from zscore_trainers.recipes import settings

    lines = (f"  {key}={_set(value)}" for key, value in settings(chosen).items())
    return "\n".join([plan(chosen, recipe, model), "", "settings (--set):", *lines])


def _set(value: object) -> str:
    """As --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _about(data: str, samples: int, held_out: int, left_out: Mapping[str, int]) -> str:
    lines = [f"{count:,} samples of {data} {reason}" for reason, count in left_out.items()]
    return "\n".join(
        [*map(plain, lines), f"training on {samples:,} samples, evaluating on {held_out:,} of other prompts"]
    )


def _shown(console: Console, steps: int) -> Callable[[int, Mapping[str, float]], None]:
    """Prints a line now and then: the first steps, then each hundredth of the run, and whatever was evaluated."""

    def show(step: int, found: Mapping[str, float]) -> None:
        evaluated = any(name.startswith(("plcc", "hpa")) for name in found)
        if step > 3 and step % max(1, steps // 100) and not evaluated:
            return
        words = [f"step {step:,}/{steps:,}"]
        words += [f"{name} {value:.4g}" for name, value in found.items() if name != "learning_rate"]
        console.print("  ".join(words), highlight=False, soft_wrap=True)

    return show
