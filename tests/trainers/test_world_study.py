"""The study's arithmetic, on scores whose agreement with the truth is known."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from zscore_trainers.world.scenes import DIMENSIONS
from zscore_trainers.world.shards import WorldOptions, write_world

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SEEDS = (0, 1)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for module in ("_common", "_world_runs", "_world_scores", "world_rates", "world_study"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    script = importlib.import_module("world_study")
    chosen = {"zero", "zero_told", "gdso", "grpo"}
    monkeypatch.setattr(script, "METHODS", tuple(one for one in script.METHODS if one.name in chosen))
    monkeypatch.setattr(script, "PAIRED", (("gdso", "grpo"),))
    return script


@pytest.fixture
def work(study, tmp_path):
    """A test set of 8 prompts; scores of `gdso` are the truth's, of `grpo` its opposite, of the others noise."""
    write_world(tmp_path / "test", WorldOptions(split="test", prompts=8, candidates=5))
    truth = pl.read_csv(tmp_path / "test" / "truth.csv").pivot("dimension", index="key", values="score")
    said = pl.read_ndjson(tmp_path / "test" / "reasoning.jsonl").filter(pl.col("dimension") == "alignment")
    rows = truth.join(said.select("key", pl.format("Alignment: {}", "reasoning").alias("reasoning")), on="key")
    rows = rows.with_columns(
        pl.col("key").str.slice(0, 7).alias("group"),
        pl.lit("ok").alias("status"),
        pl.lit("s").alias("shard"),
        pl.int_range(pl.len()).alias("index"),
        pl.lit(80).alias("output_tokens"),
    )
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        (tmp_path / f"seed-{seed}").mkdir()
        for method in study.METHODS:
            noise = {name: pl.lit(pl.Series(rng.uniform(1, 5, len(rows)))) for name in DIMENSIONS}
            scored = {"gdso": {}, "grpo": {name: 6 - pl.col(name) for name in DIMENSIONS}}.get(method.name, noise)
            found = rows.with_columns(**scored)
            if not method.reasons:
                found = found.drop("reasoning", "output_tokens")
            found.write_parquet(study.scores_of(tmp_path, seed, method))
    return tmp_path


def test_methods_are_compared_on_the_same_prompts(study, work):
    options = dataclasses.replace(study.Study(), test_prompts=8, candidates=5)
    found = study.compare(work, SEEDS, options)
    assert found["values"]["gdso"] == pytest.approx({"plcc": 1, "srcc": 1, "hpa": 1, "margin_hpa": 1})
    assert found["values"]["grpo"] == pytest.approx({"plcc": -1, "srcc": -1, "hpa": 0, "margin_hpa": 0}, abs=1e-9)
    assert found["differences"]["gdso - grpo"]["hpa"] == pytest.approx([1, 1, 1])
    low, high = found["intervals"]["zero"]["hpa"]
    assert low < found["values"]["zero"]["hpa"] < high
    assert low < 0.5 < high
    assert found["spread_over_seeds"]["gdso"]["hpa"] == 0
    assert found["output_tokens"] == {"zero": 0, "zero_told": 20, "gdso": 20, "grpo": 20}
    assert set(found["gates"]) == {"zero_told", "gdso", "grpo"}
    assert [one["captions"] for one in found["gates"]["gdso"]] == [1, 1]


def test_what_is_not_trained_is_scored_once_for_all_seeds(study, tmp_path):
    by_name = {one.name: one for one in study.METHODS}
    assert study.scores_of(tmp_path, 0, by_name["zero"]) == study.scores_of(tmp_path, 1, by_name["zero"])
    assert study.scores_of(tmp_path, 0, by_name["gdso"]) != study.scores_of(tmp_path, 1, by_name["gdso"])


def test_a_folder_is_of_one_study(study, tmp_path):
    study.same_study(tmp_path / "work", {"steps": 40, "base": "a"})
    study.same_study(tmp_path / "work", {"steps": 40, "base": "a"})
    with pytest.raises(SystemExit, match="holds results with another base, steps: give an empty folder"):
        study.same_study(tmp_path / "work", {"steps": 41, "base": "b"})


def test_a_picture_without_scores_counts_as_the_middle(study, work):
    path = work / "seed-0" / "gdso.parquet"
    rows = pl.read_parquet(path)
    nothing = [pl.lit(None, pl.Float64).alias(name) for name in DIMENSIONS]  # as `zscore score` writes a failed row
    rows.with_columns(*nothing, pl.lit("no_score").alias("status")).write_parquet(path)
    truth = pl.read_csv(work / "test" / "truth.csv").pivot("dimension", index="key", values="score")
    found = study.read(path, truth)
    assert (found.score_ND == 3).all()
    assert found.valid == 0


def test_the_table_has_a_row_a_method(study, work, capsys):
    options = dataclasses.replace(study.Study(), test_prompts=8, candidates=5)
    study.show(study.compare(work, SEEDS, options), {"gdso": 12.0})
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| GDSO"))
    assert row == "| GDSO (the teacher) | 1.000 | 1.000 | 1.000 [1.000, 1.000] | 1.000 | 1.00 | 1.00 | 20 | 12 |"
    assert {line.count("|") for line in lines if line.startswith(("| method", "|---|---|---|---", "| GRPO"))} == {10}


def test_a_rate_for_each_method_by_its_validation_prompts(study):
    rates = importlib.import_module("world_rates")
    assert rates.best({"3e-05": {"hpa": 0.7}, "0.0001": {"hpa": 0.9}, "0.0003": {"hpa": 0.8}}) == 1e-4
    assert rates.best({"0.0003": {"hpa": 0.9}, "0.0001": {"hpa": 0.9}, "3e-05": {"hpa": 0.7}}) == 1e-4


def test_rates_are_those_chosen_for_this_base(monkeypatch, study, tmp_path):
    runs = importlib.import_module("_world_runs")
    monkeypatch.setattr(study, "METHODS", runs.METHODS)
    chosen = {method.name: rate for rate, method in enumerate((m for m in runs.METHODS if m.rates), 1)}
    result = {"base_weights": "sha256:a", "chosen": chosen}
    (tmp_path / "world_rates.json").write_text(json.dumps({"result": result}))
    found = study.chosen_rates("sha256:a", tmp_path)
    assert found == chosen | {"risd_more": chosen["risd"]}
    assert found["grpo"] != found["grpo_text"]
    with pytest.raises(SystemExit, match="chosen for base sha256:a, not sha256:b: run world_rates.py with it"):
        study.chosen_rates("sha256:b", tmp_path)


def test_runs_of_other_teachers_lie_elsewhere(study):
    """Else students of the teacher of another rate would be taken for this one's."""
    rates = importlib.import_module("world_rates")
    runs = importlib.import_module("_world_runs")
    opd = next(one for one in runs.METHODS if one.name == "opd")
    assert rates.folder_of(opd, 1e-4, "gdso-3e-05") != rates.folder_of(opd, 1e-4, "gdso-0.0001")
