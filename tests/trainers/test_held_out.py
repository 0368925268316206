"""What evaluation says of policies that say the same of every picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zscore_trainers import held_out as held_out_module
from zscore_trainers.guard import WATCHED, Guard
from zscore_trainers.held_out import HeldOut, HeldOutReasoning
from zscore_trainers.rollouts import Rollout
from zscore_trainers.sequences import Written

NAMES, VALUES = ("a", "b"), (1.0, 3.0, 5.0)
LABELS_ND = np.array([[1, 3], [3, 1], [5, 3], [5, 5]])
PLCC = {"plcc_a", "plcc_b", "plcc_overall"}


def held_out(labels_ND=LABELS_ND):
    samples = [SimpleNamespace(group="", prompt=f"p{number // 2}") for number in range(len(labels_ND))]
    targets_NDK = (np.asarray(labels_ND)[..., None] == VALUES).astype(np.float32)
    return HeldOut(SimpleNamespace(train=SimpleNamespace(samples=samples, targets_NDK=targets_NDK)), NAMES, VALUES, 2)


class Alike:
    """Rollouts of a policy that has lost its format, or that gives everything one score."""

    def __init__(self, score_at):
        self.score_at = score_at

    def follow(self, policy):
        pass

    def draw(self, prompts, seeds):
        return [Rollout(one, Written((9,), self.score_at), np.zeros(1, np.float32), None) for one in prompts]


class TestCollapse:
    def test_a_constant_policy_agrees_with_nothing(self):
        found = held_out().agreement(np.full((4, 2), 3.2, np.float32))
        assert {name: value for name, value in found.items() if name in PLCC} == dict.fromkeys(PLCC, 0.0)

    def test_a_dimension_that_is_constant_for_itself(self):
        found = held_out().agreement(np.array([[1, 3], [2, 3], [3, 3], [4, 3]], np.float32))
        assert found["plcc_a"] > 0.9
        assert found["plcc_b"] == 0

    def test_a_policy_that_gives_no_numbers(self):
        assert held_out().agreement(np.full((4, 2), np.nan, np.float32))[WATCHED] == 0

    def test_labels_that_are_all_alike_say_nothing(self):
        found = held_out(np.full((4, 2), 3)).agreement(np.arange(8, dtype=np.float32).reshape(4, 2))
        assert not PLCC & found.keys()

    @pytest.mark.parametrize("score_at", [None, 0], ids=["no score", "one score"])
    def test_outputs_that_are_all_alike(self, score_at):
        direct = held_out()
        direct.prompts = lambda numbers: [["a", "b"] for _ in numbers]
        direct.read = lambda policy, drawn: torch.full((len(drawn),), 3.0 if score_at is None else 4.0)
        found = HeldOutReasoning(direct, Alike(score_at))(None)
        assert found[WATCHED] == 0
        assert found["held_out_valid"] == (score_at is not None)

    def test_pictures_are_decoded_some_at_a_time(self, monkeypatch):
        """Each picture's scores are its own, however many are drawn for at once."""
        direct, asked = held_out(), []

        def prompts(numbers):
            asked.append(list(numbers))
            return [[(number, at) for at in range(2)] for number in numbers]

        class Echo(Alike):
            def draw(self, prompts, seeds):
                return [SimpleNamespace(prompt=one, written=SimpleNamespace(score_at=0)) for one in prompts]

        direct.prompts = prompts
        direct.read = lambda policy, drawn: torch.tensor([1.0 + one.prompt[0] + one.prompt[1] / 4 for one in drawn])
        whole = HeldOutReasoning(direct, Echo(0))(None)
        monkeypatch.setattr(held_out_module, "AT_ONCE", 3)
        assert HeldOutReasoning(direct, Echo(0))(None) == whole
        assert asked == [[0, 1, 2, 3], [0, 1, 2], [3]]

    def test_the_guard_sees_it(self):
        """Agreement that falls and then is gone altogether, while the loss goes on falling."""
        guard, said = Guard(4), []
        collapsed = held_out().agreement(np.full((4, 2), 3.0, np.float32))
        for step in range(1, 14):
            found = {WATCHED: 0.7 - 0.1 * step} if step <= 3 else collapsed
            said.append(guard.see(step, {"loss": 1 / step, **found}))
        assert said[:4] == [None] * 4
        assert "the held-out PLCC fell from 0.600 (step 1) to 0.000" in said[4]
        assert all(said[4:])
