"""The world's base model: a tiny vision-language model that has learned to see, to speak and to score.

What Qwen3.5 is to a real teacher and student, this is to those of the world: the checkpoint that every algorithm starts
from. Scenes are drawn as the run goes, none twice; a half of each batch is asked for scores at once (joint layout), the
other for a reasoning and then the score. Which scenes a step sees follows from the seed and the step alone, so a run
goes on exactly (`zscore_trainers.engine`).

    python -m zscore_trainers.world.base OUT [--steps 800] [--until 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.fft import dct

from zscore._torchvision import ensure_importable
from zscore.checkpoint import read_checkpoint
from zscore.demo.student import build_student
from zscore.patches import PixelOptions, patchify
from zscore.records import Pixels
from zscore.rubrics.rubric import load_rubric
from zscore.templates import PromptBuilder
from zscore_trainers.data import Padding
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.export import export
from zscore_trainers.losses import mass_loss
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.recipes import load_recipe
from zscore_trainers.sequences import collate, given
from zscore_trainers.world.raters import spread
from zscore_trainers.world.render import EDGE, Canvas, render, to_uint8
from zscore_trainers.world.scenes import draw_scene, reasoning
from zscore_trainers.world.shards import prompt_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from zscore.records import EnginePrompt
    from zscore.rubrics.rubric import Layout, Rubric
    from zscore_trainers.world.scenes import Scene

LAYERS = ["linear_attention", *3 * ["full_attention"]]
"""A layer that reads words with their neighbours, and three that look things up in the picture."""
LAYOUTS: tuple[Layout, Layout] = ("joint", "reasoning")
TEXT: dict[str, Any] = {"num_hidden_layers": len(LAYERS), "layer_types": LAYERS, "tie_word_embeddings": True}


SHARP, SHARP_GAIN, SHARP_FROM = 24, 10.0, 4
"""Filters for grain and edges in the patch embedding, their strength, and the lowest sum of their two frequencies.

Filters drawn at random see the ground a hundred times as strongly as the grain on it, and a body that starts with those
alone learns of grain and blur very late.
"""
CALM = (
    ("language_model", ("o_proj.weight", "out_proj.weight", "down_proj.weight"), 0.03),
    ("visual.blocks", ("attn.proj.weight", "linear_fc2.weight"), 0.3),
    ("visual.merger", ("linear_fc2.weight",), 0.05),
)
"""What is made smaller before training, and by how much: all that writes to the residual streams.

At full strength, what random layers write drowns the words that say which dimension is asked for.
"""
SAVE_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """How it learns."""

    batch_size: int = 64
    """Pictures a step."""
    micro_batch: int = 64
    """Here always the batch."""
    told: float = 0.5
    """Share that is reasoned about; the rest is scored at once."""
    alignment: float = 0.4
    """Share of the reasonings that are about alignment, which says most of what is seen."""
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
        self._pixels = PixelOptions(
            patch=checkpoint.patch, merge=checkpoint.merge, min_pixels=EDGE**2, max_pixels=EDGE**2
        )
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
        scenes = [draw_scene(prompt_of("train", rng), rng) for _ in range(self._config.batch_size)]
        pixels = cut(scenes, self._pixels)
        first = round(self._config.told * len(scenes))
        told = self._reason(policy, scenes[:first], pixels[:first], rng)
        divergence, mass = self._score(policy, scenes[first:], pixels[first:])
        return {"loss": told + divergence, "words": told, "divergence": divergence, "mass": mass}

    def _reason(
        self, policy: ScorePolicy, scenes: Sequence[Scene], pixels: Sequence[Pixels], rng: random.Random
    ) -> float:
        """Cross-entropy of the tokens of reasonings and of scores as raters would give them."""
        names = self._rubric.names
        weights = [self._config.alignment, *[(1 - self._config.alignment) / (len(names) - 1)] * (len(names) - 1)]
        pairs = []
        for scene, picture in zip(scenes, pixels, strict=True):
            (at,) = rng.choices(range(len(names)), weights)
            (level,) = rng.choices(range(len(self._rubric.values)), list(ratings(scene.truth[names[at]], self._rubric)))
            prompt = _built(self._told, scene, picture)[at]
            pairs.append((prompt, given(self._told, self._rubric, reasoning(scene, names[at]), level)))
        batch = collate(self._pad, pairs)
        device = next(policy.parameters()).device
        found = policy(batch.policy.to(device))
        output_BT = batch.output_BT.to(device)
        loss = -(found.logprob_BT * output_BT).sum() / output_BT.sum()
        loss.backward()
        return float(loss.detach())

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
    """Make the weights of an untrained student ready to be trained: sharp-eyed and calm; returns the folder."""
    tensors = load_file(folder / "model.safetensors")
    sharpen(tensors["model.visual.patch_embed.proj.weight"], seed)
    for name, tensor in tensors.items():
        for part, ends, gain in CALM:
            if part in name and name.endswith(ends):
                tensor.mul_(gain)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharpen(weight_HCTPP: Tensor, seed: int = 0) -> None:
    """Make some filters of a patch embedding cosines of high frequency, the same in all colours; in place."""
    _, colours, frames, edge, _ = weight_HCTPP.shape
    waves_PP = torch.from_numpy(dct(np.eye(edge), norm="ortho", axis=0))
    high = [pair for pair in itertools.product(range(edge), repeat=2) if sum(pair) >= SHARP_FROM]
    gain = SHARP_GAIN / math.sqrt(colours) / frames  # frames are copies of one picture
    for row, (down, across) in enumerate(random.Random(seed).sample(high, SHARP)):  # noqa: S311
        weight_HCTPP[row] = gain * torch.outer(waves_PP[down], waves_PP[across])


def ratings(truth: float, rubric: Rubric) -> NDArray[np.float64]:
    """How many of the raters would give each level: their spread around the truth, without their leanings."""
    values_K = np.asarray(rubric.values)
    weights_K = np.exp(-((values_K - truth) ** 2) / (2 * spread(truth) ** 2))
    return np.asarray(weights_K / weights_K.sum())


def cut(scenes: Sequence[Scene], options: PixelOptions) -> list[Pixels]:
    """Drawn and cut into patches."""
    grid = (EDGE // options.patch, EDGE // options.patch)
    drawn = to_uint8(render(Canvas.of(list(scenes))))
    return [Pixels(patchify(picture, options), grid, EDGE, EDGE) for picture in drawn]


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
    ensure_importable()
    from transformers import AutoModelForImageTextToText

    recipe = load_recipe("tiny")
    start = out / "start"
    if not start.exists():
        draft = out / "start.draft"
        shutil.rmtree(draft, ignore_errors=True)
        prepare(build_student(draft, seed=seed, text=TEXT), seed)
        draft.rename(start)
    torch.manual_seed(seed)
    algorithm = Base(BaseConfig(), load_rubric(recipe.rubric), start, seed)
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    policy = ScorePolicy(model, algorithm.level_ids)
    config = EngineConfig(
        steps=steps, optimizer="muon", learning_rate=1e-3, final_share=0.05, warmup=20, save_every=SAVE_EVERY
    )
    engine = Engine(policy, algorithm, config, out, {"seed": seed})
    engine.resume()
    engine.run(lambda step, found: log(f"{step} {found}") if step % 50 == 0 else None, until=until)
    said = f"the world's base model, {engine.step:,} of {steps:,} steps, seed {seed}"
    return export(policy, start, out / "model", recipe, trained=said)


def main() -> None:
    """Make the base model, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=int, help="stop after this step")
    options = parser.parse_args()
    print(make_base(options.out, steps=options.steps, until=options.until, seed=options.seed))  # noqa: T201


if __name__ == "__main__":
    main()
