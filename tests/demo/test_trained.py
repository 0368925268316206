"""The student that ships: whole, small, trained on today's rubric, and able to score what it claims to."""

from __future__ import annotations

import json
import subprocess
import sys

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from zscore.checkpoint import read_checkpoint, weights_hash
from zscore.demo.trained import demo_student
from zscore.rubrics.rubric import load_rubric
from zscore_trainers.world.shards import WorldOptions, split_of, write_world

RECIPE = json.loads((demo_student() / "recipe.json").read_text())


def test_it_is_small_and_whole():
    files = list(demo_student().iterdir())
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    tensors = load_file(demo_student() / "model.safetensors")
    assert all(tensor.dtype is torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())


def test_it_was_trained_on_the_rubric_as_it_stands():
    checkpoint = read_checkpoint(str(demo_student()))
    assert (checkpoint.rubric, checkpoint.layout) == ("shapes", "joint")
    assert checkpoint.rubric_hash == load_rubric("shapes").hash
    assert checkpoint.trained.startswith("risd on ")


def test_its_recipe_is_recorded():
    assert RECIPE["seed"] == 0
    stages = " ".join(RECIPE["commands"])
    for words in ("world.base", "train gdso", "--reasoning", "train risd", "--split test"):
        assert words in stages


def test_it_reached_what_it_was_to_reach():
    """On at least 2,000 pairs of prompts that no stage has seen; by these very weights."""
    assert RECIPE["weights"] == weights_hash(demo_student())
    reached = RECIPE["reached"]
    assert min(one["pairs"] for one in reached.values()) >= 2000
    assert reached["overall"]["hpa"] >= 0.80
    assert reached["alignment"]["hpa"] >= 0.75


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "zscore", "demo", "out", "--prompts", "48"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_the_demo_scores_and_compares(demo):
    """What is claimed of 2,000 pairs is roughly so of a few: the bounds are four standard errors below."""
    folder, done = demo
    assert "NO MODEL GIVEN" not in done.stderr
    for words in ("PLCC", "SRCC", "HPA", "alignment", "overall", "zscore eval"):
        assert words in done.stdout
    rows = pl.read_parquet(folder / "demo-scores.parquet")
    assert rows.height == 192
    assert (rows["status"] == "ok").all()
    shown = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line[:1] == " " and line.split()}
    assert float(shown["overall"][3]) >= 0.85
    assert float(shown["alignment"][3]) >= 0.75
    assert float(shown["plausibility"][3]) >= 0.95


def test_its_prompts_are_those_of_no_training(demo):
    folder, _ = demo
    rows = pl.read_parquet(folder / "demo-scores.parquet")
    assert {split_of(prompt) for prompt in rows["prompt"]} == {"test"}


def test_the_shards_are_the_worlds(demo, tmp_path):
    """The demo draws what `python -m zscore_trainers.world` draws."""
    folder, _ = demo
    write_world(tmp_path, WorldOptions(split="test", prompts=48, per_shard=12, seed=1))
    for file in tmp_path.iterdir():
        assert (folder / "demo-shards" / file.name).read_bytes() == file.read_bytes()
