"""`zscore score`: shards in, a table of level distributions out."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from zscore.cli.reading import GroupKey, ImageKeys, MaxImageBytes, MaxTextBytes, PromptKeys, read_options
from zscore.errors import InterruptedRunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from zscore.judge import Judge, JudgeOptions
    from zscore.progress import Reporter
    from zscore.reasoning import ReasoningOptions
    from zscore.records import ShardRef
    from zscore.score import ScoreOptions, Summary

TOO_MANY_FAILED = 3


def score(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS...", help="Folders, globs, braces, .tar/.tar.gz/.tgz files or fsspec urls."),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="A .parquet file, a folder DIR/ (a part a shard), or an fsspec url.")
    ] = "scores.parquet",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id.", envvar="ZSCORE_MODEL", show_default="demo student"),
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers; auto takes vLLM where installed.")] = "auto",
    rubric: Annotated[
        str | None, typer.Option(help="z-reward, q-align, shapes or a TOML file.", show_default="the checkpoint's")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="joint (one prefill reads all dimensions), separate or reasoning.", show_default="the checkpoint's"
        ),
    ] = None,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="Let the model reason, then read its scores: --layout reasoning.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(help="Reasonings a dimension; their distributions are averaged.", show_default="1")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the reasoning's words.", show_default="1")] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Longest reasoning, its score included.", show_default="1024")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the reasonings.", show_default="0")] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Image budget; larger pictures are scaled down.", show_default="the checkpoint's")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Prompts at once.", show_default="the engine's")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of GPU memory for vLLM.")] = None,
    image_keys: ImageKeys = None,
    prompt_keys: PromptKeys = None,
    group_key: GroupKey = None,
    max_image_bytes: MaxImageBytes = None,
    max_text_bytes: MaxTextBytes = None,
    workers: Annotated[
        int | None, typer.Option(help="Decode processes; 0: in this one.", show_default="one a core, at most 8")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N samples.")] = None,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 3 when a larger share of rows failed.")
    ] = 0.05,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run; load and write nothing.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Score again only the rows of a finished output that aren't ok.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, no summary; warnings and errors only.")
    ] = False,
) -> None:
    """Score every picture in webdataset shards: a distribution over rubric levels per dimension.

    Every sample becomes a row, failed ones with their reason. Finished shards are kept: the same command resumes.

    \b
    Examples:
      zscore score shards/ --out scores.parquet
      zscore score 's3://bucket/run-7/{00000..00099}.tar' --model ./student --out s3://bucket/run-7.parquet
      zscore score shards/ --out scores.parquet --retry-failed
      zscore score shards/ --model ./teacher --reasoning --samples 4 --out teacher.parquet
      zscore score shards/ --dry-run

    \b
    Exit codes: 0 done, 1 fatal, 2 usage, 3 done but too many rows failed, 130 interrupted.
    """
    from zscore.judge import JudgeOptions
    from zscore.score import ScoreOptions

    options = ScoreOptions(
        inputs=tuple(inputs),
        out=out,
        read=read_options(image_keys, prompt_keys, group_key, max_image_bytes, max_text_bytes),
        workers=_checked_workers(workers),
        limit=limit,
        retry_failed=retry_failed,
        overwrite=overwrite,
    )
    judge_options = JudgeOptions(
        model=model,
        rubric=rubric,
        layout=_chosen_layout(layout, reasoning=reasoning),
        reasoning=_reasoning_options(samples, temperature, max_output_tokens, seed),
        engine=engine,
        dtype=dtype,
        max_pixels=max_pixels,
        batch_size=batch_size,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    execute(options, judge_options, max_failed=max_failed, quiet=quiet, dry_run=dry_run)


def _chosen_layout(layout: str | None, *, reasoning: bool) -> str | None:
    if reasoning and layout not in {None, "reasoning"}:
        raise UsageError(f"--reasoning is a layout of its own: leave --layout {layout} out")
    return "reasoning" if reasoning else layout


def _reasoning_options(
    samples: int | None, temperature: float | None, max_tokens: int | None, seed: int | None
) -> ReasoningOptions:
    from zscore.reasoning import ReasoningOptions

    given = {"samples": samples, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    return ReasoningOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def execute(
    options: ScoreOptions,
    judge_options: JudgeOptions,
    *,
    max_failed: float = 0.05,
    quiet: bool = False,
    dry_run: bool = False,
) -> None:
    """Plan, warn, run and report; shared with `zscore demo`."""
    from zscore.judge import plan_judge
    from zscore.shards import expand

    shards = expand(options.inputs)  # a typo there is told before a model is fetched
    judge = plan_judge(judge_options, weights=not dry_run)
    console = _console()
    for notice in judge.notices:
        console.print(f"warning: {notice}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        _show_plan(options, judge, shards)
        return
    summary = _run(options, judge, shards, console, quiet=quiet)
    _finish(summary, max_failed, quiet=quiet)


def _console() -> Console:
    """Messages go to stderr, so that stdout holds results only."""
    from rich.console import Console

    return Console(stderr=True)


def _checked_workers(workers: int | None) -> int | None:
    if workers is not None and not 0 <= workers <= 256:
        raise UsageError(f"--workers {workers}: 0 (decode in the main process) to 256")
    return workers


def _run(options: ScoreOptions, judge: Judge, shards: Sequence[ShardRef], console: Console, *, quiet: bool) -> Summary:
    from zscore.progress import LiveReporter, PlainReporter, QuietReporter
    from zscore.score import score as run

    with contextlib.ExitStack() as stack:
        reporter: Reporter
        if quiet:
            reporter = QuietReporter()
        elif console.is_terminal:
            reporter = stack.enter_context(LiveReporter(console))
        else:
            reporter = PlainReporter(console)
        try:
            return run(options, judge, reporter, shards)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted: finished shards are kept beside {options.out}; the same command resumes"
            ) from None


def _finish(summary: Summary, max_failed: float, *, quiet: bool) -> None:
    from rich.console import Console

    from zscore.progress import summary_table

    if not quiet:
        out = Console()
        if summary.already_done:
            out.print(f"{summary.out} is complete: nothing to do", markup=False, highlight=False, soft_wrap=True)
        out.print(f"{summary.rows} rows in {summary.out}", markup=False, highlight=False, soft_wrap=True)
        out.print(summary_table(summary))
        if summary.scored:
            speed = summary.scored / summary.seconds
            out.print(f"{summary.scored} rows in {summary.seconds:.1f} s, model loading included ({speed:.1f}/s)")
    if summary.failed_share > max_failed:
        message = (
            f"{summary.failed_share:.1%} of the rows failed, over --max-failed {max_failed:.1%};"
            f" the output is written: see its 'status' and 'error' columns, or run again with --retry-failed"
        )
        typer.echo(f"zscore: {message}", err=True)
        raise typer.Exit(TOO_MANY_FAILED)


def _show_plan(options: ScoreOptions, judge: Judge, shards: Sequence[ShardRef]) -> None:
    from rich.console import Console
    from rich.table import Table

    from zscore.samples import count_samples
    from zscore.score import outlook

    samples = sum(count_samples(shard, options.read) for shard in shards)
    table = Table(title="dry run: nothing is loaded or written", title_justify="left", show_header=False)
    known = [shard.size for shard in shards if shard.size >= 0]
    rows = {
        "shards": f"{len(shards)} ({sum(known) / 1e6:.1f} MB), {shards[0].name} … {shards[-1].name}",
        "samples": f"{samples}" + (f", of which the first {options.limit}" if options.limit else ""),
        "model": f"{judge.checkpoint.id} ({judge.checkpoint.architecture}; {judge.checkpoint.trained})",
        "engine": f"{judge.engine_name}, dtype {judge.options.dtype}",
        "rubric": f"{judge.rubric.name}: {', '.join(judge.rubric.names)}; {len(judge.rubric.levels)} levels",
        "layout": judge.layout,
        "image budget": f"{judge.pixels.max_pixels} pixels, {judge.pixels.max_pixels // judge.pixels.factor**2} tokens",
        "prompt tokens": f"{judge.builder.overhead} besides picture and prompt",
        "output": f"{options.out}: {outlook(options, judge, shards)}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, markup=False)
