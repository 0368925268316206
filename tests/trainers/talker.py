"""A tiny model that reasons: it has learned by heart what to say of a few pictures of the rubric world."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from tests.trainers import world_set
from zscore_trainers.data import Order
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.export import export
from zscore_trainers.recipes import load_recipe
from zscore_trainers.rewarddance import RewardDance, RewardDanceConfig, Told
from zscore_trainers.sequences import given

if TYPE_CHECKING:
    from pathlib import Path

    from zscore_trainers.data import Collator

STEPS = 100


def told_of(folder: Path, collator: Collator) -> list[Told]:
    """What the world's judge says of each sample and dimension."""
    numbers = {sample.key: number for number, sample in enumerate(collator.train.samples)}
    rubric = world_set.RUBRIC
    told = []
    for line in (folder / "reasoning.jsonl").read_text().splitlines():
        said = json.loads(line)
        written = given(collator.builder, rubric, said["reasoning"], rubric.values.index(said["score"]))
        told.append(Told(numbers[said["key"]], rubric.names.index(said["dimension"]), written))
    return told


def make(folder: Path) -> Path:
    """Train it; returns its checkpoint. FOLDER/world has its shards."""
    torch.manual_seed(0)
    start = world_set.body(folder / "body")
    train = world_set.world_set(folder / "world", prompts=1)
    collator = world_set.collator(train, folder / "world", start, "reasoning")
    told = told_of(folder / "world", collator)
    policy = world_set.load(start)
    config = RewardDanceConfig(batch_size=len(told), micro_batch=len(told))
    algorithm = RewardDance(config, Order(len(told), len(told)), collator, told)
    Engine(policy, algorithm, EngineConfig(steps=STEPS, learning_rate=3e-3, warmup=5), folder).run()
    collator.pictures.close()
    recipe = load_recipe("tiny", ["layout=reasoning"])
    return export(policy, start, folder / "model", recipe, trained="by heart")


def first_caption(model: Path) -> str:
    """What it learned to see on the first picture."""
    said = json.loads((model.parent / "world" / "reasoning.jsonl").read_text().splitlines()[0])
    return str(said["reasoning"].partition(".")[0])
