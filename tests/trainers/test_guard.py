"""Which runs are stopped: those whose training figures improve while held-out agreement falls, and no others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from zscore.errors import UsageError, ZscoreError
from zscore_trainers.engine import Engine, EngineConfig
from zscore_trainers.guard import SLACK, Evaluation, Guard, HedgingError, complaint


def history(agreements, losses=None, name="loss"):
    losses = losses or [1.0 - 0.1 * number for number in range(len(agreements))]
    return [
        Evaluation(100 * (number + 1), agreement, {name: loss})
        for number, (agreement, loss) in enumerate(zip(agreements, losses, strict=True))
    ]


FALLING = [0.5, 0.6, 0.55, 0.52, 0.48]


class TestRule:
    def test_loss_and_agreement_fall_together(self):
        said = complaint(history(FALLING), 3)
        assert said is not None
        assert "step 500: loss went from 0.9 to 0.6 while the held-out PLCC fell from 0.600 (step 200) to 0.480" in said
        assert "lower learning_rate or steps=200" in said
        assert "\n" not in said

    def test_reward_rises_as_agreement_falls(self):
        said = complaint(history(FALLING, [0.1, 0.2, 0.3, 0.4, 0.5], "reward"), 3)
        assert said is not None
        assert "reward went from 0.2 to 0.5" in said

    @pytest.mark.parametrize(
        ("agreements", "why"),
        [
            ([0.1, 0.2, 0.3, 0.4, 0.5], "it rises"),
            ([0.5, 0.6, 0.55, 0.52], "the best is two evaluations back"),
            ([0.5, 0.6, 0.55, 0.48, 0.52], "it rises again"),
            ([0.5, 0.6, 0.599, 0.598, 0.6 - SLACK + 1e-6], "within the slack"),
            ([0.5, 0.6, 0.4, 0.4, 0.6], "the best is the last, though it was reached before"),
            ([0.6], "one evaluation"),
            ([], "none"),
        ],
    )
    def test_runs_that_go_on(self, agreements, why):
        assert complaint(history(agreements), 3) is None, why

    def test_a_loss_that_rises_is_another_failure(self):
        assert complaint(history(FALLING, [1.0, 1.1, 1.2, 1.3, 1.4]), 3) is None
        assert complaint(history(FALLING, [1.0, 1.1, 1.2, 1.3, 1.4], "reward"), 3) is not None

    @pytest.mark.parametrize(
        ("name", "values"), [("reward", [0.9, 0.8, 0.7, 0.6, 0.5]), ("reverse_kl", [1, 2, 3, 4, 5])]
    )
    def test_the_loss_of_sampled_outputs_says_nothing(self, name, values):
        """A policy gradient's loss is around zero whatever is learned; this run gets worse in every way."""
        both = [
            Evaluation(one.step, one.agreement, {**one.figures, name: value})
            for one, value in zip(history(FALLING), values, strict=True)
        ]
        assert complaint(history(FALLING), 3) is not None
        assert complaint(both, 3) is None

    def test_a_teacher_s_words_come_nearer_as_agreement_falls(self):
        said = complaint(history(FALLING, [5, 4, 3, 2, 1], "reverse_kl"), 3)
        assert said is not None
        assert "reverse_kl went from 4 to 1" in said

    def test_patience(self):
        assert [complaint(history(FALLING), patience) is not None for patience in range(6)] == [
            False,  # off
            True,
            True,
            True,
            False,
            False,
        ]

    def test_figures_that_are_no_numbers_and_figures_that_are_not_there(self):
        nan = float("nan")
        assert complaint(history(FALLING, [nan] * 5), 3) is None
        assert complaint(history(FALLING, name="accuracy"), 3) is None


class TestGuard:
    def test_training_figures_are_means_since_the_evaluation_before(self):
        guard = Guard(2)
        for step, loss in enumerate((4.0, 2.0, 1.0, 1.5), 1):
            guard.see(step, {"loss": loss, "seconds": 1.0, **({"plcc_overall": 0.5} if step % 2 == 0 else {})})
        assert guard.history == [Evaluation(2, 0.5, {"loss": 3.0}), Evaluation(4, 0.5, {"loss": 1.25})]

    def test_it_speaks_at_evaluations_alone(self):
        guard = Guard(1)
        assert guard.see(1, {"loss": 1.0, "plcc_overall": 0.6}) is None
        assert guard.see(2, {"loss": 0.5}) is None
        assert "step 3" in str(guard.see(3, {"loss": 0.5, "plcc_overall": 0.5}))


class Quiet:
    """An algorithm whose loss falls, whatever the policy does."""

    def backward(self, policy, step):
        policy(torch.ones(1, 2)).sum().backward()
        return {"loss": 1.0 / (step + 1)}


class TestEngine:
    def engine(self, out, **changes):
        config = EngineConfig(**({"steps": 8, "save_every": 3, "evaluate_every": 1, "patience": 3} | changes))
        return Engine(nn.Linear(2, 1), Quiet(), config, out)

    def evaluate(self, values):
        left = list(values)
        return lambda _: {"plcc_overall": left.pop(0)}

    def test_it_stops_with_one_line_and_keeps_the_checkpoint(self, tmp_path):
        with pytest.raises(HedgingError) as raised:
            self.engine(tmp_path).run(evaluate=self.evaluate([0.5, *FALLING[1:], 0.4, 0.3]))
        assert isinstance(raised.value, ZscoreError)
        assert "step 5: loss went from 0.5 to 0.2 while the held-out PLCC fell from 0.600 (step 2)" in str(raised.value)
        assert str(raised.value).endswith("the last checkpoint is step-00000003")
        assert [one.name for one in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5

    def test_a_checkpoint_that_is_due_is_written_first(self, tmp_path):
        with pytest.raises(HedgingError, match="the last checkpoint is step-00000005"):
            self.engine(tmp_path, save_every=5).run(evaluate=self.evaluate([0.5, *FALLING[1:]]))

    def test_none_yet(self, tmp_path):
        with pytest.raises(HedgingError, match="no checkpoint was written yet"):
            self.engine(tmp_path, save_every=8).run(evaluate=self.evaluate([0.5, *FALLING[1:]]))

    def test_0_never_stops(self, tmp_path):
        engine = self.engine(tmp_path, patience=0)
        engine.run(evaluate=self.evaluate([0.9 - 0.1 * step for step in range(8)]))
        assert engine.step == 8

    def test_a_run_that_goes_on_remembers_what_its_log_says(self, tmp_path):
        """Killed at step 4, resumed at 3: steps above 3 are seen once, as they are now."""
        engine = self.engine(tmp_path)
        with pytest.raises(IndexError):
            engine.run(evaluate=self.evaluate([0.5, 0.6, 0.55, 0.7]))
        again = self.engine(tmp_path)
        assert again.resume()
        with pytest.raises(HedgingError, match=r"from 0\.600 \(step 2\) to 0\.480"):
            again.run(evaluate=self.evaluate([0.52, 0.48]))
        assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
            *(1, 2, 3, 4),
            *(4, 5),
        ]

    def test_patience_may_change_in_the_middle_of_a_run(self, tmp_path):
        with pytest.raises(HedgingError):
            self.engine(tmp_path).run(evaluate=self.evaluate([0.5, *FALLING[1:]]))
        engine = self.engine(tmp_path, patience=0)
        assert engine.resume()
        engine.run(evaluate=self.evaluate([0.4] * 8))
        assert engine.step == 8

    def test_no_patience_below_0(self):
        with pytest.raises(UsageError, match="patience is -1: at least 0"):
            EngineConfig(steps=1, patience=-1)
