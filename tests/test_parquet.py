from __future__ import annotations

import io
import json

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny import RUBRIC, level_scores
from zscore.errors import TableError
from zscore.parquet import TableWriter, batches, read_metadata, rows_to_table, score_schema
from zscore.records import ScoreRow, Status
from zscore.rubrics.rubric import parse_rubric

TINY = parse_rubric(RUBRIC)


def row(index: int, *, ok: bool = True, shard: str = "a.tar") -> ScoreRow:
    return ScoreRow(
        shard=shard,
        index=index,
        key=f"k{index}",
        prompt="a cat",
        group="g",
        status=Status.OK if ok else Status.BAD_IMAGE,
        error=None if ok else "broken",
        width=8 if ok else None,
        height=9 if ok else None,
        sha256="ab" if ok else None,
        scores=level_scores(index, 2, 3) if ok else None,
    )


def write(path, tables, metadata=None, **options):
    with path.open("wb") as stream, TableWriter(stream, score_schema(TINY.names, 3), **options) as writer:
        for table in tables:
            writer.write(table)
        writer.close(metadata or {"a": 1})


def test_schema_is_the_documented_one():
    schema = score_schema(("alignment",), 9)
    assert [(f.name, str(f.type)) for f in schema] == [
        ("shard", "dictionary<values=string, indices=int32, ordered=0>"),
        ("index", "int32"),
        ("key", "string"),
        ("prompt", "string"),
        ("group", "string"),
        ("status", "dictionary<values=string, indices=int8, ordered=0>"),
        ("error", "string"),
        ("width", "int32"),
        ("height", "int32"),
        ("sha256", "string"),
        ("overall", "float"),
        ("alignment", "float"),
        ("alignment_std", "float"),
        ("alignment_entropy", "float"),
        ("alignment_probs", "fixed_size_list<item: float>[9]"),
    ]


def test_rows_become_columns_and_failures_nulls():
    rows = [row(0), row(1, ok=False)]
    table = rows_to_table(rows, TINY)
    scores = rows[0].scores
    assert table["left"].to_pylist() == [pytest.approx(scores.mean_D[0]), None]
    assert table["right_probs"].to_pylist()[0] == pytest.approx(scores.probs_DK[1].tolist())
    assert table["right_probs"].to_pylist()[1] is None
    assert table["overall"].to_pylist()[0] == pytest.approx(float(scores.mean_D.mean()))
    assert table["status"].to_pylist() == ["ok", "bad_image"]
    assert table["error"].to_pylist() == [None, "broken"]


def test_four_readers_see_the_same_rows_without_a_schema_hint(tmp_path):
    path = tmp_path / "s.parquet"
    rows = [row(i, ok=i % 3 != 0) for i in range(10)]
    write(path, [rows_to_table(rows, TINY)])
    arrow = pq.read_table(path)
    polars, pandas = pl.read_parquet(path), pd.read_parquet(path)
    duck = duckdb.sql(f"select status, left_probs[1] from '{path}' order by index").fetchall()
    wanted = [str(r.status) for r in rows]
    assert arrow["status"].to_pylist() == polars["status"].cast(str).to_list() == list(pandas["status"]) == wanted
    assert [status for status, _ in duck] == wanted
    first = [None if r.scores is None else float(r.scores.probs_DK[0, 0]) for r in rows]
    assert [probability for _, probability in duck] == first
    assert polars["left_probs"].dtype == pl.Array(pl.Float32, 3)
    assert [None if v is None else float(v[0]) for v in polars["left_probs"].to_list()] == first
    probabilities = np.stack([v for v in pandas["right_probs"] if v is not None])
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-6)


def test_many_small_tables_become_few_row_groups_in_order(tmp_path):
    path = tmp_path / "s.parquet"
    write(path, [rows_to_table([row(i, shard=f"{i % 3}.tar")], TINY) for i in range(25)], group_rows=10)
    assert pq.read_metadata(path).num_row_groups == 3
    table = pq.read_table(path)
    assert table["index"].to_pylist() == list(range(25))
    assert table["shard"].to_pylist() == [f"{i % 3}.tar" for i in range(25)]


def test_no_rows_still_make_a_readable_file(tmp_path):
    write(tmp_path / "s.parquet", [])
    assert pl.read_parquet(tmp_path / "s.parquet").height == 0
    assert list(batches(str(tmp_path / "s.parquet"))) == []


def test_metadata_survives_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "s.parquet"
    write(path, [rows_to_table([row(0)], TINY)], {"rubric": {"name": "tiny ünï"}})
    assert read_metadata(str(path), "s") == {"rubric": {"name": "tiny ünï"}}
    other = tmp_path / "o.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(TableError, match="o has no zscore metadata"):
        read_metadata(str(other), "o")
    other.write_bytes(b"PAR1 not at all")
    with pytest.raises(TableError, match="o can't be read as parquet"):
        read_metadata(str(other), "o")


def test_a_writer_without_close_leaves_no_metadata(tmp_path):
    stream = io.BytesIO()
    with pytest.raises(RuntimeError), TableWriter(stream, score_schema(TINY.names, 3)) as writer:
        writer.write(rows_to_table([row(0)], TINY))
        raise RuntimeError
    assert b'"counts"' not in stream.getvalue()


def test_rare_text_survives(tmp_path):
    path = tmp_path / "s.parquet"
    text = 'nul \0, quote ", newline \n, 🦊, ' + "x" * 100_000
    odd = ScoreRow("š.tar", 0, text, text, "g", Status.BAD_TEXT, text, None, None, None, None)
    write(path, [rows_to_table([odd], TINY)], {"text": text})
    assert pq.read_table(path)["prompt"].to_pylist() == [text]
    assert json.loads(pq.read_metadata(path).metadata[b"zscore"])["text"] == text


def test_long_prompts_leave_memory_early(tmp_path, monkeypatch):
    monkeypatch.setattr("zscore.parquet.BYTES_PER_GROUP", 100_000)
    long = [
        ScoreRow("a.tar", n, "k", "x" * 30_000, "g", Status.BAD_TEXT, "e", None, None, None, None) for n in range(9)
    ]
    write(tmp_path / "s.parquet", [rows_to_table([entry], TINY) for entry in long])
    assert pq.read_metadata(tmp_path / "s.parquet").num_row_groups == 3
    assert pq.read_table(tmp_path / "s.parquet")["index"].to_pylist() == list(range(9))
