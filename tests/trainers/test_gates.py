"""Gates of the world: captions are read back, and what is missing is an error."""

from __future__ import annotations

import json

import polars as pl
import pytest

from zscore_trainers.world.gates import gates, main, named, verdicts
from zscore_trainers.world.scenes import DIMENSIONS
from zscore_trainers.world.shards import WorldOptions, write_world


@pytest.fixture
def drawn(tmp_path):
    write_world(tmp_path / "drawn", WorldOptions(prompts=10, candidates=3))
    return tmp_path / "drawn"


def perfect(drawn):
    """What a model would write that says and scores the truth."""
    truth = pl.read_csv(drawn / "truth.csv").pivot("dimension", index="key", values="score")
    said = pl.read_ndjson(drawn / "reasoning.jsonl").filter(pl.col("dimension") == "alignment")
    rows = truth.join(said.select("key", "reasoning"), on="key")
    return rows.with_columns(
        pl.lit("ok").alias("status"),
        pl.format("Alignment: {}\n\nRealism: It is clean.", "reasoning").alias("reasoning"),
    )


def found(rows, drawn):
    rows.write_parquet(drawn / "scores.parquet")
    return gates(drawn / "scores.parquet", drawn)


def test_captions_name_what_is_shown():
    said = "Alignment: I see a small red circle at the top left and a large blue square at the centre. The small ..."
    assert named(said) == {("small", "red", "circle", "top left"), ("large", "blue", "square", "centre")}
    assert named("Alignment: I see a small red circle at the top leftmost thing. All") == frozenset()
    assert named("Realism: I see a small red circle at the top.") == frozenset()
    assert named("Alignment: I see a small red circle at the top") == frozenset()  # cut off


def test_verdicts_are_read_back():
    said = (
        "Alignment: I see a small red circle at the top left. The small red circle at the top left is there."
        " The large blue square at the centre is green, at the top right. The large red square at the top is"
        "\n\nAesthetics: The ground is calm."
    )
    assert verdicts(said) == {
        ("small red circle at the top left", "there"),
        ("large blue square at the centre", "green, at the top right"),
    }


def test_who_says_the_truth_passes_all(drawn):
    one = found(perfect(drawn), drawn)
    assert (one.captions, one.things, one.comparisons, one.valid) == (1, 1, 1, 1)
    assert all(one.plcc[name] == pytest.approx(1) for name in DIMENSIONS)


def test_what_is_wrong_counts(drawn):
    rows = perfect(drawn)
    first = pl.int_range(pl.len()) < 6
    wrong = pl.when(first).then(pl.lit("Alignment: I see nothing.")).otherwise("reasoning").alias("reasoning")
    failed = pl.when(first).then(pl.lit("failed")).otherwise("status").alias("status")
    reversed_scores = (6 - pl.col("realism")).alias("realism")
    one = found(rows.with_columns(wrong, failed, reversed_scores), drawn)
    assert one.captions == pytest.approx(24 / 30)
    assert 0 < one.things < 1
    assert 0 < one.comparisons < 1
    assert one.valid == pytest.approx(24 / 30)
    assert one.plcc["realism"] == pytest.approx(-1)


def test_what_is_missing_is_an_error(drawn):
    with pytest.raises(ValueError, match="5 of 30 pictures of .* are not in"):
        found(perfect(drawn)[5:], drawn)
    with pytest.raises(ValueError, match="score with --reasoning"):
        found(perfect(drawn).drop("reasoning"), drawn)


def test_the_command_prints_them(drawn, monkeypatch, capsys):
    perfect(drawn).write_parquet(drawn / "scores.parquet")
    monkeypatch.setattr("sys.argv", ["gates", str(drawn / "scores.parquet"), str(drawn)])
    main()
    assert json.loads(capsys.readouterr().out)["captions"] == 1


def test_what_cant_be_compared_is_one_line(drawn, capsys, monkeypatch):
    perfect(drawn).head(4).write_parquet(drawn / "few.parquet")
    (drawn / "junk.parquet").write_bytes(b"no table")
    for name, said in (("few", "26 of 30 pictures of"), ("junk", "parquet"), ("nowhere", "No such file")):
        monkeypatch.setattr("sys.argv", ["gates", str(drawn / f"{name}.parquet"), str(drawn)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in last
        assert "Traceback" not in last
