"""Several ranks (gloo) train what one process trains: the same data, gradients, checkpoints and results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainers import world_set
from tests.trainers.test_train import FAST, options, world  # noqa: F401 - a fixture
from zscore.errors import UsageError
from zscore_trainers import parallel
from zscore_trainers.policy import ScorePolicy
from zscore_trainers.recipes import load_recipe
from zscore_trainers.train import train

# Three samples a forward pass: two ranks share the held-out set unevenly, and must still agree on its figures.
CHANGES = (*FAST, "micro_batch=3", "batch_size=6", "gradient_checkpointing=true")

SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.conftest import pytest_configure
pytest_configure()
from zscore_trainers.recipes import load_recipe
from zscore_trainers.train import TrainOptions, train
root, out, resume, killed, *changes = sys.argv[1:]
options = TrainOptions(algorithm="sft", data=f"{root}/annotated/annotations.parquet", shards=(f"{root}/world",),
                       model=f"{root}/body", out=Path(out), resume=resume == "resume")
def show(step, found):
    print("rank", os.environ["RANK"], "step", step, flush=True)
    if step == int(killed):
        os.kill(os.getpid(), signal.SIGKILL)
made = train(options, load_recipe("tiny", changes), show)
print("rank", os.environ["RANK"], "made", made.samples, made.held_out, sorted(made.metrics.items()), flush=True)
"""


def torchrun(*arguments, ranks=2, check=True):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*launcher, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def state(out):
    """All tensors of the last checkpoint, by name, whole."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    (folder,) = (out / "checkpoints").iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # that there is one process
        dcp_to_torch_save(folder, out / "whole.pt")
    found = torch.load(out / "whole.pt")
    return found["model"], found["optimizer"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "run.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def two(world, script, tmp_path_factory):  # noqa: F811
    """A run on two ranks: its folder and what it printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(script, world, out, "start", 0, *CHANGES)
    return out, done.stdout.splitlines()


def distance(one, other):
    """Between the weights that both have by the second's names."""
    return torch.stack([(one[name] - other[name]).double().square().sum() for name in other]).sum().sqrt()


class TestTwoRanks:
    def test_weights_are_those_of_one_process(self, two, world, tmp_path):  # noqa: F811
        """What four steps change differs by rounding: 1e-3 of it (AdamW divides by gradients near 0)."""
        before = world_set.load(world / "body").state_dict()
        train(options(world, tmp_path / "one"), load_recipe("tiny", CHANGES))
        one, two_ranks = state(tmp_path / "one")[0], state(two[0])[0]
        assert one.keys() == two_ranks.keys() == before.keys()
        moved, apart = (distance(one, other) for other in (before, two_ranks))
        assert moved > 0.1
        assert apart < 1e-3 * moved

    def test_figures_and_exports_are_those_of_one_process(self, two, world, tmp_path):  # noqa: F811
        made = train(options(world, tmp_path / "one"), load_recipe("tiny", CHANGES))
        logs = [
            [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            for out in (tmp_path / "one", two[0])
        ]
        for mine, theirs in zip(*logs, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() - {"seconds"}:
                assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), name
        from safetensors.torch import load_file

        one, other = (load_file(folder / "model.safetensors") for folder in (made.model, two[0] / "model"))
        assert one.keys() == other.keys()
        assert {value.dtype for value in other.values()} == {torch.bfloat16}
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-2, atol=1e-4)
        assert (two[0] / "model" / "config.json").read_text() == (made.model / "config.json").read_text()

    def test_the_first_rank_alone_tells_and_all_agree(self, two):
        _, said = two
        assert [line for line in said if " step " in line] == [f"rank 0 step {step}" for step in range(1, 5)]
        made = sorted(line.split(" ", 2)[2] for line in said if " made " in line)
        assert len(made) == 2
        assert made[0] == made[1]

    def test_killed_and_resumed_is_the_same_to_the_last_bit(self, two, world, script, tmp_path):  # noqa: F811
        out = tmp_path / "run"
        assert torchrun(script, world, out, "start", 3, *CHANGES, check=False).returncode
        shutil.copytree(out, tmp_path / "copy")
        again = torchrun(script, world, out, "resume", 0, *CHANGES).stdout.splitlines()
        assert [line for line in again if " step " in line] == ["rank 0 step 3", "rank 0 step 4"]
        for mine, theirs in zip(state(out), state(two[0]), strict=True):
            assert flat(mine).keys() == flat(theirs).keys()
            for name, value in flat(mine).items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(flat(theirs)[name])), name
        # One process goes on from what two have written.
        seen, copied = [], options(world, tmp_path / "copy", resume=True)
        train(copied, load_recipe("tiny", CHANGES), lambda step, _: seen.append(step))
        assert seen == [3, 4]


def flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree} if isinstance(tree, torch.Tensor | int | float) else {}
    return {name: leaf for key, part in tree.items() for name, leaf in flat(part, f"{path}/{key}").items()}


class TestCommand:
    def call(self, world, out, *changes, check=True):  # noqa: F811
        return torchrun(
            *("-m", "zscore", "train", "sft", world / "world", "--recipe", "tiny", "--model", world / "body"),
            *("--data", world / "annotated" / "annotations.parquet", "--out", out),
            *(part for change in changes for part in ("--set", change)),
            check=check,
        )

    def test_it_prints_once(self, world, tmp_path):  # noqa: F811
        done = self.call(world, tmp_path / "run", *FAST, "steps=1")
        assert done.stdout.count("1 steps on") == 1
        assert done.stderr.count("training on") == 1
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()

    def test_what_the_first_rank_finds_wrong_is_said_once(self, world, tmp_path):  # noqa: F811
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_text('{"step": 1}\n')
        done = self.call(world, tmp_path / "run", *FAST, check=False)
        assert done.returncode
        assert done.stderr.count("holds a run already") == 1


class TestOneProcess:
    def test_bfloat16_moves_weights_by_less_than_its_spacing(self, world, tmp_path):  # noqa: F811
        """Steps of 1e-6 would be lost in bfloat16 weights, most of which are above 1e-3."""
        changes = (*FAST, "dtype=bfloat16", "steps=2", "learning_rate=1e-6")
        train(options(world, tmp_path / "run"), load_recipe("tiny", changes))
        before = world_set.load(world / "body").state_dict()
        after, moments = state(tmp_path / "run")
        assert {value.dtype for value in after.values()} == {torch.float32}
        assert {value.dtype for name, value in flat(moments).items() if "exp_avg" in name} == {torch.float32}
        name = "model.lm_head.weight"
        changed = (after[name] - before[name]).abs()
        assert 0 < changed.max() < 1e-5
        assert (changed > 0).float().mean() > 0.5
        assert not parallel.is_started()

    def test_without_a_group(self):
        with parallel.started(torch.float32) as device:
            assert device.type in {"cpu", "cuda"}
            assert not parallel.is_started()
        assert parallel.averaged({"loss": 2.0}) == {"loss": 2.0}
        assert parallel.from_first(lambda: "work") == "work"
        np.testing.assert_array_equal(parallel.summed(torch.ones(2)), [1, 1])

    def test_a_batch_that_cannot_be_shared(self, world, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.setattr(parallel, "ranks", lambda: 3)
        with pytest.raises(UsageError, match="batch_size is 4, which 3 processes can't share evenly"):
            train(options(world, tmp_path / "run"), load_recipe("tiny", FAST))

    def test_an_architecture_without_blocks(self):
        with pytest.raises(UsageError, match="Linear doesn't name its blocks"):
            parallel.blocks(nn.Linear(2, 2))

    def test_blocks_are_the_layers_of_both_towers(self, world):  # noqa: F811
        policy = world_set.load(world / "body")
        assert isinstance(policy, ScorePolicy)
        names = sorted(type(block).__name__ for block in parallel.blocks(policy.model))
        assert names == ["Qwen3_5DecoderLayer"] * 2 + ["Qwen3_5VisionBlock"]


def test_pictures_are_copied_by_the_first_rank(two):
    assert Path(two[0] / "pictures.bin").stat().st_size > 0
