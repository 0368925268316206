"""One training run: data, model, algorithm and engine, put together from a recipe.

OUT/pictures.bin      the pictures, copied once
OUT/log.jsonl         a line a step
OUT/checkpoints/      the last state, to go on from
OUT/model/            the result, for `zscore score --model OUT/model`

Under torchrun every process calls `train` with the same arguments; see `zscore_trainers.parallel`.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zscore.checkpoint import read_checkpoint, weights_hash
from zscore.errors import ModelError, UsageError
from zscore.patches import PixelOptions
from zscore.rubrics.rubric import load_rubric
from zscore.samples import ReadOptions
from zscore.shards import expand
from zscore.templates import PromptBuilder
from zscore_trainers import parallel, scalars
from zscore_trainers.algorithms import Choice, Setup, chosen
from zscore_trainers.data import Collator, TrainSet
from zscore_trainers.engine import Engine, deciding
from zscore_trainers.export import export
from zscore_trainers.held_out import HeldOut, HeldOutReasoning, HeldOutTold, is_held_out
from zscore_trainers.lora import add_adapters
from zscore_trainers.pictures import PictureFile, collect
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.recipes import for_algorithm
from zscore_trainers.run_files import RunLock
from zscore_trainers.targets import read_targets, test_prompts
from zscore_trainers.told import ToldTable, read_told

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from zscore.checkpoint import Checkpoint
    from zscore.records import Failure, Sample
    from zscore.rubrics.rubric import Rubric
    from zscore_trainers.engine import Algorithm
    from zscore_trainers.pictures import Place
    from zscore_trainers.recipes import Recipe
    from zscore_trainers.targets import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What to train on what."""

    algorithm: str
    data: str
    """What the algorithm learns from (`zscore_trainers.algorithms`)."""
    shards: tuple[str, ...]
    model: str
    """Checkpoint to start from: folder or hub id."""
    out: Path
    resume: bool = False
    teacher: str | None = None
    """Checkpoint of opd's teacher."""
    without: str | None = None
    """Table of annotations whose test prompts are left out, too."""
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run made."""

    model: Path
    steps: int
    samples: int
    held_out: int
    left_out: Mapping[str, int]
    """Samples of the table that aren't learned from, or not whole: how many, by what is wrong with them."""
    metrics: Mapping[str, float]
    """Agreement on the held-out prompts at the end."""


def train(
    options: TrainOptions,
    recipe: Recipe,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    on_ready: Callable[[int, int, Mapping[str, int]], None] | None = None,
    on_restart: Callable[[], None] | None = None,
) -> Trained:
    """Train to the end and export.

    Args:
        options: what to train on what.
        recipe: all settings.
        on_step: called with the number of steps done and what was logged.
        on_ready: called with the numbers of samples to train on, held out and left out, when the data is there.
        on_restart: called where a run is to be resumed that has no checkpoint yet, before it begins anew.

    Raises:
        UsageError, TableError, ModelError: an argument, the data or the checkpoint can't be used; one line each.
        HedgingError: training figures improve while held-out agreement falls.
    """
    choice = chosen(options.algorithm)
    if not isinstance(recipe.algorithm, choice.config):
        recipe = for_algorithm(recipe, options.algorithm)
    checkpoint = read_checkpoint(options.model)
    rubric = load_rubric(recipe.rubric)
    check(options, recipe)
    if parallel.rank() == 0:
        scalars.log_in(recipe.engine.wandb)
    targets = _targets(options, choice, rubric)
    builder = PromptBuilder(
        checkpoint.path,
        rubric,
        recipe.layout,
        merge=checkpoint.merge,
        max_tokens=min(checkpoint.max_tokens, 16_384) - getattr(recipe.algorithm, "max_tokens", 0),
    )
    fits = partial(builder.unfit, picture=recipe.max_pixels // (checkpoint.patch * checkpoint.merge) ** 2)
    with parallel.started(getattr(torch, recipe.dtype)) as device, closing(RunLock(options.out)) as lock:
        _check_ranks(choice, recipe)
        data = parallel.from_first(lambda: _read_data(options, recipe, targets, fits, lock))
        if on_ready is not None and parallel.rank() == 0:
            on_ready(len(data.train.samples), len(data.held_out.samples) if data.held_out else 0, data.left_out)
        torch.manual_seed(recipe.seed)
        policy = _policy(checkpoint, builder, recipe, device)
        with closing(PictureFile(options.out / "pictures.bin")) as pictures, ExitStack() as stack:
            collators = _collators(data, pictures, checkpoint, builder, recipe)
            settings = _settings(options, recipe, rubric, collators, targets)
            load = partial(_other_policy, checkpoint, builder, recipe, device)
            algorithm = choice.make(_setup(options, recipe, collators[0], targets, load))
            stack.callback(_release, algorithm)  # last of all: vLLM takes every process group with it
            evaluate = _held_out(collators, targets, recipe, algorithm)
            engine = Engine(policy, algorithm, recipe.engine, options.out, settings)
            if options.resume and not engine.resume() and on_restart is not None and parallel.rank() == 0:
                on_restart()
            engine.run(on_step, evaluate)
            metrics = _final(policy, evaluate)
            said = f"{options.algorithm} on {len(data.train.samples):,} samples for {engine.step:,} steps"
            model = export(policy, checkpoint.path, options.out / "model", recipe, trained=said)
    held_out = len(data.held_out.samples) if data.held_out else 0
    return Trained(model, engine.step, len(data.train.samples), held_out, data.left_out, metrics)


def _setup(
    options: TrainOptions,
    recipe: Recipe,
    collator: Collator,
    targets: Targets | ToldTable,
    load: Callable[[str | None], ScorePolicy],
) -> Setup:
    return Setup(
        config=recipe.algorithm,
        collator=collator,
        rubric=load_rubric(recipe.rubric),
        data=targets,
        model=read_checkpoint(options.model).path,
        load=load,
        teacher=options.teacher,
        generator=recipe.rollouts,
        dtype=recipe.dtype,
        seed=recipe.seed,
        rank=parallel.rank(),
        ranks=parallel.ranks(),
    )


@dataclass(frozen=True, slots=True)
class _Data:
    """What the shards and the table give together."""

    train: TrainSet
    held_out: TrainSet | None
    left_out: Mapping[str, int]
    """Samples of the table that are in neither, or not whole, by what is wrong with them."""


def _targets(options: TrainOptions, choice: Choice, rubric: Rubric) -> Targets | ToldTable:
    """What --data holds, which has to be what the algorithm learns from."""
    if choice.data == "told":
        return read_told(options.data, rubric)
    return read_targets(options.data, rubric, kind=choice.data)


def check(options: TrainOptions, recipe: Recipe) -> None:
    """Refuse what can be told from the arguments alone.

    Raises:
        UsageError: a layout that the algorithm has no loss for; opd without a teacher; figures that can't be shown.
        ModelError: a teacher that can't be read.
    """
    choice = chosen(options.algorithm)
    if choice.reasons != (recipe.layout == "reasoning"):
        wanted = "reasoning" if choice.reasons else "joint or layout=separate"
        raise UsageError(f"layout is {recipe.layout}, which {options.algorithm} can't learn: --set layout={wanted}")
    if options.algorithm == "opd" and options.teacher is None:
        raise UsageError("opd: --teacher names the checkpoint that says how likely it finds the student's words")
    if options.teacher is not None:
        read_checkpoint(options.teacher)
    if parallel.rank() == 0:  # which shows the figures
        scalars.require(tensorboard=recipe.engine.tensorboard, project=recipe.engine.wandb)


def _check_ranks(choice: Choice, recipe: Recipe) -> None:
    """Refuse what several processes can't do, before anything is read."""
    if parallel.ranks() > 1 and choice.writes and recipe.rollouts == "vllm":
        # Its engine runs in this process, and would take the ranks' group for its own tensor parallelism.
        raise UsageError("vLLM can't write rollouts under torchrun: --set rollouts=transformers, or one process")
    if recipe.algorithm.batch_size % parallel.ranks():
        raise UsageError(
            f"batch_size is {recipe.algorithm.batch_size}, which {parallel.ranks()} processes can't share evenly: set a"
            " multiple of their number"
        )


def _prepare_folder(options: TrainOptions, lock: RunLock) -> None:
    lock.take()
    there = options.out / "log.jsonl"
    if there.exists() and there.stat().st_size and not options.resume:
        raise UsageError(f"{options.out} holds a run already: give --resume to go on with it, or another --out")


def _read_data(
    options: TrainOptions,
    recipe: Recipe,
    targets: Targets | ToldTable,
    fits: Callable[[str], Failure | None],
    lock: RunLock,
) -> _Data:
    """Copy the pictures, and share the samples out between training and evaluation."""
    _prepare_folder(options, lock)
    tested = test_prompts(options.without) if options.without is not None else set()
    found = collect(expand(options.shards), options.out / "pictures.bin", targets.__contains__, options.read)
    targets.check(sample for sample, _ in found)
    here = len(found)
    found = [(sample, place) for sample, place in found if sample.prompt not in tested]
    found = [(_fitting(sample, fits), place) for sample, place in found]
    good = [(sample, place) for sample, place in found if sample.failure is None]
    bad = [f"'{sample.key}' of {sample.shard}: {sample.failure.error}" for sample, _ in found if sample.failure]
    if bad and not good:
        raise UsageError(f"none of the {len(bad):,} samples of {options.data} in the shards can be read; {bad[0]}")
    if not good and here:
        raise UsageError(f"all {here:,} samples have test prompts of {options.without}: give other shards")
    if not good:
        raise UsageError(f"none of the {len(targets):,} samples of {options.data} is in the shards: are they the same?")
    held = [pair for pair in good if is_held_out(pair[0].prompt, recipe.held_out)]
    rest = [pair for pair in good if not is_held_out(pair[0].prompt, recipe.held_out)]
    if not rest:
        raise UsageError(f"all {len(good)} samples are held out: lower held_out (now {recipe.held_out})")
    why = {
        "aren't in the shards": len(targets) - here,
        f"can't be used, the first of them {bad[0] if bad else ''}": len(bad),
    }
    left_out = targets.left_out | {what: count for what, count in why.items() if count}
    if tested:
        left_out[f"have a test prompt of {options.without}"] = here - len(found)
    return _Data(_train_set(rest, targets), _train_set(held, targets) if held else None, left_out)


def _fitting(sample: Sample, fits: Callable[[str], Failure | None]) -> Sample:
    """With its failure, where its prompt can't be trained on: found here, and not at the step that draws it."""
    failure = sample.failure or fits(sample.prompt)
    return sample if failure is None else replace(sample, failure=failure)


def _train_set(pairs: Sequence[tuple[Sample, Place]], targets: Targets | ToldTable) -> TrainSet:
    samples = [sample for sample, _ in pairs]
    return TrainSet(samples, [place for _, place in pairs], np.stack([targets.target(sample) for sample in samples]))


def _collators(
    data: _Data, pictures: PictureFile, checkpoint: Checkpoint, builder: PromptBuilder, recipe: Recipe
) -> list[Collator]:
    """Of what is trained on and, where there is something held out, of that."""
    pixels = PixelOptions(
        patch=checkpoint.patch, merge=checkpoint.merge, min_pixels=recipe.min_pixels, max_pixels=recipe.max_pixels
    )
    return [
        Collator.of(one, pictures, checkpoint, builder, pixels, dtype=getattr(torch, recipe.dtype))
        for one in (data.train, data.held_out)
        if one is not None
    ]


def _held_out(
    collators: Sequence[Collator], targets: Targets | ToldTable, recipe: Recipe, algorithm: Algorithm
) -> Callable[[ScorePolicy], Mapping[str, float]] | None:
    """What evaluates on the held-out prompts; a policy that reasons needs given reasonings for it, or rollouts."""
    if len(collators) == 1:
        return None
    rubric, size = load_rubric(recipe.rubric), recipe.algorithm.micro_batch
    direct = HeldOut(collators[1], rubric.names, rubric.values, size)
    if isinstance(targets, ToldTable):
        return HeldOutTold(direct, collators[1], targets.outputs(collators[1]), size)
    sampling = getattr(algorithm, "sampling", None)
    return direct if sampling is None else HeldOutReasoning(direct, sampling.rollouts)


def _policy(checkpoint: Checkpoint, builder: PromptBuilder, recipe: Recipe, device: torch.device) -> ScorePolicy:
    """The checkpoint's weights on this process's device: all of them, or this rank's share.

    Every rank reads the checkpoint as it is stored, so a machine's memory has to hold it once a rank for a while.
    """
    import transformers

    from zscore._torchvision import ensure_importable

    ensure_importable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint.path,
            dtype="auto" if parallel.is_started() else getattr(torch, recipe.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # safetensors, tokenizers and hub errors share no base
        raise ModelError(
            f"transformers can't load {checkpoint.id}: {next(iter(str(error).splitlines()), '')}"
        ) from error
    if recipe.lora_rank:
        add_adapters(model, recipe.lora_rank, recipe.lora_alpha, recipe.lora_modules)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = ScorePolicy(model, builder.level_ids)
    if not parallel.is_started():
        return policy.to(device)
    parallel.share_out(policy, getattr(torch, recipe.dtype), device)
    return policy


def _other_policy(
    checkpoint: Checkpoint, builder: PromptBuilder, recipe: Recipe, device: torch.device, name: str | None
) -> ScorePolicy:
    """Of another checkpoint, or of the same once more."""
    return _policy(checkpoint if name is None else read_checkpoint(name), builder, recipe, device)


def _release(algorithm: Algorithm) -> None:
    """Free what wrote the rollouts."""
    sampling = getattr(algorithm, "sampling", None)
    if sampling is not None:
        sampling.rollouts.close()


def _settings(
    options: TrainOptions, recipe: Recipe, rubric: Rubric, collators: Sequence[Collator], targets: Targets | ToldTable
) -> Mapping[str, Any]:
    """All that a checkpoint must share with the run that goes on from it.

    Of models that is what `zscore.checkpoint.weights_hash` covers: every byte of the weights, of large ones the sizes
    and evenly spaced samples.
    """
    return {
        "algorithm": options.algorithm,
        "recipe": {**asdict(recipe), "engine": deciding(recipe.engine)},
        "rubric_hash": rubric.hash,
        "model": weights_hash(read_checkpoint(options.model).path),
        "teacher": None if options.teacher is None else weights_hash(read_checkpoint(options.teacher).path),
        **_data_hashes(collators, targets),
    }


def _data_hashes(collators: Sequence[Collator], targets: Targets | ToldTable) -> dict[str, str]:
    """Of targets and whose they are, prompts with groups, pictures as copied, and the tokens of given reasonings.

    And how many samples there are, which says more to people.
    """
    sets = [one.train for one in collators]
    samples = [sample for one in sets for sample in one.samples]
    whose = [repr((one.shard, one.index)).encode() for one in samples]
    parts = {
        "data": [*(one.targets_NDK.tobytes() for one in sets), *whose],
        "prompts": [repr((one.prompt, one.group)).encode() for one in samples],
        "pictures": [place.sha256.encode() for one in sets for place in one.places],
    }
    if isinstance(targets, ToldTable):
        told = [one for collate in collators for one in targets.outputs(collate)]
        parts["reasonings"] = [repr((one.sample, one.dimension, one.written.tokens)).encode() for one in told]
    hashes = {name: hashlib.sha256(b"\n".join(some)).hexdigest()[:16] for name, some in parts.items()}
    return {**hashes, "samples": str(len(samples))}


def _final(policy: ScorePolicy, evaluate: Callable[[ScorePolicy], Mapping[str, float]] | None) -> Mapping[str, float]:
    if evaluate is None:
        return {}
    policy.eval()
    return evaluate(policy)
