"""`zscore score --reasoning` from shards to the table, with a tiny model that has learned to reason."""

from __future__ import annotations

import polars as pl
import pytest

from tests.command import zscore
from tests.trainers.talker import first_caption
from zscore.parquet import read_metadata
from zscore.scorer import Scorer


@pytest.fixture(scope="module")
def model(talker):
    return talker


@pytest.fixture(scope="module")
def options(model):
    return ["--model", model, "--engine", "transformers", "--max-output-tokens", 72]


def test_the_table(model, options, tmp_path):
    """The checkpoint was trained to reason, so it does without being told."""
    code, _, errors = zscore("score", model.parent / "world", "--out", tmp_path / "s.parquet", *options)
    assert code == 0, errors
    table = pl.read_parquet(tmp_path / "s.parquet")
    assert table["status"].to_list() == ["ok", "ok"]
    assert table["reasoning"][0].startswith(f"Alignment: {first_caption(model)}")
    assert "\n\nRealism: It is clean." in table["reasoning"][0]
    assert table["output_tokens"].to_list() == [77, 71]
    truth = pl.read_csv(model.parent / "world" / "truth.csv").pivot("dimension", index="key", values="score")
    for name in ("alignment", "realism", "aesthetics", "plausibility"):
        assert table[name].to_list() == pytest.approx(truth[name].to_list(), abs=0.1)
    said = read_metadata(str(tmp_path / "s.parquet"), "s")
    assert said["layout"] == "reasoning"
    assert said["reasoning"] == {"samples": 1, "temperature": 1.0, "max_tokens": 72, "seed": 0}
    assert "output_tokens" in zscore("show", tmp_path / "s.parquet", "--row", 0)[1]


def test_samples_are_averaged_and_a_resume_must_agree(model, options, tmp_path):
    command = ["score", model.parent / "world", "--out", tmp_path / "s.parquet", "--reasoning", *options]
    code, _, errors = zscore(*command, "--samples", 2)
    assert code == 0, errors
    table = pl.read_parquet(tmp_path / "s.parquet")
    assert table["output_tokens"].to_list() == [154, 142]
    assert table["reasoning"][0].count("(2 of 2): ") == 4
    code, _, errors = zscore(*command, "--samples", 3)
    assert code == 1
    assert "reasoning" in errors


def test_what_writes_no_score_is_a_row_that_says_so(model, options, tmp_path):
    command = ["score", model.parent / "world", "--out", tmp_path / "s.parquet", *options[:-1], 5]
    assert zscore(*command)[0] == 3
    table = pl.read_parquet(tmp_path / "s.parquet")
    assert set(table["status"].to_list()) == {"no_score"}
    assert "raise --max-output-tokens (now 5)" in table["error"][0]
    assert table["reasoning"].null_count() == table.height


def test_in_memory(model):
    from PIL import Image

    with Scorer(model, engine="transformers") as scorer:
        (score,) = scorer.score([("a large yellow square", Image.new("RGB", (96, 96)))], on_error="return")
    assert len(getattr(score, "reasoning", "none")) == 4
