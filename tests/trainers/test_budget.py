"""Memory by hand, against the real architectures on the meta device and their FSDP2 plan."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.trainers import world_set
from tests.trainers.test_train import FAST, options, world  # noqa: F401 - a fixture
from zscore.cli.app import build_app
from zscore.errors import UsageError
from zscore_trainers import budget as budget_module
from zscore_trainers.bodies import BODIES, meta_model
from zscore_trainers.budget import Counts, Work, activations, budget, counts, logits, plan, table
from zscore_trainers.recipes import RECIPES, load_recipe
from zscore_trainers.train import train

CONFIG = {
    "text_config": {
        "vocab_size": 1000,
        "hidden_size": 10,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 5,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 5,
    },
    "vision_config": {"hidden_size": 6, "intermediate_size": 12, "depth": 2, "spatial_merge_size": 2},
}
COUNTS = Counts(trained=1000, frozen=0, block=100, rest=400, rest_trained=400, block_trained=100)
WORK = Work(sequences=2, image_tokens=3, probes=4, text_tokens=2)


class TestByHand:
    def test_shares_and_whole_parts(self):
        found = budget(COUNTS, CONFIG, WORK, gpus=8)
        assert found["weights (share)"] == 1000 * 4 / 8
        assert found["gradients (share)"] == 1000 * 4 / 8
        assert found["AdamW's moments (share)"] == 1000 * 8 / 8
        assert found["whole weights"] == (400 + 2 * 100) * 2
        assert found["whole gradients"] == (400 + 100) * (2 + 4) + 2 * 1000 * 10 * 2

    def test_what_is_frozen_has_neither_gradient_nor_moments(self):
        frozen = Counts(trained=80, frozen=920, block=100, rest=400, rest_trained=0, block_trained=8)
        found = budget(frozen, CONFIG, WORK, gpus=4)
        assert found["weights (share)"] == (80 * 4 + 920 * 2) / 4
        assert found["gradients (share)"] == 80
        assert found["whole weights"] == 600 * 2
        assert found["whole gradients"] == 8 * 6

    def test_activations(self):
        tokens, patches = 2 * (3 + 2), 2 * 3 * 4
        delta = 6 * 10 + 4 * 20 + 2 * (2 * 5 + 10) + 3 * 10
        text = tokens * (2 * delta + 8 * 10 * 4)
        vision = patches * (9 * 6 + 2 * 12) * 2
        inputs = (tokens * 10 * 3 + patches * 6 * 2) * 2
        assert activations(CONFIG, WORK) == inputs + max(text, vision)
        whole = Work(sequences=2, image_tokens=3, probes=4, text_tokens=2, checkpointing=False)
        assert activations(CONFIG, whole) == 3 * text + 2 * vision

    def test_logits_are_a_slice_of_the_vocabulary(self):
        assert logits(248_320, WORK) == 2 * 4 * 4096 * 10
        assert logits(1000, WORK) == 2 * 4 * 1000 * 10

    def test_rollouts_take_a_generator_and_a_reference(self):
        wrote = Work(sequences=2, image_tokens=3, probes=1, text_tokens=7, logprobs=True, drawn=5, others=1)
        config = CONFIG | {"text_config": CONFIG["text_config"] | {"num_hidden_layers": 8}}
        found = budget(COUNTS, config, wrote, gpus=8)
        assert found["other models (share)"] == 1000 * 4 / 8
        assert found["whole weights"] == 2 * (400 + 2 * 100) * 2
        assert found["logits"] == (2 * 1 * 1000 + 2 * 7 * 1000) * 10  # fewer tokens than a chunk
        cache = 2 * 2 * 1 * 5 * (3 + 7)  # keys and values of two full layers, a head of 5, ten tokens
        assert found["generator"] == 2 * (1000 + 5 * cache)
        assert budget(COUNTS, CONFIG, WORK, gpus=8)["generator"] == 0

    def test_the_table_says_what_fits(self):
        large = Counts(trained=30 * 10**9, frozen=0, block=10**9, rest=10**9, rest_trained=10**9, block_trained=10**9)
        lines = table(large, CONFIG, [(2, WORK), (16, WORK)]).splitlines()
        assert lines[0].split() == ["GB", "a", "GPU", "2", "GPUs", "16", "GPUs"]
        assert lines[1].split() == ["weights", "(share)", "60.00", "7.50"]
        assert lines[3].split() == ["AdamW's", "moments", "(share)", "120.00", "15.00"]
        assert lines[-1].split()[-2:] == ["no", "yes"]


class TestCounted:
    def test_a_run_keeps_what_the_budget_counts(self, world, tmp_path):  # noqa: F811
        """float32 weights and two moments of every trained weight, in a bfloat16 run; from its checkpoint."""
        from torch.distributed.checkpoint import FileSystemReader

        changes = (*FAST, "steps=1", "dtype=bfloat16")
        train(options(world, tmp_path / "run"), load_recipe("tiny", changes))
        (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
        kept = {"model": 0, "optimizer": 0}
        for name, about in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
            if getattr(about, "size", None) and not name.endswith(".step"):
                kept[name.split(".")[0]] += about.size.numel() * about.properties.dtype.itemsize
        config = json.loads((world / "body" / "config.json").read_text())
        found = budget(counts(meta_model(config)), config, WORK, gpus=1)
        assert found["weights (share)"] == kept["model"]
        assert found["AdamW's moments (share)"] == kept["optimizer"]

    def test_tied_and_frozen_weights(self, world):  # noqa: F811
        model = world_set.load(world / "body").model
        every = counts(model)
        assert every.trained == sum(one.numel() for one in model.parameters())
        inside = sum(one.numel() for name, one in model.named_parameters() if ".layers." in name or ".blocks." in name)
        assert every.rest == every.trained - inside
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        model.visual = None
        model.requires_grad_(False)
        tied = counts(model)
        assert tied.trained == tied.rest_trained == tied.block_trained == 0
        assert tied.frozen == every.trained - model.get_input_embeddings().weight.numel()


PLAN = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from zscore_trainers import parallel
from zscore_trainers.bodies import BODIES, meta_model
from zscore_trainers.policy import ScorePolicy
import sys
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
policy = ScorePolicy(meta_model(BODIES[sys.argv[1]]), range(9))
whole = sum(one.numel() for one in policy.parameters())
parallel.share_out(policy, torch.bfloat16, torch.device("cpu"))
mine = [one.to_local() for one in policy.parameters()]
units = sum(hasattr(module, "unshard") for module in policy.modules())
print(whole, sum(one.numel() for one in mine), {one.dtype for one in mine}, units)
dist.destroy_process_group()
"""


class TestArchitectures:
    @pytest.mark.parametrize(
        ("name", "language", "blocks"), [("z-reward-9b", 8_953_803_264, 32), ("z-reward-27b", 26_895_998_464, 64)]
    )
    def test_weights_are_as_many_as_is_published(self, name, language, blocks):
        model = meta_model(BODIES[name])
        assert all(one.is_meta for one in model.parameters())
        assert sum(one.numel() for part, one in model.named_parameters() if "visual" not in part) == language
        layers = BODIES[name]["text_config"]["num_hidden_layers"]
        assert layers == blocks
        found = counts(model)
        bytes_on_8 = budget(found, BODIES[name], WORK, 8)["weights (share)"] * 8
        assert bytes_on_8 == sum(one.numel() * 4 for one in model.parameters())

    @pytest.mark.parametrize(("name", "parts"), [("z-reward-9b", 32 + 27 + 1), ("z-reward-27b", 64 + 27 + 1)])
    def test_eight_ranks_share_them_out(self, name, parts):
        """A fake group: this rank's share is an eighth, but for rows that don't divide by 8."""
        done = subprocess.run([sys.executable, "-c", PLAN, name], capture_output=True, text=True, check=True)
        whole, mine, dtype, units = done.stdout.split()
        assert int(mine) == pytest.approx(int(whole) / 8, rel=1e-3)
        assert dtype == "{torch.float32}"
        assert int(units) == parts

    @pytest.mark.parametrize("name", sorted(BODIES))
    def test_the_body_of_a_recipe(self, name):
        assert name in RECIPES
        said = plan(load_recipe(name), name, "Qwen/not-here").splitlines()
        assert f"(the architecture of {name}, for 'Qwen/not-here' can't be read from here)" in said[0]
        assert said[1].split()[-6:] == ["8", "GPUs", "16", "GPUs", "32", "GPUs"]
        assert said[-1].split()[-3:] == ["yes", "yes", "yes"]

    def test_a_teacher_by_gdso_wants_more(self):
        """A whole generator and a reference beside the policy; a batch of 8 pairs can't be shared by 16."""
        lines = plan(load_recipe("z-reward-27b", [], "gdso"), "z-reward-27b", "x").splitlines()
        assert lines[-1] == "batch_size is 8: 16 or 32 GPUs can't share it, set a multiple"
        assert lines[-2].split()[-3:] == ["no", "no", "yes"]
        (line,) = (one for one in lines if one.startswith("generator"))
        assert float(line.split()[-1]) > 2 * 27.36
        wide = plan(load_recipe("z-reward-27b", ["batch_size=32"], "gdso"), "z-reward-27b", "x")
        assert wide.splitlines()[-1].startswith("fits")

    def test_a_checkpoint_s_own_config_goes_first(self, world):  # noqa: F811
        said = plan(load_recipe("z-reward-9b"), "z-reward-9b", str(world / "body"))
        assert "config.json" in said
        assert "0.00 billion weights" in said

    def test_a_hub_id_s_config_too(self, world, monkeypatch):  # noqa: F811
        """A student's recipe with a teacher's weights would seem to fit."""
        monkeypatch.setattr(budget_module, "find_checkpoint", lambda model, weights: world / "body")
        assert "0.00 billion weights" in plan(load_recipe("z-reward-9b"), "z-reward-9b", "Qwen/Qwen3.5-27B")

    def test_another_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llava"}')
        with pytest.raises(UsageError, match="is a llava: memory is planned for qwen3_5 alone"):
            plan(load_recipe("tiny"), "tiny", str(tmp_path))

    def test_no_architecture(self):
        with pytest.raises(UsageError, match="no config.json in './none', and recipe 'tiny' has no architecture"):
            plan(load_recipe("tiny"), "tiny", "./none")

    def test_layouts_and_small_batches(self):
        nine = load_recipe("z-reward-9b", ["batch_size=32"])
        joint, separate = (
            [float(word) for word in line.split()[-3:]]
            for layout in ("joint", "separate")
            for line in plan(
                load_recipe("z-reward-9b", ["batch_size=32", f"layout={layout}"]), "z-reward-9b", "x"
            ).split("\n")
            if line.startswith("activations")
        )
        assert nine.algorithm.micro_batch == 4
        assert joint[0] == pytest.approx(4 * joint[2], rel=0.01)  # 4 samples on 8 GPUs, 1 on 32
        assert separate[0] == pytest.approx(4 * joint[0], rel=0.01)  # four dimensions


def test_dry_run_prints_and_leaves_nothing(tmp_path):
    from typer.testing import CliRunner

    arguments = ["train", "risd", "no-shards", "--data", "no.parquet", "--model", "Qwen/Qwen3.5-27B", "--dry-run"]
    done = CliRunner().invoke(build_app(), [*arguments, "--out", str(tmp_path / "run"), "--recipe", "z-reward-27b"])
    assert done.exit_code == 0, done.output
    assert "27.36 billion weights" in done.output
    assert "whole gradients" in done.output
    assert not (tmp_path / "run").exists()


class TestCheckpointing:
    """Blocks that are computed again on the way back give the same gradients."""

    @pytest.mark.parametrize("with_logprobs", [False, True])
    def test_gradients_are_equal(self, world, tmp_path, with_logprobs):  # noqa: F811
        train_set = world_set.world_set(tmp_path / "world", prompts=2)
        collate = world_set.collator(train_set, tmp_path / "world", world / "body")
        batch, teacher_BDK = collate(range(3))
        collate.pictures.close()
        found, runs = [], []
        for again in (False, True):
            policy = world_set.load(world / "body").train()
            if again:
                policy.model.gradient_checkpointing_enable()
            times = {"forward": 0}
            policy.model.model.language_model.layers[0].mlp.register_forward_pre_hook(
                lambda *_, times=times: times.update(forward=times["forward"] + 1)
            )
            output = policy(batch, with_logprobs=with_logprobs, teacher_BDK=teacher_BDK, with_mass=True)
            loss = output.divergence - output.log_mass_BD.mean()
            (loss if output.logprob_BT is None else loss - output.logprob_BT.mean()).backward()
            found.append({name: one.grad for name, one in policy.named_parameters() if one.grad is not None})
            runs.append(times["forward"])
        assert runs == [1, 2]  # it did compute them again
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)
