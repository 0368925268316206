"""A small set of the rubric world and a tiny body to learn it, for tests."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from zscore.checkpoint import read_checkpoint
from zscore.demo.student import build_student
from zscore.patches import PixelOptions
from zscore.rubrics.rubric import load_rubric
from zscore.shards import expand
from zscore.templates import PromptBuilder
from zscore_trainers.data import Collator, TrainSet
from zscore_trainers.losses import label_targets
from zscore_trainers.pictures import PictureFile, collect
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.world.shards import WorldOptions, write_world

RUBRIC = load_rubric("shapes")
CUTTING = PixelOptions(patch=16, merge=2, min_pixels=96 * 96, max_pixels=96 * 96)


def body(folder: Path) -> Path:
    return build_student(folder, text={"num_hidden_layers": 2, "full_attention_interval": 2}, vision={"depth": 1})


def load(folder: Path) -> ScorePolicy:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return ScorePolicy(model, builder(folder).level_ids)


def builder(folder: Path, layout: str = "joint") -> PromptBuilder:
    return PromptBuilder(folder, RUBRIC, layout, merge=2, max_tokens=512)


def world_set(folder: Path, prompts: int = 4) -> TrainSet:
    write_world(folder, WorldOptions(prompts=prompts, candidates=2, raters=2))
    truth: dict[str, dict[str, float]] = {}
    for row in csv.DictReader((folder / "truth.csv").read_text().splitlines()):
        truth.setdefault(row["key"], {})[row["dimension"]] = float(row["score"])
    found = collect(expand([str(folder)]), folder / "pictures.bin", lambda _: True)
    labels_ND = torch.tensor([[truth[sample.key][name] for name in RUBRIC.names] for sample, _ in found])
    targets_NDK = label_targets(labels_ND, torch.tensor(RUBRIC.values)).numpy().astype(np.float32)
    return TrainSet([sample for sample, _ in found], [place for _, place in found], targets_NDK)


@contextmanager
def learnable(root: Path) -> Iterator[tuple[Path, TrainSet, Collator]]:
    """Model folder, set and collator, made in a folder."""
    model = body(root / "model")
    train = world_set(root / "world")
    collate = collator(train, root / "world", model)
    with closing(collate.pictures):
        yield model, train, collate


def collator(train: TrainSet, folder: Path, model: Path, layout: str = "joint") -> Collator:
    pictures = PictureFile(folder / "pictures.bin")
    return Collator.of(train, pictures, read_checkpoint(str(model)), builder(model, layout), CUTTING)
