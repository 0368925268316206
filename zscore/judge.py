"""What judges: a checkpoint, a rubric, a layout and an engine, put together and described.

`plan_judge` reads small files only and says what would run; `Judge.engine()` loads the model.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zscore.chat_frames import QWEN_TOKENS
from zscore.checkpoint import Checkpoint, has_weights, model_from_environment, read_checkpoint, weights_hash
from zscore.distribution import combine
from zscore.engines.generate import GenerateConfig, open_generator
from zscore.engines.vllm import SUPPORTED
from zscore.engines.vllm_classify import fallback_notice
from zscore.errors import ModelError, UsageError
from zscore.patches import PixelOptions
from zscore.reasoning import ReasoningOptions, finder, merge
from zscore.rubrics.rubric import LAYOUTS, Layout, Rubric, load_rubric
from zscore.templates import PromptBuilder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore.engines.base import Engine
    from zscore.records import Failure, LevelScores

ENGINES = ("auto", "vllm", "transformers")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
DTYPES = ("auto", "float32", "bfloat16")


NOT_READ = "not read"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """What the user may choose about the model; None means the checkpoint's or zscore's own choice."""

    model: str | None = None
    """Folder or hub id; else ZSCORE_MODEL, else the demo student."""
    rubric: str | None = None
    """Name of a shipped rubric or a TOML file; else the checkpoint's, else z-reward."""
    layout: str | None = None
    """joint, separate or reasoning; else the checkpoint's, else joint."""
    engine: str = "auto"
    """vllm, transformers, or auto: vLLM where it is installed."""
    dtype: str = "auto"
    """Of the weights: float32, bfloat16 or auto."""
    max_pixels: int | None = None
    """Image budget: larger pictures are scaled down to about this many pixels."""
    batch_size: int | None = None
    """Prompts at once; None lets the engine choose."""
    reasoning: ReasoningOptions = field(default_factory=ReasoningOptions)
    """How reasonings are drawn; of the reasoning layout."""
    gpu_memory_utilization: float | None = None
    """Share of the GPU's memory that vLLM takes; None leaves vLLM's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A resolved choice of model, rubric, layout and engine."""

    checkpoint: Checkpoint
    rubric: Rubric
    layout: Layout
    engine_name: str
    options: JudgeOptions
    pixels: PixelOptions
    weights: str
    """Their identity, or `NOT_READ`."""
    builder: PromptBuilder
    notices: tuple[str, ...]
    """What the user has to know before believing the scores, one line each."""

    def settings(self) -> dict[str, Any]:
        """Everything about the judge that a row depends on."""
        return {
            "model": self.weights,
            "rubric": f"{self.rubric.name} ({self.rubric.hash[:16]})",
            "layout": self.layout,
            "template": self.builder.hash,
            "engine": self.engine_name,
            "dtype": self.options.dtype,
            "batch_size": self.options.batch_size,
            "max_pixels": self.pixels.max_pixels,
            "min_pixels": self.pixels.min_pixels,
            **self._reasoning(),
        }

    def _reasoning(self) -> dict[str, Any]:
        return {"reasoning": asdict(self.options.reasoning)} if self.layout == "reasoning" else {}

    def combine(self, parts: Sequence[LevelScores | Failure]) -> LevelScores | Failure:
        """Scores of a sample from the results of all its prompts."""
        if self.layout == "reasoning":
            return merge(parts, len(self.rubric.dimensions), self.rubric.values)
        return combine(parts)

    def provenance(self) -> dict[str, Any]:
        """Metadata that every scores file carries."""
        rubric = self.rubric
        return {
            "rubric": {
                "name": rubric.name,
                "hash": rubric.hash,
                "source": rubric.source,
                "dimensions": list(rubric.names),
                "levels": [{"token": level.token, "value": level.value} for level in rubric.levels],
            },
            "layout": self.layout,
            "model": {"id": self.checkpoint.id, "weights": self.weights, "trained": self.checkpoint.trained},
            "max_pixels": self.pixels.max_pixels,
            "template": self.builder.hash,
            **self._reasoning(),
        }

    def engine(self) -> Engine:
        """Load the model.

        Raises:
            ModelError: it can't be loaded.
        """
        if self.layout == "reasoning":
            return self._reasoning_engine()
        levels: dict[str, Any] = {"level_token_ids": self.builder.level_ids, "level_values": self.rubric.values}
        options = self.options
        if self.engine_name == "transformers":
            from zscore.engines.transformers import TransformersConfig, TransformersEngine

            reference = TransformersConfig(dtype=options.dtype)
            if options.batch_size:
                reference = replace(reference, batch_size=options.batch_size)
            return TransformersEngine(self.checkpoint.path, config=reference, **levels)
        from zscore.engines.vllm import VllmConfig, open_vllm

        config = VllmConfig(dtype=options.dtype)
        if options.batch_size:
            config = replace(config, max_num_seqs=options.batch_size)
        if options.gpu_memory_utilization is not None:
            config = replace(config, gpu_memory_utilization=options.gpu_memory_utilization)
        return open_vllm(self.checkpoint.path, config=config, **levels)

    def _reasoning_engine(self) -> Engine:
        from zscore.engines.reasoning import ReasoningEngine

        options = self.options
        config = GenerateConfig(
            max_tokens=options.reasoning.max_tokens, temperature=options.reasoning.temperature, dtype=options.dtype
        )
        if options.batch_size:
            config = replace(config, batch_size=options.batch_size)
        if options.gpu_memory_utilization is not None:
            config = replace(config, gpu_memory_utilization=options.gpu_memory_utilization)
        generator = open_generator(self.engine_name, self.checkpoint.path, self.rubric, self.builder, config)
        found = finder(self.rubric, self.builder.decode, self.builder.level_ids)
        return ReasoningEngine(generator, found, self.rubric.values, options.reasoning)


def plan_judge(options: JudgeOptions, *, weights: bool = True) -> Judge:
    """Resolve the user's choices against the checkpoint.

    Args:
        options: the choices.
        weights: whether to fetch the weights; without, the judge may be good for showing only.

    Raises:
        UsageError, RubricError, ModelError: one line, with the value and the fix.
    """
    notices = []
    model = options.model or model_from_environment()
    if model is None:
        from zscore.demo.trained import demo_student

        model = str(demo_student())
        notices.append(
            "NO MODEL GIVEN: these scores come from the built-in demo student, which knows only the demo's pictures;"
            " they mean nothing for yours. Give --model FOLDER_OR_HUB_ID or set ZSCORE_MODEL."
        )
    checkpoint = read_checkpoint(model, weights=weights)
    rubric = load_rubric(options.rubric or checkpoint.rubric or "z-reward")
    engine = _engine(options, checkpoint, notices)
    layout = _layout(options.layout, checkpoint, classified=engine == "vllm" and checkpoint.architecture != SUPPORTED)
    if engine == "vllm" and checkpoint.architecture != SUPPORTED:
        notices.append(fallback_notice(checkpoint.architecture))
    if checkpoint.layout and layout != checkpoint.layout:
        notices.append(f"{model} was trained in the {checkpoint.layout} layout; you score in the {layout} one")
    if checkpoint.rubric_hash and rubric.hash != checkpoint.rubric_hash:
        notices.append(f"{model} was trained on another rubric ({checkpoint.rubric}) than '{rubric.name}' as it stands")
    if checkpoint.rubric is None:
        notices.append(f"{model} has no zscore.json: it wasn't trained to score, so its scores are zero-shot")
    if layout != "reasoning" and options.reasoning != ReasoningOptions():
        raise UsageError("--samples, --temperature, --max-output-tokens and --seed belong to --reasoning")
    builder = _builder(checkpoint, rubric, layout, engine, options.reasoning.samples)
    return Judge(
        checkpoint=checkpoint,
        rubric=rubric,
        layout=layout,
        engine_name=engine,
        options=options,
        pixels=_pixels(options, checkpoint),
        weights=weights_hash(checkpoint.path) if weights or has_weights(checkpoint.path) else NOT_READ,
        builder=builder,
        notices=tuple(notices),
    )


def _builder(checkpoint: Checkpoint, rubric: Rubric, layout: Layout, engine: str, samples: int) -> PromptBuilder:
    builder = PromptBuilder(
        checkpoint.path,
        rubric,
        layout,
        merge=checkpoint.merge,
        max_tokens=min(checkpoint.max_tokens, 16_384),
        samples=samples,
    )
    if not builder.places_pictures and (engine == "transformers" or checkpoint.architecture == SUPPORTED):
        raise ModelError(
            f"the tokenizer of {checkpoint.id} lacks one of {', '.join(QWEN_TOKENS)}: only --engine vllm"
            " prompts a model by its chat template, and no Qwen3.5"
        )
    return builder


def _layout(wanted: str | None, checkpoint: Checkpoint, *, classified: bool) -> Layout:
    chosen = wanted or checkpoint.layout or ("separate" if classified else "joint")
    if classified and chosen != "separate":
        raise UsageError(
            f"the {chosen} layout needs {SUPPORTED}, and {checkpoint.id} is a {checkpoint.architecture}:"
            " --layout separate"
        )
    for layout in LAYOUTS:
        if chosen == layout:
            return layout
    raise UsageError(f"--layout '{chosen}' isn't known: choose {' or '.join(LAYOUTS)}")


def _engine(options: JudgeOptions, checkpoint: Checkpoint, notices: list[str]) -> str:
    if options.engine not in ENGINES:
        raise UsageError(f"--engine '{options.engine}' isn't known: choose {', '.join(ENGINES)}")
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype '{options.dtype}' isn't known: choose {', '.join(DTYPES)}")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size}: at least 1")
    installed = importlib.util.find_spec("vllm") is not None
    if options.engine == "vllm" and not installed:
        raise UsageError(
            "--engine vllm: vLLM isn't installed: pip install 'zscore-reward[vllm]' (GPU), or see `zscore doctor`"
        )
    if options.engine != "auto":
        return options.engine
    if not installed:
        notices.append("vLLM isn't installed: scoring with the slower transformers engine (see `zscore doctor`)")
        return "transformers"
    if options.dtype == "float32" and not NVIDIA_DRIVER.exists():
        notices.append("vLLM's CPU kernels are bfloat16 only: scoring with the transformers engine for --dtype float32")
        return "transformers"
    layout = options.layout or checkpoint.layout
    if checkpoint.architecture != SUPPORTED and layout in {"joint", "reasoning"}:
        notices.append(f"vLLM can't score a {checkpoint.architecture} in the {layout} layout: taking transformers")
        return "transformers"
    return "vllm"


def _pixels(options: JudgeOptions, checkpoint: Checkpoint) -> PixelOptions:
    budget = options.max_pixels if options.max_pixels is not None else checkpoint.max_pixels
    edge = checkpoint.patch * checkpoint.merge
    if budget < edge * edge:
        raise UsageError(f"--max-pixels {budget}: at least {edge * edge}, one image token of {edge}x{edge} pixels")
    try:
        return PixelOptions(
            patch=checkpoint.patch,
            merge=checkpoint.merge,
            min_pixels=min(checkpoint.min_pixels, budget),
            max_pixels=budget,
        )
    except ValueError as error:
        raise ModelError(f"{checkpoint.id}: {error}") from error
