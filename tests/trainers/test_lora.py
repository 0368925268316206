"""Adapters: where they are, that they alone are trained, and that the merged export is the policy that was trained."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.trainers import world_set
from tests.trainers.test_parallel import SCRIPT, state, torchrun
from tests.trainers.test_train import FAST, options, world  # noqa: F401 - a fixture
from zscore.errors import UsageError
from zscore_trainers import lora
from zscore_trainers.budget import plan
from zscore_trainers.lora import MODULES, add_adapters, merged, whole_weights
from zscore_trainers.recipes import load_recipe
from zscore_trainers.train import train

needs_peft = pytest.mark.skipif(lora.find_spec("peft") is None, reason="peft isn't installed (extra lora)")
CHANGES = (*FAST, "lora_rank=4", "learning_rate=1e-2")


class Attention(nn.Module):
    """Linear layers of two names, one of them with a bias."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 6)
        self.out_proj = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.out_proj(torch.tanh(self.q_proj(x)))


def adapted(rank=2, alpha=8.0, modules=("q_proj", "out_proj")):
    torch.manual_seed(0)
    model = Attention()
    add_adapters(model, rank, alpha, modules)
    return model


class TestNames:
    def test_without_peft(self, monkeypatch):
        monkeypatch.setattr(lora, "find_spec", lambda _: None)
        with pytest.raises(UsageError, match=r"needs the package peft: pip install 'zscore-reward\[lora\]'"):
            add_adapters(Attention(), 4, 8.0)

    @pytest.mark.parametrize(
        ("modules", "said"),
        [
            (
                ("q_proj", "qkv"),
                "lora_modules names 'qkv', and the model has no such linear layer: it has out_proj, q_proj",
            ),
            (("proj",), "lora_modules names 'proj'"),  # a part of a name is no name
            ((), "lora_modules names ''"),
            (MODULES, "in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, k_proj, v_proj, o_proj, gate_proj"),
        ],
    )
    def test_a_name_that_matches_nothing(self, monkeypatch, modules, said):
        monkeypatch.setattr(lora, "find_spec", lambda _: object())
        with pytest.raises(UsageError) as raised:
            add_adapters(Attention(), 4, 8.0, modules)
        assert said in str(raised.value)

    def test_settings(self):
        recipe = load_recipe("tiny", ["lora_rank=16", "lora_modules=q_proj, out_proj", "lora_alpha=8"])
        assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_modules) == (16, 8.0, ("q_proj", "out_proj"))
        assert load_recipe("tiny").lora_rank == 0
        with pytest.raises(UsageError, match="lora_rank is -1"):
            load_recipe("tiny", ["lora_rank=-1"])

    def test_the_default_names_are_in_the_architecture(self, world):  # noqa: F811
        names = {name.rsplit(".", 1)[-1] for name, _ in world_set.load(world / "body").named_modules()}
        assert set(MODULES) <= names


class TestMerging:
    def test_by_hand(self):
        state = {
            "a.q.base_layer.weight": torch.tensor([[1.0, 2.0]]),
            "a.q.base_layer.bias": torch.tensor([7.0]),
            "a.q.lora_A.default.weight": torch.tensor([[1.0, 1.0]]),
            "a.q.lora_B.default.weight": torch.tensor([[3.0]]),
            "a.norm.weight": torch.tensor([5.0]),
        }
        found = merged(state, scale=2.0)
        assert list(found) == ["a.q.weight", "a.q.bias", "a.norm.weight"]
        assert found["a.q.weight"].tolist() == [[7.0, 8.0]]
        assert (found["a.q.bias"], found["a.norm.weight"]) == (torch.tensor([7.0]), torch.tensor([5.0]))

    def test_products_are_made_before_rounding(self):
        state = {
            "q.base_layer.weight": torch.tensor([[1.0]], dtype=torch.bfloat16),
            "q.lora_A.default.weight": torch.tensor([[1e-3]]),
            "q.lora_B.default.weight": torch.tensor([[10.0]]),
        }
        found = merged(state, scale=1.0)["q.weight"]
        assert found.dtype == torch.bfloat16
        assert found.item() == torch.tensor(1.01).bfloat16().item()

    @needs_peft
    def test_it_is_what_peft_computes(self):
        model, plain, x = adapted(), Attention(), torch.randn(5, 4)
        for name, one in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(one)
        plain.load_state_dict(whole_weights(model))
        torch.testing.assert_close(plain(x), model(x))


@needs_peft
class TestAdapters:
    def test_they_start_as_nothing_and_are_trained_alone(self):
        torch.manual_seed(0)
        plain, model, x = Attention(), adapted(), torch.randn(5, 4)
        torch.testing.assert_close(model(x), plain(x))
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        assert trained == {
            f"{layer}.lora_{part}.default.weight" for layer in ("q_proj", "out_proj") for part in ("A", "B")
        }

    def test_a_run_moves_nothing_else_and_exports_what_it_trained(self, world, tmp_path):  # noqa: F811
        made = train(options(world, tmp_path / "run"), load_recipe("tiny", CHANGES))
        before = world_set.load(world / "body").state_dict()
        weights = state(tmp_path / "run")[0]
        for name, value in before.items():
            kept = weights.get(name, weights.get(name.replace(".weight", ".base_layer.weight")))
            assert torch.equal(kept, value), name
        exported = world_set.load(made.model).state_dict()
        assert exported.keys() == before.keys()
        moved = {name for name, value in exported.items() if not torch.equal(value, before[name])}
        assert {name.split(".")[-2] for name in moved} == set(MODULES)
        assert "base_layer" not in json.dumps(sorted(exported))
        last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
        assert last["plcc_overall"] == pytest.approx(made.metrics["plcc_overall"], abs=1e-6)
        self.same_scores(world, tmp_path, weights, made.model)

    def same_scores(self, world, tmp_path, weights, folder):  # noqa: F811
        """Of the trained adapters and of the merged model; bfloat16's rounding lies between."""
        data = world_set.world_set(tmp_path / "world", prompts=2)
        collate = world_set.collator(data, tmp_path / "world", world / "body")
        batch, _ = collate(range(4))
        collate.pictures.close()
        policy, served, start = (world_set.load(one) for one in (world / "body", folder, world / "body"))
        add_adapters(policy.model, 4, 32.0)
        policy.load_state_dict(weights)
        with torch.no_grad():
            wanted, found, first = (
                one(batch, with_logprobs=False).score_logits_BDK.softmax(-1) for one in (policy, served, start)
            )
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)
        assert (wanted - first).abs().max() > 3 * (wanted - found).abs().max()

    def test_two_ranks_in_bfloat16(self, world, tmp_path):  # noqa: F811
        """Frozen weights stay as stored, adapters are float32; checkpointing and sharing go together with them."""
        (tmp_path / "run.py").write_text(SCRIPT)
        changes = (*CHANGES, "dtype=bfloat16", "gradient_checkpointing=true")
        torchrun(tmp_path / "run.py", world, tmp_path / "run", "start", 0, *changes)
        weights = state(tmp_path / "run")[0]
        dtypes = {".lora_" in name: value.dtype for name, value in weights.items()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        assert any(value.any() for name, value in weights.items() if "lora_B" in name)
        assert world_set.load(tmp_path / "run" / "model").state_dict().keys() == (
            world_set.load(world / "body").state_dict().keys()
        )

    def test_rollouts_are_written_with_the_adapters(self, world, talker, tmp_path):  # noqa: F811
        """From the second step on these differ from the base: without them `drift` would be of the order of 1."""
        changes = ("steps=3", "batch_size=2", "group=2", "micro_batch=4", "max_tokens=24", "held_out=0", "beta=0")
        recipe = load_recipe("tiny", (*changes, "lora_rank=4", "learning_rate=1e-1", "warmup=0"), "gdso")
        drifts = []
        train(
            options(world, tmp_path / "run", algorithm="gdso", model=str(talker)),
            recipe,
            lambda _, found: drifts.append(found["drift"]),
        )
        weights = state(tmp_path / "run")[0]
        assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name) > 0.05
        assert max(drifts) < 1e-3

    def test_a_wrong_name_stops_the_run(self, world, tmp_path):  # noqa: F811
        with pytest.raises(UsageError, match="lora_modules names 'query'"):
            train(options(world, tmp_path / "run"), load_recipe("tiny", (*CHANGES, "lora_modules=q_proj,query")))

    def test_memory(self):
        """Rank 16 on the 9B: 16 (in + out) weights a layer, by hand for the MLP."""
        said = plan(load_recipe("z-reward-9b", ["lora_rank=16"]), "z-reward-9b", "x").splitlines()
        every, trained = (float(word) for word in (said[0].split()[0], said[0].split()[-2]))
        assert every == pytest.approx(9.41 + trained, abs=0.02)
        mlp = 32 * 3 * 16 * (4096 + 12_288) / 1e9
        assert mlp < trained < 3 * mlp


def test_peft_is_not_imported_without_adapters():
    code = "import sys, zscore_trainers.train; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
