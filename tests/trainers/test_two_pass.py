"""The split gradient is the whole one: any micro-batches, any order, and over two ranks."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from zscore_trainers import losses
from zscore_trainers.two_pass import two_pass

VALUES = torch.arange(1.0, 5.01, 0.5, dtype=torch.float64)
PAIRS, GROUP, WIDTH = 3, 4, 6
SAMPLES = PAIRS * 2 * GROUP


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 9 + 5)).double()
    inputs = torch.randn(SAMPLES, WIDTH, dtype=torch.float64)
    return model, inputs


def forward(model, batch):
    """Score logits and token log-probabilities."""
    out = model(batch)
    return out[:, :9], torch.nn.functional.logsigmoid(out[:, 9:])


def loss_of(order):
    """GDSO on samples that come in any order."""
    back = torch.argsort(order)

    def loss(logits, logprobs):
        logits_PJGK = logits[back].reshape(PAIRS, 2, GROUP, 9)
        labels = torch.tensor([[4.0, 2.0], [5.0, 4.5], [3.0, 1.0]], dtype=torch.float64)
        mu = losses.expected_score(logits_PJGK, VALUES)
        rewards = losses.pointwise_reward(mu, labels, 4.0) + losses.pairwise_reward(mu, labels, 4.0)
        advantages = losses.group_advantages(rewards).flatten()
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        targets = losses.label_targets(labels, VALUES)
        return (
            losses.policy_gradient_loss(logprobs[back], advantages, mask)
            + losses.pointwise_loss(logits_PJGK, targets)
            + losses.pairwise_loss(mu, labels, 4.0)
        )

    return loss


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def whole():
    model, inputs = problem()
    value = loss_of(torch.arange(SAMPLES))(*forward(model, inputs))
    value.backward()
    return float(value.detach()), gradients(model)


@pytest.mark.parametrize("size", [1, 2, 5, 7, SAMPLES])
@pytest.mark.parametrize(("seed", "kept"), [(None, 1), (0, 0), (1, 1), (2, 2), (3, SAMPLES)])
def test_any_micro_batches_in_any_order(whole, size, seed, kept):
    model, inputs = problem()
    order = torch.arange(SAMPLES)
    if seed is not None:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
    value = two_pass(lambda batch: forward(model, batch), inputs[order].split(size), loss_of(order), kept=kept)
    assert float(value) == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(gradients(model), whole[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, SAMPLES])
def test_an_order_that_the_loss_need_not_know(whole, size):
    model, inputs = problem()
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(4))
    loss, seen = loss_of(torch.arange(SAMPLES)), []

    def watched(logits, logprobs):
        seen.append(logits.detach())
        return loss(logits, logprobs)

    value = two_pass(lambda batch: forward(model, batch), inputs[order].split(size), watched, order=order.tolist())
    torch.testing.assert_close(seen[0], forward(model, inputs)[0].detach())
    assert float(value) == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(gradients(model), whole[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 1, 3, 100])
def test_a_kept_graph_saves_a_forward_pass_and_is_gone_before_the_next(kept):
    """Graphs that wait for their backward pass, at every call: never more than are kept, and one at least."""
    model, inputs = problem()
    calls, waiting, most = [], [0], [0]

    def done(gradient):
        waiting[0] -= 1
        return gradient

    def counted(batch):
        calls.append(len(batch))
        outputs = forward(model, batch)
        if outputs[0].requires_grad:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
            outputs[0].register_hook(done)
        return outputs

    parts = inputs.split(4)
    two_pass(counted, parts, loss_of(torch.arange(SAMPLES)), kept=kept)
    assert len(calls) == 2 * len(parts) - min(kept, len(parts))
    assert waiting == [0]
    assert most == [max(1, min(kept, len(parts)))]


def test_outputs_that_the_loss_ignores(whole):
    model, inputs = problem()
    value = two_pass(lambda batch: forward(model, batch), inputs.split(5), lambda logits, _: logits.square().sum())
    other, _ = problem()
    forward(other, inputs)[0].square().sum().backward()
    assert value > 0
    torch.testing.assert_close(gradients(model), gradients(other))


def test_frozen_outputs():
    model, inputs = problem()
    fixed = torch.randn(SAMPLES, 2, dtype=torch.float64)
    batches = list(zip(inputs.split(6), fixed.split(6), strict=True))
    two_pass(lambda b: (model(b[0]), b[1]), batches, lambda out, _: out.sum())
    assert gradients(model).abs().max() > 0


def test_dropout_is_noticed():
    model, inputs = problem()
    noisy = nn.Sequential(model, nn.Dropout(0.5))
    with pytest.raises(ValueError, match="switch dropout off"):
        two_pass(lambda batch: forward(noisy, batch), inputs.split(8), loss_of(torch.arange(SAMPLES)))


def test_nothing_to_do():
    with pytest.raises(ValueError, match="no micro-batches"):
        two_pass(lambda batch: (batch,), [], lambda x: x.sum())


def on_rank(rank, port, order, sizes, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs = problem()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = inputs[order].split(sizes)[rank]
    own = torch.randperm(len(mine), generator=torch.Generator().manual_seed(rank))
    batches, group = mine[own].tensor_split(3), mesh.get_group()
    value = two_pass(lambda batch: forward(model, batch), batches, loss_of(order), order=own.tolist(), group=group)
    found = torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])
    if rank == 0:
        torch.save((value, found), path)
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[SAMPLES // 2, SAMPLES // 2], [9, SAMPLES - 9]])
def test_two_ranks_with_pairs_split_between_them(whole, sizes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))
    mp.spawn(on_rank, args=(port, order, sizes, tmp_path / "found.pt"), nprocs=2)
    value, found = torch.load(tmp_path / "found.pt")
    assert float(value) == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(found, whole[1], rtol=0, atol=1e-12)
