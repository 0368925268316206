"""AdamW and Muon: what each updates, and going on exactly."""

from __future__ import annotations

import pytest
import torch

from tests.trainers import world_set
from zscore.errors import UsageError
from zscore_trainers import parallel
from zscore_trainers.data import Order
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.optimizers import make_optimizers, set_rate
from zscore_trainers.risd import Risd, RisdConfig

HOW = {"betas": (0.9, 0.95), "weight_decay": 0.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with world_set.learnable(tmp_path_factory.mktemp("optimizers")) as found:
        yield found


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(made, name):
    policy = world_set.load(made[0])
    frozen = next(policy.parameters()).requires_grad_(requires_grad=False)
    optimizers = make_optimizers(policy, name, **HOW)
    held = [one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]]
    assert len(held) == len({id(one) for one in held})
    assert {id(one) for one in held} == {id(one) for one in policy.parameters() if one is not frozen}


def test_muon_has_the_matrices_and_leaves_the_tables():
    body = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(8, 4), "proj": torch.nn.Linear(4, 4)})
    muon, adamw = make_optimizers(body, "muon", **HOW)
    assert muon.param_groups[0]["params"] == [body["proj"].weight]
    held = [one for group in adamw.param_groups for one in group["params"]]
    assert {id(one) for one in held} == {id(body["embed_tokens"].weight), id(body["proj"].bias)}


def test_muon_moves_strong_and_weak_directions_alike():
    """A gradient of singular values 1, 0.1 and 0.01 moves the matrix by nearly equal ones; AdamW's differ."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(16, 16))[0][:, :3] for _ in range(2))
    gradient = left @ torch.diag(torch.tensor([1.0, 0.1, 0.01])) @ right.T
    moved = {}
    for name in ("muon", "adamw"):
        body = torch.nn.Linear(16, 16, bias=False)
        before = body.weight.detach().clone()
        optimizers = make_optimizers(body, name, **HOW)
        set_rate(optimizers, 0.1)
        body.weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        moved[name] = torch.linalg.svdvals(before - body.weight.detach())[:3]
    assert moved["muon"].max() / moved["muon"].min() < 3
    assert moved["adamw"].max() / moved["adamw"].min() > 3


def test_muon_goes_on_exactly(made, tmp_path):
    model, train, collate = made

    def engine(out):
        config = EngineConfig(steps=3, optimizer="muon", learning_rate=1e-3, save_every=10)
        algorithm = Risd(RisdConfig(batch_size=2, micro_batch=2), Order(len(train.samples), 2), collate)
        policy = world_set.load(model)
        out.mkdir(exist_ok=True)
        return policy, Engine(policy, algorithm, config, out)

    whole, run = engine(tmp_path / "whole")
    run.run()
    _, run = engine(tmp_path / "cut")
    run.run(until=2)
    resumed, run = engine(tmp_path / "cut")
    assert run.resume()
    assert run.step == 2
    run.run()
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_muon_wants_whole_matrices(monkeypatch):
    monkeypatch.setattr(parallel, "is_started", lambda: True)
    with pytest.raises(UsageError, match="optimizer is 'muon', which wants whole matrices .* set optimizer=adamw"):
        make_optimizers(torch.nn.Linear(2, 2), "muon", **HOW)


def test_unknown_optimizers_are_refused():
    with pytest.raises(UsageError, match="optimizer is 'sgd': choose adamw or muon"):
        EngineConfig(steps=1, optimizer="sgd")
