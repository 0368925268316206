"""Algorithms that learn from rollouts train on two ranks (gloo) what they train in one process."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers.test_parallel import distance, flat, state, torchrun
from tests.trainers.test_train_algorithms import FAST, ROLLOUTS, options, world  # noqa: F401 - a fixture
from zscore.errors import UsageError
from zscore_trainers import parallel
from zscore_trainers.algorithms import chosen
from zscore_trainers.recipes import load_recipe
from zscore_trainers.train import _check_ranks, train

# A rank's four outputs in two micro-batches, eight in three. Outputs are cut short so that some have no score.
CHANGES = (*FAST, "steps=4", "micro_batch=3")
OWN = {
    "grpo": (*ROLLOUTS["grpo"], "max_tokens=11", "beta=0.5"),
    "gdso": (*ROLLOUTS["gdso"], "max_tokens=11", "beta=0.5"),
    "opd": ("max_tokens=12", "batch_size=8"),
}

SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.conftest import pytest_configure
pytest_configure()
from zscore_trainers.recipes import load_recipe
from zscore_trainers.train import TrainOptions, train
root, model, out, resume, killed, *changes = sys.argv[1:]
options = TrainOptions(algorithm="gdso", data=f"{root}/annotated/annotations.parquet", shards=(f"{root}/world",),
                       model=model, out=Path(out), resume=resume == "resume")
def show(step, found):
    if step == int(killed):
        os.kill(os.getpid(), signal.SIGKILL)
made = train(options, load_recipe("tiny", changes, "gdso"), show)
print("rank", os.environ["RANK"], "made", made.samples, made.held_out, sorted(made.metrics.items()), flush=True)
"""


@pytest.fixture(scope="module")
def unsure(talker, tmp_path_factory):
    """The talker, made unsure of its words: a group's outputs differ, and so do their rewards."""
    folder = tmp_path_factory.mktemp("unsure") / "model"
    shutil.copytree(talker, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 0.6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def settings(algorithm):
    return (*CHANGES, *OWN[algorithm])


def asked(world, unsure, talker, out, algorithm):  # noqa: F811
    found = options(world, unsure, out, algorithm)
    return dataclasses.replace(found, teacher=str(talker) if algorithm == "opd" else None)


def logged(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def two(world, unsure, talker, tmp_path_factory):  # noqa: F811
    """Folders of runs of the command on two ranks; each is made once."""
    found = {}

    def run(algorithm):
        if algorithm not in found:
            out = tmp_path_factory.mktemp(algorithm) / "run"
            teacher = ("--teacher", talker) if algorithm == "opd" else ()
            torchrun(
                *("-m", "zscore", "train", algorithm, world / "world", "--recipe", "tiny", "--model", unsure, *teacher),
                *("--data", world / "annotated" / "annotations.parquet", "--out", out),
                *(part for change in settings(algorithm) for part in ("--set", change)),
            )
            found[algorithm] = out
        return found[algorithm]

    return run


@pytest.mark.parametrize("algorithm", OWN)
def test_two_ranks_train_what_one_does(two, world, unsure, talker, tmp_path, algorithm):  # noqa: F811
    """Weights differ by rounding, 1e-3 of what was changed; figures by as much, those of held-out prompts too."""
    one = tmp_path / "run"
    train(asked(world, unsure, talker, one, algorithm), load_recipe("tiny", settings(algorithm), algorithm))
    rows, others = logged(one), logged(two(algorithm))
    # So few of eight outputs have a score that a rank may have none: a mean over what is valid isn't the ranks' mean.
    assert any(0 < row["valid"] <= (0.25 if algorithm == "gdso" else 0.9) for row in rows)
    assert all(row.get("drift", 0) < 1e-3 for row in others)  # the generators follow the policy
    for mine, theirs in zip(rows, others, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), (name, mine["step"])
    assert "held_out_valid" in rows[-1]
    before = {f"model.{name}": value for name, value in load_file(unsure / "model.safetensors").items()}
    mine, theirs = state(one)[0], state(two(algorithm))[0]
    assert mine.keys() == theirs.keys()
    moved, apart = (distance(mine, other) for other in (before, {name: theirs[name] for name in before}))
    assert moved > 0.1
    assert apart < 1e-3 * moved


def test_killed_and_resumed_past_a_refresh_is_the_same_to_the_last_bit(two, world, unsure, tmp_path):  # noqa: F811
    """The reference became the policy before step 3; the run goes on with step 4, and needs it from the checkpoint."""
    script, out = tmp_path / "run.py", tmp_path / "run"
    script.write_text(SCRIPT)
    arguments = (script, world, unsure, out)
    assert torchrun(*arguments, "start", 4, *settings("gdso"), check=False).returncode
    assert [row["step"] for row in logged(out)] == [1, 2, 3, 4]
    assert (out / "checkpoints" / "step-00000003" / "done.json").exists()
    shutil.copytree(out, tmp_path / "copy")
    said = torchrun(*arguments, "resume", 0, *settings("gdso")).stdout.splitlines()
    made = [line.split(" ", 2)[2] for line in said if " made " in line]
    assert len(made) == 2
    assert made[0] == made[1]
    (wanted,), (found,) = ((run / "checkpoints").iterdir() for run in (two("gdso"), out))
    assert wanted.name == found.name
    for mine, theirs in zip(state(out), state(two("gdso")), strict=True):
        assert flat(mine).keys() == flat(theirs).keys()
        for name, value in flat(mine).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(flat(theirs)[name])), name
    # One process goes on from what two have written, their reference included.
    resumed = dataclasses.replace(options(world, unsure, tmp_path / "copy", "gdso"), resume=True)
    train(resumed, load_recipe("tiny", settings("gdso"), "gdso"))
    last = logged(tmp_path / "copy")[-1]
    assert last["kl"] > 1e-3
    assert last == pytest.approx(logged(two("gdso"))[-1], rel=2e-3, abs=1e-4)


def test_vllm_under_torchrun(world, unsure, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    recipe = load_recipe("tiny", (*settings("gdso"), "rollouts=vllm"), "gdso")
    with pytest.raises(UsageError, match="under torchrun: --set rollouts=transformers, or one process"):
        train(options(world, unsure, tmp_path / "run", "gdso"), recipe)
    assert not (tmp_path / "run").exists()
    _check_ranks(chosen("sft"), load_recipe("tiny", (*FAST, "rollouts=vllm")))  # which writes nothing


def test_one_process_in_bfloat16(world, unsure, tmp_path):  # noqa: F811
    """Its weights are a group's too, of one member."""
    changes = (*settings("gdso"), "dtype=bfloat16", "steps=2", "evaluate_every=0")
    train(options(world, unsure, tmp_path / "run", "gdso"), load_recipe("tiny", changes, "gdso"))
    assert all(0 <= row["drift"] < 1 for row in logged(tmp_path / "run"))
