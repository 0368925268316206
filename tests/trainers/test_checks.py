"""Settings that can't be meant are refused where they are given, by name, in one line."""

from __future__ import annotations

import dataclasses

import pytest

from tests.command import zscore
from zscore.errors import UsageError
from zscore_trainers.algorithms import ALGORITHMS
from zscore_trainers.engine import EngineConfig
from zscore_trainers.recipes import load_recipe, settings

COUNTS = [(algorithm, name) for algorithm in ALGORITHMS for name in ("batch_size", "micro_batch")]
COUNTS += [(algorithm, "max_tokens") for algorithm in ("grpo", "gdso", "opd")]
COUNTS += [(algorithm, "reference_every") for algorithm in ("grpo", "gdso")]
COUNTS += [("sft", name) for name in ("steps", "save_every", "max_pixels", "min_pixels")]
WEIGHTS = [("risd", "mass"), ("gdso", "alpha_pt"), ("gdso", "alpha_pw")]
WEIGHTS += [(algorithm, name) for algorithm in ("grpo", "gdso") for name in ("lambda_pt", "lambda_pw", "beta")]
WEIGHTS += [("sft", "weight_decay")]
POSITIVE = [("sft", name) for name in ("learning_rate", "clip", "lora_alpha")] + [("grpo", "most"), ("gdso", "most")]
SHARES = [("sft", "held_out"), ("sft", "final_share")]


def refused(algorithm, change, said):
    with pytest.raises(UsageError) as raised:
        load_recipe("tiny", [change], algorithm)
    assert str(raised.value) == said


class TestNumbers:
    @pytest.mark.parametrize(("algorithm", "name"), COUNTS)
    @pytest.mark.parametrize("value", [0, -1])
    def test_counts(self, algorithm, name, value):
        refused(algorithm, f"{name}={value}", f"{name} is {value}: at least 1")

    @pytest.mark.parametrize("name", ["warmup", "evaluate_every", "patience", "seed", "lora_rank"])
    def test_what_may_be_0(self, name):
        refused("sft", f"{name}=-5", f"{name} is -5: at least 0")
        assert settings(load_recipe("tiny", [f"{name}=0"]))[name] == 0

    @pytest.mark.parametrize(("algorithm", "name"), WEIGHTS)
    def test_weights(self, algorithm, name):
        refused(algorithm, f"{name}=-0.5", f"{name} is -0.5: at least 0")
        refused(algorithm, f"{name}=nan", f"{name} is nan: a finite number, at least 0")
        refused(algorithm, f"{name}=inf", f"{name} is inf: a finite number, at least 0")
        assert settings(load_recipe("tiny", [f"{name}=0"], algorithm))[name] == 0

    @pytest.mark.parametrize(("algorithm", "name"), POSITIVE)
    @pytest.mark.parametrize("value", [0.0, -1.0])
    def test_more_than_0(self, algorithm, name, value):
        refused(algorithm, f"{name}={value}", f"{name} is {value}: more than 0")
        refused(algorithm, f"{name}=nan", f"{name} is nan: a finite number, more than 0")

    @pytest.mark.parametrize(("algorithm", "name"), SHARES)
    @pytest.mark.parametrize("value", [-1.0, 1.5])
    def test_shares(self, algorithm, name, value):
        refused(algorithm, f"{name}={value}", f"{name} is {value}: 0 to 1")
        refused(algorithm, f"{name}=nan", f"{name} is nan: a finite number, 0 to 1")

    @pytest.mark.parametrize(("algorithm", "name"), [("sft", "clip"), ("grpo", "most")])
    def test_a_limit_may_be_infinite(self, algorithm, name):
        assert settings(load_recipe("tiny", [f"{name}=inf"], algorithm))[name] == float("inf")
        refused("sft", "learning_rate=inf", "learning_rate is inf: a finite number, more than 0")

    @pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.95, 0.99), (0.9, 1.0), (-0.1, 0.9), (0.9, float("nan"))])
    def test_betas(self, betas):
        with pytest.raises(UsageError, match="two numbers, at least 0 and below 1"):
            EngineConfig(steps=1, betas=betas)


class TestWords:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("layout=banana", "layout is 'banana': choose joint or separate or reasoning"),
            ("dtype=float16", "dtype is 'float16': choose float32 or bfloat16"),
            ("optimizer=sgd", "optimizer is 'sgd': choose adamw or muon"),
        ],
    )
    def test_what_there_isnt(self, change, said):
        refused("sft", change, said)

    def test_the_command_says_it_in_one_line(self, tmp_path):
        code, _, errors = zscore(
            *("train", "sft", tmp_path, "--data", "a", "--model", "b", "--out", tmp_path / "run"),
            *("--recipe", "tiny", "--set", "batch_size=0"),
        )
        assert (code, errors) == (2, "zscore: batch_size is 0: at least 1\n")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_number_of_an_algorithm_is_checked(algorithm):
    """So that a new setting isn't forgotten."""
    config = load_recipe("tiny", (), algorithm).algorithm
    for each in dataclasses.fields(config):
        if isinstance(getattr(config, each.name), int | float):
            with pytest.raises(UsageError, match=f"{each.name} is -1"):
                dataclasses.replace(config, **{each.name: -1})
