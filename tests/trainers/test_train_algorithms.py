"""`zscore train` with the algorithms that reason, from a model that can: what they read, what they make, resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import zscore
from tests.scores_factory import row, write_scores
from tests.trainers import world_set
from zscore.errors import ModelError, TableError, UsageError
from zscore.shards import expand
from zscore_trainers.algorithms import ALGORITHMS
from zscore_trainers.annotations import BuildOptions, build, write
from zscore_trainers.gdso import GdsoConfig
from zscore_trainers.grpo import GrpoConfig
from zscore_trainers.recipes import RECIPES, load_recipe, settings
from zscore_trainers.told import read_told
from zscore_trainers.train import TrainOptions, train
from zscore_trainers.world.shards import WorldOptions, write_world

RUBRIC = world_set.RUBRIC
FAST = ("steps=2", "batch_size=2", "micro_batch=8", "save_every=1", "evaluate_every=2", "held_out=0.3", "warmup=1")
ROLLOUTS = {
    "grpo": ("group=2", "max_tokens=40", "reference_every=2"),
    "gdso": ("group=2", "max_tokens=40", "reference_every=2"),
    "opd": ("max_tokens=40",),
    "rewarddance": (),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from zscore.human import read_table

    root = tmp_path_factory.mktemp("algorithms")
    write_world(root / "world", WorldOptions(prompts=6, candidates=2, raters=3))
    ratings = read_table(str(root / "world" / "ratings.csv"), {}, RUBRIC.names)
    options = BuildOptions(values=RUBRIC.values, min_agreement=-1, test_share=0.0)
    write(build(ratings, expand([str(root / "world")]), options), root / "annotated")
    return root


def options(world, talker, out, algorithm, **changes):
    table = "world/reasoning.jsonl" if algorithm == "rewarddance" else "annotated/annotations.parquet"
    chosen = {
        "algorithm": algorithm,
        "data": str(world / table),
        "shards": (str(world / "world"),),
        "model": str(talker),
        "out": out,
        "teacher": str(talker) if algorithm == "opd" else None,
    }
    return TrainOptions(**(chosen | changes))


def recipe(algorithm, *more):
    return load_recipe("tiny", (*FAST, *ROLLOUTS[algorithm], *more), algorithm)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


class TestRuns:
    @pytest.mark.parametrize("algorithm", ROLLOUTS)
    def test_a_short_run(self, world, talker, tmp_path, algorithm):
        made = train(options(world, talker, tmp_path / "run", algorithm), recipe(algorithm))
        assert made.steps == 2
        logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert all(row["loss"] == row["loss"] for row in logged)
        about = json.loads((made.model / "zscore.json").read_text())
        assert about["layout"] == "reasoning"
        before = load_file(talker / "model.safetensors")
        assert any(not torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())
        assert {"plcc_overall", "hpa_overall"} <= set(made.metrics)
        assert set(made.metrics) <= set(logged[1])
        if algorithm != "rewarddance":
            assert 0 <= made.metrics["held_out_valid"] <= 1
            assert {"valid", "loss"} <= set(logged[0])

    def test_pairs_of_pictures_with_labels_on_some_dimensions(self, world, talker, tmp_path):
        """A pair is about one dimension: it wants no label on the others."""
        lacking = [pl.lit(None, pl.Float64).alias(name) for name in RUBRIC.names[1:]]
        table = pl.read_parquet(world / "annotated" / "annotations.parquet").with_columns(lacking)
        table.write_parquet(tmp_path / "a.parquet")
        changed = options(world, talker, tmp_path / "run", "gdso", data=str(tmp_path / "a.parquet"))
        made = train(changed, recipe("gdso", "steps=1"))
        assert made.samples + made.held_out == table.height
        assert made.left_out == {f"have no label on {name}, only on others": table.height for name in RUBRIC.names[1:]}

    @pytest.mark.vllm
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rollouts_from_vllm(self, world, talker, tmp_path, dtype):
        """With the trainer's float32 weights taken over by a bfloat16 engine, step by step.

        For a trainer in bfloat16 they are those of a group of one process, which vLLM finds and takes along at its end.
        """
        changes = ("rollouts=vllm", "beta=0", f"dtype={dtype}")
        made = train(options(world, talker, tmp_path / "run", "gdso"), recipe("gdso", *changes))
        logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert made.steps == 2
        assert all(0 < row["drift"] < 3 for row in logged)
        assert all(row["valid"] > 0 for row in logged)

    def test_goes_on_as_if_it_hadnt_been_stopped(self, world, talker, tmp_path):
        """In the middle between two refreshes of the reference."""
        more = ("steps=3", "beta=0.5", "reference_every=3")
        whole = train(options(world, talker, tmp_path / "whole", "gdso"), recipe("gdso", *more))

        def stop(step, _):
            if step == 2:
                raise KeyboardInterrupt

        cut = options(world, talker, tmp_path / "cut", "gdso")
        with pytest.raises(KeyboardInterrupt):
            train(cut, recipe("gdso", *more), stop)
        again = train(dataclasses.replace(cut, resume=True), recipe("gdso", *more))
        assert (again.steps, whole.steps) == (3, 3)
        wanted, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    def test_the_command(self, world, talker, tmp_path):
        changes = [part for change in (*FAST, *ROLLOUTS["gdso"]) for part in ("--set", change)]
        code, out, errors = zscore(
            *("train", "gdso", world / "world", "--data", world / "annotated" / "annotations.parquet"),
            *("--model", talker, "--out", tmp_path / "run", "--recipe", "tiny", *changes),
        )
        assert code == 0, errors
        assert "held_out_valid" in out
        code, _, errors = zscore(
            *("score", world / "world", "--model", tmp_path / "run" / "model", "--engine", "transformers"),
            *("--out", tmp_path / "s.parquet", "--max-output-tokens", 40, "--max-failed", 1, "--limit", 2),
        )
        assert code == 0, errors
        assert "reasoning" in pl.read_parquet(tmp_path / "s.parquet").columns


class TestRefusals:
    def test_an_unknown_algorithm(self, world, talker, tmp_path):
        with pytest.raises(UsageError, match="no algorithm is called 'ppo': there are sft, risd, rewarddance"):
            train(options(world, talker, tmp_path / "run", "ppo"), load_recipe("tiny"))
        with pytest.raises(UsageError, match="no algorithm is called 'ppo'"):
            load_recipe("tiny", (), "ppo")

    def test_the_wrong_kind_of_table(self, world, talker, tmp_path):
        """A model's scores aren't labels, and labels no teacher's distributions."""
        scores = str(write_scores(tmp_path / "s.parquet", [row(0)]))
        for algorithm in ("sft", "gdso"):
            with pytest.raises(TableError, match=r"holds a model's scores; people's labels \(annotations.parquet\)"):
                train(options(world, talker, tmp_path / "run", algorithm, data=scores), load_recipe("tiny"))
        with pytest.raises(TableError, match="holds people's labels; a teacher's distributions are wanted: train sft"):
            train(options(world, talker, tmp_path / "run", "risd"), load_recipe("tiny"))

    def test_a_typo(self):
        with pytest.raises(UsageError, match="no algorithm is called 'rsd': did you mean 'risd'"):
            load_recipe("tiny", (), "rsd")

    def test_resuming_before_the_first_checkpoint(self, world, talker, tmp_path):
        """Says that it begins anew; in another algorithm's folder it doesn't."""
        said = []

        def stop(*_):
            raise KeyboardInterrupt

        first = options(world, talker, tmp_path / "run", "rewarddance")
        with pytest.raises(KeyboardInterrupt):
            train(first, recipe("rewarddance", "save_every=9"), stop)
        other = options(world, talker, tmp_path / "run", "gdso", resume=True)
        with pytest.raises(UsageError, match="was made with algorithm = rewarddance"):
            train(other, recipe("gdso", "save_every=9"))
        again = dataclasses.replace(first, resume=True)
        train(again, recipe("rewarddance", "save_every=9"), on_restart=lambda: said.append("anew"))
        assert said == ["anew"]

    def test_resuming_with_other_reasonings(self, world, talker, tmp_path):
        lines = (world / "world" / "reasoning.jsonl").read_text().splitlines()
        said = json.loads(lines[0])
        lines[0] = json.dumps(said | {"reasoning": said["reasoning"] + " Really."})
        (tmp_path / "r.jsonl").write_text("\n".join(lines))
        first = options(world, talker, tmp_path / "run", "rewarddance")
        train(first, recipe("rewarddance", "steps=1"))
        other = dataclasses.replace(first, resume=True, data=str(tmp_path / "r.jsonl"))
        with pytest.raises(UsageError, match="was made with reasonings = "):
            train(other, recipe("rewarddance", "steps=1"))

    def test_resuming_with_another_teacher(self, world, talker, tmp_path):
        shutil.copytree(talker, tmp_path / "teacher")
        changed = load_file(talker / "model.safetensors")
        changed["model.language_model.norm.weight"] += 0.1
        save_file(changed, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
        first = options(world, talker, tmp_path / "run", "opd")
        train(first, recipe("opd", "steps=1"))
        other = dataclasses.replace(first, resume=True, teacher=str(tmp_path / "teacher"))
        with pytest.raises(UsageError, match="was made with teacher = "):
            train(other, recipe("opd", "steps=1"))

    def test_opd_wants_a_teacher(self, world, talker, tmp_path):
        with pytest.raises(UsageError, match="opd: --teacher names"):
            train(options(world, talker, tmp_path / "run", "opd", teacher=None), recipe("opd"))

    def test_a_teacher_with_other_tokens(self, world, talker, tmp_path):
        shutil.copytree(talker, tmp_path / "teacher")
        tokenizer = json.loads((talker / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["4"], words["5"] = words["5"], words["4"]
        (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))
        changed = options(world, talker, tmp_path / "run", "opd", teacher=str(tmp_path / "teacher"))
        with pytest.raises(ModelError, match=r"opd: token '[45]' is \d+ to the student, \d+ to"):
            train(changed, recipe("opd"))

    def test_pairs_want_candidates(self, world, talker, tmp_path):
        table = pl.read_parquet(world / "annotated" / "annotations.parquet").unique("prompt", keep="first")
        table.write_parquet(tmp_path / "a.parquet")
        with pytest.raises(UsageError, match="at least two candidates"):
            train(options(world, talker, tmp_path / "run", "gdso", data=str(tmp_path / "a.parquet")), recipe("gdso"))

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("not json", "line 1: a JSON object"),
            ('{"key": "a", "dimension": "charm", "reasoning": "x", "score": 3}', "line 1"),
            ('{"key": "a", "dimension": "realism", "score": 3}', "'reasoning'"),
            ('{"key": "a", "dimension": "realism", "reasoning": "x", "score": 7}', "outside 1 to 5"),
            ("", "is empty"),
        ],
    )
    def test_given_reasonings(self, tmp_path, line, says):
        (tmp_path / "r.jsonl").write_text(line)
        with pytest.raises(TableError, match=says):
            read_told(str(tmp_path / "r.jsonl"), RUBRIC)

    def test_two_reasonings_for_one_question(self, tmp_path):
        line = '{"key": "a", "dimension": "realism", "reasoning": "x", "score": 3}\n'
        (tmp_path / "r.jsonl").write_text(2 * line)
        with pytest.raises(TableError, match="line 2: a has a reasoning on realism already"):
            read_told(str(tmp_path / "r.jsonl"), RUBRIC)

    def test_no_file(self):
        with pytest.raises(TableError, match="nowhere.jsonl can't be read"):
            read_told("nowhere.jsonl", RUBRIC)


class TestRecipes:
    @pytest.mark.parametrize(
        ("algorithm", "change", "says"),
        [
            ("gdso", "preset=wild", "preset is 'wild': choose stable or paper"),
            ("grpo", "reward_from=words", "reward_from is 'words': choose distribution or text"),
            ("grpo", "estimator=k4", "estimator is 'k4': choose k2 or k3"),
            ("grpo", "group=1", "group is 1: at least 2"),
            ("opd", "against=new", "against is 'new': choose old or live"),
            ("gdso", "rollouts=sglang", "rollouts is 'sglang': choose transformers or vllm"),
            ("sft", "group=4", "no such setting"),
        ],
    )
    def test_settings_that_cant_be_meant(self, algorithm, change, says):
        with pytest.raises(UsageError, match=says):
            load_recipe("tiny", [change], algorithm)

    @pytest.mark.parametrize("name", RECIPES)
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_every_recipe_knows_every_algorithm(self, name, algorithm):
        found = load_recipe(name, (), algorithm)
        assert isinstance(found.algorithm, ALGORITHMS[algorithm].config)
        assert (found.layout == "reasoning") == ALGORITHMS[algorithm].reasons

    def test_settings_of_the_algorithm(self):
        found = load_recipe("tiny", ["alpha_pw=0.5", "beta=0", "group=4", "preset=paper"], "gdso")
        assert found.algorithm == dataclasses.replace(
            GdsoConfig(max_tokens=80, micro_batch=64), alpha_pw=0.5, beta=0.0, group=4, preset="paper"
        )
        assert "alpha_pw" not in settings(load_recipe("tiny", (), "grpo"))
        assert type(load_recipe("tiny", (), "grpo").algorithm) is GrpoConfig
