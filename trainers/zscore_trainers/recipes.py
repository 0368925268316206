"""Full settings by name, and single settings changed by `key=value`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from zscore.errors import UsageError
from zscore.rubrics.rubric import LAYOUTS
from zscore_trainers.algorithms import ALGORITHMS, chosen
from zscore_trainers.checks import check_least, check_one_of, check_positive, check_share
from zscore_trainers.engine import EngineConfig
from zscore_trainers.lora import MODULES
from zscore_trainers.risd import RisdConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zscore.rubrics.rubric import Layout
    from zscore_trainers.algorithms import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on besides its data."""

    rubric: str
    layout: Layout
    max_pixels: int
    min_pixels: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the arithmetic; the weights and moments of what is trained are float32 between steps."""
    gradient_checkpointing: bool = False
    seed: int = 0
    held_out: float = 0.05
    """Share of the prompts that is only evaluated on."""
    lora_rank: int = 0
    """Of adapters that are trained instead of all weights (`zscore_trainers.lora`); 0 trains all."""
    lora_alpha: float = 32.0
    """Adapters count alpha / rank times."""
    lora_modules: tuple[str, ...] = MODULES
    """Linear layers that get one, by the last part of their names."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(steps=1000))
    algorithm: AlgorithmConfig = field(default_factory=RisdConfig)
    rollouts: Literal["transformers", "vllm"] = "transformers"
    """What writes the policy's outputs, for algorithms that learn from them."""

    def __post_init__(self) -> None:
        """Refuse what can't be meant.

        Raises:
            UsageError: names the setting.
        """
        check_one_of("layout", self.layout, LAYOUTS)
        check_one_of("dtype", self.dtype, ("float32", "bfloat16"))
        check_one_of("rollouts", self.rollouts, ("transformers", "vllm"))
        check_least(self, 1, "max_pixels", "min_pixels")
        check_least(self, 0, "seed", "lora_rank")
        check_positive(self, "lora_alpha")
        check_share(self, "held_out")


def tiny() -> Recipe:
    """The demo student's: a body of 1.2 M parameters on 96x96 pictures, on a CPU."""
    return Recipe(
        rubric="shapes",
        layout="joint",
        max_pixels=96 * 96,
        min_pixels=96 * 96,
        dtype="float32",
        engine=EngineConfig(steps=2000, learning_rate=2e-3, warmup=100, evaluate_every=250),
        algorithm=RisdConfig(batch_size=64, micro_batch=64),
    )


def z_reward_9b() -> Recipe:
    """A Qwen3.5-9B student on eight GPUs: all weights, bfloat16 arithmetic, 1,024 image tokens."""
    return Recipe(
        rubric="z-reward",
        layout="joint",
        max_pixels=1024 * 1024,
        min_pixels=256 * 256,
        gradient_checkpointing=True,
        engine=EngineConfig(steps=5000, learning_rate=1e-5, warmup=100, evaluate_every=250, save_every=500),
        algorithm=RisdConfig(batch_size=128, micro_batch=4),
    )


def z_reward_27b() -> Recipe:
    """A Qwen3.5-27B on eight GPUs or more; as the 9B, in smaller micro-batches. The paper names no learning rate."""
    nine = z_reward_9b()
    return dataclasses.replace(nine, algorithm=dataclasses.replace(nine.algorithm, micro_batch=2))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "z-reward-9b": z_reward_9b,
    "z-reward-27b": z_reward_27b,
}


KINDS = {bool: "true or false", int: "a whole number like 20", float: "a number like 0.5 or 2e-5"}


def for_algorithm(recipe: Recipe, algorithm: str) -> Recipe:
    """The recipe with the settings and the layout of another algorithm; batches as the algorithm has them by itself.

    A small picture is cheap to write about: outputs of the tiny recipe are short, its micro-batches large.
    """
    choice = ALGORITHMS[algorithm]
    if isinstance(recipe.algorithm, choice.config):
        return recipe
    own = choice.config()
    changes: dict[str, Any] = {"micro_batch": max(own.micro_batch if recipe.rubric == "shapes" else 2, 2)}
    if recipe.rubric == "shapes" and "max_tokens" in settings_of(own):
        changes |= {"max_tokens": 80, "micro_batch": 64}
    return dataclasses.replace(
        recipe,
        layout="reasoning" if choice.reasons else recipe.layout,
        algorithm=dataclasses.replace(own, **changes),
    )


def settings_of(config: Any) -> set[str]:
    """Names of a part's settings."""
    return {each.name for each in dataclasses.fields(config)}


def load_recipe(name: str, changes: Sequence[str] = (), algorithm: str = "risd") -> Recipe:
    """A recipe with changes like `steps=500` or `layout=separate`.

    Raises:
        UsageError: no such recipe or setting (names the nearest), or a value of another kind.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe is called '{name}': {_near(name, RECIPES)}")
    chosen(algorithm)
    recipe = for_algorithm(RECIPES[name](), algorithm)
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise UsageError(f"--set '{change}': write KEY=VALUE, like steps=500")
        recipe = _changed(recipe, key.strip(), value.strip())
    return recipe


def settings(recipe: Recipe) -> dict[str, Any]:
    """All settings by name; no name stands in two parts of a recipe."""
    parts = (recipe, recipe.engine, recipe.algorithm)
    return {
        each.name: getattr(part, each.name)
        for part in parts
        for each in dataclasses.fields(part)
        if each.name not in {"engine", "algorithm"}
    }


def _changed(recipe: Recipe, key: str, text: str) -> Recipe:
    known = settings(recipe)
    if key not in known:
        raise UsageError(f"--set {key}: no such setting: {_near(key, known)}")
    value = _parsed(key, text, known[key])
    for name in ("engine", "algorithm"):
        part = getattr(recipe, name)
        if any(each.name == key for each in dataclasses.fields(part)):
            return dataclasses.replace(recipe, **{name: dataclasses.replace(part, **{key: value})})
    return dataclasses.replace(recipe, **{key: value})


def _parsed(key: str, text: str, example: Any) -> Any:
    """The text as a value of the same kind as the example."""
    try:
        if isinstance(example, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(example, tuple):
            return tuple(type(example[0])(part.strip()) for part in text.split(","))
        return type(example)(text)
    except (KeyError, ValueError) as error:
        wanted = KINDS.get(type(example)) or "values like " + ",".join(map(str, example))
        raise UsageError(f"--set {key}={text}: {wanted} is wanted") from error


def _near(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
