"""Data, RISD and the engine together, on real pictures and the real architecture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.trainers import world_set
from zscore.errors import SampleError, UsageError, ZscoreError
from zscore_trainers import losses
from zscore_trainers.data import Order, TrainSet
from zscore_trainers.engine import DONE, Engine, EngineConfig
from zscore_trainers.risd import Risd, RisdConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model folder, set and collator."""
    with world_set.learnable(tmp_path_factory.mktemp("training")) as found:
        yield found


def risd(train, collate, batch=4, micro=4, **options):
    config = RisdConfig(batch_size=batch, micro_batch=micro)
    return Risd(config, Order(len(train.samples), batch), collate, **options)


def gradients(policy):
    found = torch.cat([one.grad.flatten() for one in policy.parameters() if one.grad is not None])
    policy.zero_grad()
    return found


class TestOrder:
    def test_every_pass_has_every_sample_once(self):
        order = Order(count=10, batch=4, seed=3)
        drawn = np.concatenate([order.indices(step) for step in range(5)])
        assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
        assert drawn[:10].tolist() != drawn[10:].tolist()

    def test_a_step_is_the_same_whenever_it_is_asked_for(self):
        assert Order(1000, 32, 1).indices(77).tolist() == Order(1000, 32, 1).indices(77).tolist()
        assert Order(1000, 32, 1).indices(77).tolist() != Order(1000, 32, 2).indices(77).tolist()

    def test_a_batch_larger_than_the_set(self):
        order = Order(3, 9)
        assert sorted(order.indices(0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        both = list(zip(order.indices(0).tolist(), order.repeats(0, 0, 1), strict=True))
        assert sorted(both) == [(number, before) for number in range(3) for before in range(3)]
        parts = [order.repeats(0, rank, 3) for rank in range(3)]
        assert [parts[at % 3][at // 3] for at in range(9)] == order.repeats(0, 0, 1)


class TestCollator:
    def test_pictures_and_prompts_are_those_that_scoring_reads(self, made):
        model, train, collate = made
        batch, targets = collate([2, 5])
        assert targets.shape == (2, 4, 9)
        np.testing.assert_array_equal(targets.numpy(), train.targets_NDK[[2, 5]])
        pictures = [collate.pictures.read(train.places[index], world_set.CUTTING) for index in (2, 5)]
        prompts = [
            world_set.builder(model).build(train.samples[index].prompt, picture)[0]
            for index, picture in zip((2, 5), pictures, strict=True)
        ]
        for row, prompt in enumerate(prompts):
            assert tuple(batch.tokens_BT[row][batch.mask_BT[row].bool()].tolist()) == prompt.token_ids
            assert tuple(batch.probes_BD[row].tolist()) == prompt.probes

    def test_the_separate_layout_has_a_sequence_a_dimension(self, made):
        model, train, joint = made
        collate = world_set.collator(train, joint.pictures.path.parent, model, "separate")
        with closing(collate.pictures):
            batch, targets = collate([1, 3])
        assert batch.probes_BD.shape == (8, 1)
        np.testing.assert_array_equal(targets[4:, 0].numpy(), train.targets_NDK[3])

    def test_a_sample_that_cannot_be_used_is_named(self, made):
        model, train, joint = made
        places = list(train.places)
        places[2] = replace(places[2], size=40)
        broken = world_set.collator(
            TrainSet(train.samples, places, train.targets_NDK), joint.pictures.path.parent, model
        )
        said = r"^sample 2 \('p000001c0'\) of world-000000.tar: .*; leave it out of --data$"
        with closing(broken.pictures), pytest.raises(SampleError, match=said):
            broken([2])

    def test_no_samples(self):
        with pytest.raises(ValueError, match="no samples"):
            TrainSet([], [], np.zeros((0, 4, 9), np.float32))


class TestRisd:
    @pytest.mark.parametrize("micro", [1, 3])
    def test_micro_batches_give_the_gradient_of_the_batch(self, made, micro):
        model, train, collate = made
        policy = world_set.load(model)
        whole = risd(train, collate).backward(policy, 0)
        wanted = gradients(policy)
        parts = risd(train, collate, micro=micro).backward(policy, 0)
        found = gradients(policy)
        assert (found - wanted).norm() < 1e-4 * wanted.norm()
        assert parts == pytest.approx(whole, rel=1e-4)

    def test_ranks_share_the_batch(self, made):
        model, train, collate = made
        policy = world_set.load(model)
        risd(train, collate).backward(policy, 0)
        wanted = gradients(policy)
        halves = []
        for rank in range(2):
            risd(train, collate, rank=rank, ranks=2).backward(policy, 0)
            halves.append(gradients(policy))
        assert (sum(halves) / 2 - wanted).norm() < 1e-4 * wanted.norm()
        with pytest.raises(ValueError, match="a batch of 5 can't be shared by 2 ranks"):
            risd(train, collate, batch=5, ranks=2)

    @pytest.mark.parametrize("micro", [1, 4])
    def test_a_dimension_without_a_target_teaches_nothing(self, made, micro):
        """Every other one weighs as much as if it were there, whatever else is in the batch."""
        model, train, joint = made
        targets = train.targets_NDK.copy()
        targets[::2, 1:3] = np.nan
        partial = TrainSet(train.samples, train.places, targets)
        collate = world_set.collator(partial, joint.pictures.path.parent, model)
        policy = world_set.load(model)
        with closing(collate.pictures):
            order = Order(len(train.samples), 4)
            config = RisdConfig(batch_size=4, micro_batch=micro, mass=0.0)
            found = Risd(config, order, collate).backward(policy, 0)
            mine = gradients(policy)
            batch, targets_BDK = collate(order.share(0, 0, 1))
        logits_BDK = policy(batch, with_logprobs=False).score_logits_BDK
        known_BD = ~targets_BDK.isnan().any(-1)
        assert not known_BD.all()
        total = losses.risd_loss(targets_BDK[known_BD], logits_BDK[known_BD]) * known_BD.float().mean()
        total.backward()
        assert (mine - gradients(policy)).norm() < 1e-4 * mine.norm()
        assert found["loss"] == pytest.approx(float(total.detach()), rel=1e-4)

    def test_the_loss_follows_the_device(self, made, monkeypatch):
        """Where the kernels are the choice of the device, they run, forward and backward: nothing picks a reference."""
        from zscore_kernels import backend_calls, launch

        model, train, collate = made
        policy = world_set.load(model)
        risd(train, collate, batch=1, micro=1).backward(policy, 0)
        wanted = gradients(policy)
        monkeypatch.setattr(launch, "KERNEL_DEVICES", ("cuda", "cpu"))
        before = backend_calls.copy()
        risd(train, collate, batch=1, micro=1).backward(policy, 0)
        ran = backend_calls - before
        assert {path for path, _ in ran} == {"interpreter"}
        assert {kernel for _, kernel in ran} >= {"head_kernel", "kl_kernel", "hidden_gradient_kernel"}
        assert (gradients(policy) - wanted).norm() < 1e-4 * wanted.norm()

    def test_eight_samples_are_learned_by_heart(self, made, tmp_path):
        """KL below 1e-3 towards soft targets; the mass on the levels near 1."""
        model, train, collate = made
        soft = torch.from_numpy(train.targets_NDK) * 3
        collate = world_set.collator(
            TrainSet(train.samples, train.places, soft.softmax(-1).numpy()), collate.pictures.path.parent, model
        )
        policy = world_set.load(model)
        engine = Engine(
            policy,
            risd(train, collate, batch=8, micro=8),
            EngineConfig(steps=100, learning_rate=5e-3, warmup=10, save_every=100, weight_decay=0.0),
            tmp_path,
        )
        with closing(collate.pictures):
            engine.run()
        last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
        assert last["divergence"] < 1e-3
        assert last["mass"] > 0.95


SCRIPT = """
import sys
from pathlib import Path
from tests.conftest import pytest_configure
pytest_configure()
from tests.trainers import world_set
from zscore_trainers import losses
from zscore_trainers.data import Order
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.risd import Risd, RisdConfig
import torch
torch.set_num_threads(1)
world, model, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
train = world_set.world_set(out / "world")
collate = world_set.collator(train, out / "world", model)
policy = world_set.load(model)
algorithm = Risd(RisdConfig(batch_size=4), Order(8, 4), collate)
engine = Engine(policy, algorithm, EngineConfig(steps=steps, learning_rate=1e-3, save_every=2), out, {"seed": 0})
engine.resume()
print("at", engine.step, flush=True)
engine.run(lambda step, _: print("step", step, flush=True))
torch.save({name: value for name, value in policy.state_dict().items()}, out / "final.pt")
"""


class TestEngine:
    def test_killed_and_resumed_is_the_same_to_the_last_bit(self, made, tmp_path):
        model = made[0]
        for name in ("whole", "killed"):
            (tmp_path / name).mkdir()
        arguments = [sys.executable, "-c", SCRIPT, "-", str(model)]
        subprocess.run([*arguments, str(tmp_path / "whole"), "4"], check=True, capture_output=True)
        process = subprocess.Popen([*arguments, str(tmp_path / "killed"), "4"], stdout=subprocess.PIPE, text=True)
        with process:
            for line in process.stdout:
                if line == "step 3\n":  # between two checkpoints
                    os.kill(process.pid, signal.SIGKILL)
        again = subprocess.run(
            [*arguments, str(tmp_path / "killed"), "4"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        assert again[0] == "at 2"
        assert again[-1] == "step 4"
        whole, resumed = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def engine(self, made, out, **settings):
        model, train, collate = made
        config = EngineConfig(steps=2, learning_rate=1e-3, save_every=1)
        return Engine(world_set.load(model), risd(train, collate), config, out, settings)

    def test_only_whole_checkpoints_count_and_only_the_last_is_kept(self, made, tmp_path):
        engine = self.engine(made, tmp_path)
        assert not engine.resume()
        engine.run()
        (folder,) = (tmp_path / "checkpoints").iterdir()
        assert folder.name == "step-00000002"
        (folder / DONE).unlink()
        assert not self.engine(made, tmp_path).resume()

    def test_other_settings_are_refused(self, made, tmp_path):
        self.engine(made, tmp_path, rubric="a").run()
        with pytest.raises(UsageError, match="was made with rubric = a, now it is b: give the same settings"):
            self.engine(made, tmp_path, rubric="b").resume()

    def test_settings_that_differ_are_named_and_no_others(self, made, tmp_path):
        self.engine(made, tmp_path, recipe={"seed": 1, "layout": "joint", "algorithm": {"mass": 0.5}}).run()
        said = (
            r"step-00000002 was made with mass = 0\.5, now it is unset; most = unset, now it is 2; seed = 1, now it is"
            " 2: give the same settings, or another --out$"
        )
        with pytest.raises(UsageError, match=said):
            self.engine(made, tmp_path, recipe={"seed": 2, "layout": "joint", "algorithm": {"most": 2}}).resume()

    def test_another_algorithm_is_named_alone(self, made, tmp_path):
        self.engine(made, tmp_path, algorithm="risd", recipe={"algorithm": {"mass": 0.5}}).run()
        said = "was made with algorithm = risd, now it is grpo: give the same settings"
        with pytest.raises(UsageError, match=said):
            self.engine(made, tmp_path, algorithm="grpo", recipe={"algorithm": {"most": 2}}).resume()

    def test_a_gradient_that_is_no_number_stops_the_run(self, made, tmp_path):
        class Broken:
            def backward(self, policy, step):
                for one in policy.parameters():
                    one.grad = torch.full_like(one, float("nan"))
                return {}

        engine = Engine(world_set.load(made[0]), Broken(), EngineConfig(steps=1), tmp_path)
        said = "norm is nan at step 0: lower learning_rate or clip, and start again; no checkpoint was written yet"
        with pytest.raises(FloatingPointError, match=said) as raised:
            engine.run()
        assert isinstance(raised.value, ZscoreError)

    @pytest.mark.parametrize(("name", "value"), [("steps", 0), ("save_every", 0), ("learning_rate", float("nan"))])
    def test_settings_that_cannot_be_meant(self, name, value):
        with pytest.raises(UsageError, match=name):
            EngineConfig(**{"steps": 1, name: value})

    def test_the_learning_rate_rises_and_falls(self):
        config = EngineConfig(steps=100, learning_rate=1.0, warmup=10, final_share=0.1)
        rates = [config.rate(step) for step in range(101)]
        assert rates[0] == 0.1
        assert max(rates) == rates[9] == rates[10] == 1.0
        assert rates[99] > 0.1  # of the last step
        assert rates[100] == pytest.approx(0.1)
        assert rates[10:] == sorted(rates[10:], reverse=True)
