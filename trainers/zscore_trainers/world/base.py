"""The world's base model: a tiny vision-language model that has learned to see, to speak and to score.

What Qwen3.5 is to a real teacher and student, this is to those of the world: the checkpoint that every algorithm starts
from. Scenes are drawn as the run goes, none twice. The vision tower learns to see first (`sight`); then the model says
what it sees, and compares it with what was asked for of some other picture; then a half of each batch is asked for
scores at once (joint layout), the other for a reasoning and a score. Which scenes a step sees follows from the seed and
the step alone, so a run goes on exactly (`zscore_trainers.engine`).

    python -m zscore_trainers.world.base OUT [--steps 3000] [--until 500] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from zscore._torchvision import ensure_importable
from zscore.checkpoint import read_checkpoint
from zscore.demo.student import build_student
from zscore.patches import PixelOptions
from zscore.rubrics.rubric import load_rubric
from zscore.templates import PromptBuilder
from zscore_trainers.data import Padding
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.export import export
from zscore_trainers.losses import mass_loss
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.recipes import load_recipe
from zscore_trainers.sequences import Written, collate, given
from zscore_trainers.world.raters import spread
from zscore_trainers.world.render import EDGE
from zscore_trainers.world.scenes import reasoning, unrelated
from zscore_trainers.world.shards import prompt_of, train_scenes
from zscore_trainers.world.sight import cut, filters, patches, teach

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from zscore.records import EnginePrompt, Pixels
    from zscore.rubrics.rubric import Layout, Rubric
    from zscore_trainers.world.scenes import Scene

LAYERS = ["linear_attention", *3 * ["full_attention"]]
"""A layer that reads words with their neighbours, and three that look things up in the picture."""
LAYOUTS: tuple[Layout, Layout] = ("joint", "reasoning")
TEXT: dict[str, Any] = {"num_hidden_layers": len(LAYERS), "layer_types": LAYERS, "tie_word_embeddings": True}

CALM = (
    ("language_model", ("o_proj.weight", "out_proj.weight", "down_proj.weight"), 0.03),
    ("visual.blocks", ("attn.proj.weight", "linear_fc2.weight"), 0.3),
    ("visual.merger", ("linear_fc2.weight",), 0.05),
)
"""What is made smaller before training, and by how much: all that writes to the residual streams.

At full strength, what random layers write drowns the words that say which dimension is asked for.
"""
PLACE_GAIN = 5.0
"""How much stronger the vision tower's place embeddings are made: words for places are looked up by them."""
TOWER = "model.visual."
EMBEDDING = f"{TOWER}patch_embed.proj"
FILTER_SCENES = 64
"""Scenes whose patches the filters are made for."""
SIGHT_STEPS = 200
SAVE_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """How it learns."""

    batch_size: int = 32
    """Pictures a step."""
    micro_batch: int = 32
    """Here always the batch."""
    unrelated_steps: int = 250
    """First steps, all of them under prompts of other scenes, which say what is seen and compare, and give no score."""
    told: float = 0.5
    """Share that is reasoned about; the rest is scored at once."""
    alignment: float = 0.6
    """Share of the reasonings that are about alignment, which says most of what is seen."""
    unrelated: float = 0.2
    """Share of those that are asked with another scene's prompt, as in the first steps.

    Where what is asked for is nearly what is seen, each can be read off the other: a caption teaches to repeat the
    prompt, a comparison to repeat the caption.
    """
    mass: float = 0.05
    """Weight of the mass on the level tokens."""


class Base:
    """Gradients of both halves; see `zscore_trainers.engine.Algorithm`.

    Args:
        config: how.
        rubric: of the world.
        folder: of the checkpoint, for its tokenizer and its picture processor.
        seed: of the scenes.
    """

    def __init__(self, config: BaseConfig, rubric: Rubric, folder: Path, seed: int = 0) -> None:
        checkpoint = read_checkpoint(str(folder))
        self._config = config
        self._rubric = rubric
        self._pad = Padding.of(checkpoint)
        self._pixels = pixel_options(folder)
        self._direct, self._told = (
            PromptBuilder(folder, rubric, layout, merge=checkpoint.merge, max_tokens=checkpoint.max_tokens)
            for layout in LAYOUTS
        )
        self._seed = seed

    @property
    def level_ids(self) -> tuple[int, ...]:
        """The K level tokens."""
        return self._direct.level_ids

    def backward(self, policy: ScorePolicy, step: int) -> Mapping[str, float]:
        """Add the gradients of one batch of new scenes."""
        rng = random.Random(f"base {self._seed} {step}")  # noqa: S311 - drawings, not secrets
        scenes = train_scenes(self._config.batch_size, rng)
        pixels = cut(scenes, self._pixels)
        if step < self._config.unrelated_steps:
            words = self._say(policy, [self._unrelated(*pair, rng) for pair in zip(scenes, pixels, strict=True)])
            return {"loss": words, "words": words}
        first = round(self._config.told * len(scenes))
        drawn = zip(scenes[:first], pixels[:first], strict=True)
        told = self._say(policy, [self._reasoning(*pair, rng) for pair in drawn])
        divergence, mass = self._score(policy, scenes[first:], pixels[first:])
        return {"loss": told + divergence, "words": told, "divergence": divergence, "mass": mass}

    def _say(self, policy: ScorePolicy, told: Sequence[tuple[EnginePrompt, Written]]) -> float:
        """Cross-entropy of the outputs' tokens."""
        batch = collate(self._pad, told)
        device = next(policy.parameters()).device
        found = policy(batch.policy.to(device))
        output_BT = batch.output_BT.to(device)
        loss = -(found.logprob_BT * output_BT).sum() / output_BT.sum()
        loss.backward()
        return float(loss.detach())

    def _unrelated(self, scene: Scene, pixels: Pixels, rng: random.Random) -> tuple[EnginePrompt, Written]:
        """What is seen, and how it compares with the prompt of another scene; no score."""
        asked = prompt_of("train", rng)
        prompt = _built(self._told, replace(scene, asked=asked), pixels)[self._rubric.names.index("alignment")]
        return prompt, Written(tuple(self._told.encode(unrelated(scene, asked))), None)

    def _reasoning(self, scene: Scene, pixels: Pixels, rng: random.Random) -> tuple[EnginePrompt, Written]:
        """A judge's words on some dimension, and a score as raters would give it; at times neither (`_unrelated`)."""
        names, share = self._rubric.names, self._config.alignment
        weights = [share if name == "alignment" else (1 - share) / (len(names) - 1) for name in names]
        (at,) = rng.choices(range(len(names)), weights)
        if names[at] == "alignment" and rng.random() < self._config.unrelated:
            return self._unrelated(scene, pixels, rng)
        levels_K = ratings(scene.truth[names[at]], self._rubric)
        (level,) = rng.choices(range(len(levels_K)), levels_K.tolist())
        written = given(self._told, self._rubric, reasoning(scene, names[at]), level)
        return _built(self._told, scene, pixels)[at], written

    def _score(self, policy: ScorePolicy, scenes: Sequence[Scene], pixels: Sequence[Pixels]) -> tuple[float, float]:
        """KL from the distribution of ratings to the policy's (eq. 15), and the mass on the levels."""
        prompts = [_built(self._direct, *pair)[0] for pair in zip(scenes, pixels, strict=True)]
        wanted = [[ratings(scene.truth[name], self._rubric) for name in self._rubric.names] for scene in scenes]
        device = next(policy.parameters()).device
        found = policy(
            self._pad(prompts).to(device),
            with_logprobs=False,
            teacher_BDK=torch.tensor(np.array(wanted), dtype=torch.float32, device=device),
            with_mass=True,
        )
        assert found.divergence is not None
        assert found.log_mass_BD is not None
        loss = found.divergence + self._config.mass * mass_loss(found.log_mass_BD)
        loss.backward()
        return float(found.divergence.detach()), float(found.log_mass_BD.detach().exp().mean())


def prepare(folder: Path, seed: int = 0) -> Path:
    """Make the weights of an untrained student ready to be trained: with good filters, and calm; returns the folder."""
    tensors = load_file(folder / "model.safetensors")
    rng = random.Random(f"filters {seed}")  # noqa: S311 - drawings, not secrets
    seen = cut(train_scenes(FILTER_SCENES, rng), pixel_options(folder))
    filters(tensors[f"{EMBEDDING}.weight"], tensors[f"{EMBEDDING}.bias"], patches(seen), seed)
    tensors["model.visual.pos_embed.weight"].mul_(PLACE_GAIN)
    for name, tensor in tensors.items():
        for part, ends, gain in CALM:
            if part in name and name.endswith(ends):
                tensor.mul_(gain)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def see(folder: Path, seed: int = 0, log: Callable[[str], None] = print) -> Path:
    """Teach the vision tower of a checkpoint to see (`zscore_trainers.world.sight`); returns the folder."""
    model = load(folder)
    teach(model.model.visual, pixel_options(folder), steps=SIGHT_STEPS, seed=seed, log=log)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in model.model.visual.state_dict(prefix=TOWER).items():
        tensors[name] = tensor.to(tensors[name].dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pixel_options(folder: Path) -> PixelOptions:
    """How a checkpoint wants the world's pictures."""
    made = read_checkpoint(str(folder))
    return PixelOptions(patch=made.patch, merge=made.merge, min_pixels=EDGE**2, max_pixels=EDGE**2)


def load(folder: Path) -> Any:
    """The model of a checkpoint, float32."""
    ensure_importable()
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def ratings(truth: float, rubric: Rubric) -> NDArray[np.float64]:
    """Levels as raters spread around the truth, by a normal law cut off at the ends; none leans, unlike `rate`'s."""
    values_K = np.asarray(rubric.values)
    weights_K = np.exp(-((values_K - truth) ** 2) / (2 * spread(truth) ** 2))
    return np.asarray(weights_K / weights_K.sum())


def _built(builder: PromptBuilder, scene: Scene, pixels: Pixels) -> list[EnginePrompt]:
    prompts = builder.build(scene.prompt, pixels)
    assert isinstance(prompts, list), prompts
    return prompts


def make_base(
    out: Path, *, steps: int, until: int | None = None, seed: int = 0, log: Callable[[str], None] = print
) -> Path:
    """Make the base model in a folder, or go on with one that was begun.

    Args:
        out: folder of the run.
        steps: of the whole run; the learning rate falls until then.
        until: an earlier step to stop after, for a model that knows less.
        seed: of the weights and the scenes.
        log: told how it goes.

    Returns:
        The checkpoint's folder.
    """
    recipe = load_recipe("tiny")
    start = out / "start"
    if not start.exists():
        draft = out / "start.draft"
        shutil.rmtree(draft, ignore_errors=True)
        see(prepare(build_student(draft, seed=seed, text=TEXT), seed), seed, log)
        draft.rename(start)
    torch.manual_seed(seed)
    how = BaseConfig()
    algorithm = Base(how, load_rubric(recipe.rubric), start, seed)
    policy = ScorePolicy(load(start), algorithm.level_ids)
    config = EngineConfig(
        steps=steps, optimizer="muon", learning_rate=2e-3, final_share=0.05, warmup=20, save_every=SAVE_EVERY
    )
    engine = Engine(policy, algorithm, config, out, {"seed": seed, "base": asdict(how)})
    engine.resume()
    engine.run(lambda step, found: log(f"{step} {found}") if step % 50 == 0 else None, until=until)
    said = f"the world's base model, {engine.step:,} of {steps:,} steps, seed {seed}"
    return export(policy, start, out / "model", recipe, trained=said)


def main() -> None:
    """Make the base model, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=int, help="stop after this step")
    options = parser.parse_args()
    print(make_base(options.out, steps=options.steps, until=options.until, seed=options.seed))  # noqa: T201


if __name__ == "__main__":
    main()
