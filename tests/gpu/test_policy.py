"""What trains on a GPU takes the compiled kernels: the policy's score logits and RISD's loss, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.shared import uncounted
from tests.trainers import world_set
from zscore_kernels import backend_calls
from zscore_trainers.data import Order
from zscore_trainers.risd import Risd, RisdConfig

pytestmark = pytest.mark.gpu


def test_a_step_of_risd(tmp_path):
    body = world_set.body(tmp_path / "body")
    train = world_set.world_set(tmp_path / "world")
    collate = world_set.collator(train, tmp_path / "world", body)
    policy = world_set.load(body).to("cuda")
    before = backend_calls.copy()
    found = Risd(RisdConfig(batch_size=4), Order(8, 4), collate).backward(policy, 0)
    collate.pictures.close()
    ran = backend_calls - before
    assert {kernel for _, kernel in ran} >= {"head_kernel", "kl_kernel"}
    assert found["loss"] > 0
    assert all(one.grad is None or one.grad.isfinite().all() for one in policy.parameters())
    on_cpu = world_set.load(body)
    collate = world_set.collator(train, tmp_path / "world", body)
    with uncounted():
        wanted = Risd(RisdConfig(batch_size=4), Order(8, 4), collate).backward(on_cpu, 0)
    collate.pictures.close()
    assert found["divergence"] == pytest.approx(wanted["divergence"], rel=1e-3)
    for mine, theirs in zip(policy.parameters(), on_cpu.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=5e-2, atol=1e-4)
