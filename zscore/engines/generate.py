"""The protocol of engines that write: prompts in, sampled tokens out, with what the model thought of them.

Scores with reasoning and the trainers' rollouts both come from here. An output ends behind its first score, at the
end-of-turn token, or at the limit. The same seed gives the same output, whatever else is in the batch.

Array legend: T tokens of an output, K levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from zscore.errors import ModelError
from zscore.reasoning import finder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from zscore.reasoning import ScoreFinder
    from zscore.records import EnginePrompt, Failure
    from zscore.rubrics.rubric import Rubric
    from zscore.templates import PromptBuilder


@dataclass(frozen=True, slots=True)
class Output:
    """What a model wrote."""

    tokens: tuple[int, ...]
    logprob_T: NDArray[np.float32]
    """Of each token, given those before it, at temperature 1."""
    level_logprob_TK: NDArray[np.float32]
    """Of the level tokens at each position, at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How outputs are drawn."""

    max_tokens: int = 1024
    temperature: float = 1.0
    """0 takes the likeliest token."""
    dtype: str = "auto"
    batch_size: int = 16
    """Outputs at once."""
    gpu_memory_utilization: float = 0.9
    """Of vLLM on a GPU."""


class Generator(Protocol):
    """Writes; see `zscore.engines.generate_transformers` (reference) and `zscore.engines.generate_vllm` (fast)."""

    name: str
    version: str
    dtype: str
    max_in_flight: int
    max_tokens: int
    """Longest prompt, in tokens."""

    def submit(self, tag: int, prompt: EnginePrompt, seed: int) -> None:
        """Queue one prompt under a caller's tag; `seed` makes its draws its own."""

    def step(self) -> list[tuple[int, Output | Failure]]:
        """Advance; return what finished, in any order (may be empty)."""

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Take over weights by their names in the checkpoint; those that ranks share are put together one at a time.

        Raises:
            ModelError: a name that the model doesn't have, or one of its own that is left out.
        """

    def close(self) -> None:
        """Free the model. Idempotent."""


def pads(config: Any) -> list[int]:
    """Tokens that stand for pictures, by a model's config: written in an answer they would be taken for one."""
    names = ("image_token_id", "video_token_id")
    return [int(found) for name in names if (found := getattr(config, name, None)) is not None]


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """A checkpoint's weights by name, from the headers of its files; a draft model's (mtp) are left out, as it is."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in list(tensors.keys())}
    return {name: shape for name, shape in shapes.items() if not name.startswith("mtp.")}


def check_weights(weights: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The weights, where they are exactly those of the checkpoint; a tied output projection may be given too.

    They stay in the order in which they were given: files may be listed in another order on another machine, and ranks
    have to put the same weight together at the same time.

    Raises:
        ModelError: one is missing, unknown or of another shape; names it.
    """
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - weights.keys())]
    wrong += [f"{name} is none of them" for name in sorted(weights.keys() - shapes.keys() - {"lm_head.weight"})]
    for name in sorted(shapes.keys() & weights.keys()):
        if tuple(weights[name].shape) != shapes[name]:
            wrong.append(f"{name} is {tuple(weights[name].shape)}, not {shapes[name]}")
    if wrong:
        raise ModelError(f"{len(wrong)} weights aren't those of the checkpoint: {wrong[0]}")
    return {name: weight for name, weight in weights.items() if name in shapes}


def whole(weight: Any) -> Any:
    """A weight that ranks have shares of (DTensor), put together: all of them must ask for it. Others as they are."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def open_generator(name: str, model: Path, rubric: Rubric, builder: PromptBuilder, config: GenerateConfig) -> Generator:
    """The generator `name` (vllm or transformers) for a checkpoint, its rubric and its tokenizer.

    Raises:
        ModelError: it can't be loaded.
    """
    stop = Stop(finder(rubric, builder.decode, builder.level_ids), builder.end_ids)
    if name == "vllm":
        from zscore.engines.generate_vllm import VllmGenerator

        texts = [level.token for level in rubric.levels]
        return VllmGenerator(model, level_token_ids=builder.level_ids, level_texts=texts, stop=stop, config=config)
    from zscore.engines.generate_transformers import TransformersGenerator

    return TransformersGenerator(model, level_token_ids=builder.level_ids, stop=stop, config=config)


@dataclass(frozen=True, slots=True)
class Stop:
    """When an output is at its end."""

    finder: ScoreFinder
    end_tokens: frozenset[int]
    """End of turn, end of text."""

    def __call__(self, output: list[int]) -> bool:
        """Whether nothing more is wanted behind these tokens."""
        return bool(output) and (output[-1] in self.end_tokens or self.finder.ends_here(output))
