"""Opening scored tables: what is taken, in which order, what is refused; and writing new ones."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.scores_factory import (
    metadata_in,
    metadata_of,
    random_rows,
    read_rows,
    rewrite,
    row,
    two,
    write_parts,
    write_scores,
    zscore,
)
from zscore.errors import OutputError, TableError, UsageError
from zscore.table_output import check_targets, derived, fetch, sink, written
from zscore.tables import ROW, Scores, known, open_scores


def keys(scores: Scores) -> list[str]:
    return fetch(scores.frame.select("key"), scores.name)["key"].to_list()


def shard_rows(name: str, count: int, **fields):
    return [row(index, shard=name, key=f"{name}-{index}", **fields) for index in range(count)]


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


class TestOpen:
    def test_a_file(self, tmp_path: Path) -> None:
        rows = random_rows(rows=30)
        scores = open_scores(str(write_scores(tmp_path / "scores.parquet", rows, extra={"reasoning": ["why"] * 30})))
        assert keys(scores) == [made.key for made in rows]
        assert scores.dimensions == ("alignment", "realism", "aesthetics", "plausibility")
        assert scores.values == tuple(1 + k / 2 for k in range(9))
        assert scores.schema["reasoning"] == pl.String
        assert scores.name == str(tmp_path / "scores.parquet")

    def test_a_file_url(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "scores.parquet", [row()])
        assert keys(open_scores(f"file://{path}")) == ["k00000"]

    def test_a_folder_is_read_in_the_order_of_its_shards(self, tmp_path: Path) -> None:
        # By file name the parts would stand as a/y, b/x, c/a; names that hold braces and brackets are names.
        names = ["b/x.tar", "a/y.tar", "c/[a].tar"]
        folder = write_parts(tmp_path / "parts", [made for name in names for made in shard_rows(name, 2)])
        assert sorted(path.name[0] for path in folder.glob("*.parquet")) == ["a", "b", "c"]
        (folder / ".hidden.parquet").write_bytes(b"half a file")
        (folder / "_temporary").mkdir()
        (folder / "_temporary" / "part.parquet").write_bytes(b"half a file")
        scores = open_scores(str(folder))
        assert keys(scores) == [f"{name}-{i}" for name in sorted(names) for i in range(2)]
        assert "part" not in scores.metadata
        assert scores.metadata["shards"] == 3
        assert "2 more" in scores.name

    def test_many_parts(self, tmp_path: Path) -> None:
        names = [f"{n:03d}.tar" for n in range(40)]
        folder = write_parts(tmp_path / "parts", [made for name in names for made in shard_rows(name, 1)])
        assert keys(open_scores(str(folder))) == [f"{name}-0" for name in names]

    def test_a_glob_and_several_arguments(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            write_scores(tmp_path / f"{name}.parquet", shard_rows(name, 1))
        found = open_scores(str(tmp_path / "[bc].parquet"), str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"))
        assert keys(found) == ["b-0", "c-0", "a-0"]  # the order of the arguments, each file once

    def test_a_file_in_several_spellings_is_read_once(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = write_scores(tmp_path / "s.parquet", [row(0), row(1)])
        (tmp_path / "soft.parquet").symlink_to(path)
        (tmp_path / "x").mkdir()
        spellings = ["s.parquet", "./s.parquet", "x/../s.parquet", str(path), f"file://{path}", "soft.parquet", "."]
        found = open_scores(*spellings)
        assert (found.files, found.rows, keys(found)) == (("s.parquet",), 2, ["k00000", "k00001"])

    def test_a_name_with_glob_characters_is_taken_as_it_stands(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s[1]*.parquet", [row()])
        assert keys(open_scores(str(path))) == ["k00000"]

    def test_counts_and_times_of_several_files_are_merged(self, tmp_path: Path) -> None:
        one = write_scores(tmp_path / "1.parquet", [row(0), row(1, status="bad_image")], finished="2026-01-02")
        other = write_scores(tmp_path / "2.parquet", [row(0)], created="2025-12-31")
        metadata = open_scores(str(one), str(other)).metadata
        assert metadata["counts"] == {"ok": 2, "bad_image": 1}
        assert (metadata["created"], metadata["finished"]) == ("2025-12-31", "2026-01-02")
        assert metadata["rubric"]["name"] == "z-reward"

    def test_engines_may_differ(self, tmp_path: Path) -> None:
        one = write_scores(tmp_path / "1.parquet", [row(0)])
        other = write_scores(tmp_path / "2.parquet", [row(0)], engine={"name": "vllm"})
        metadata = open_scores(str(one), str(other)).metadata
        assert [engine["name"] for engine in metadata["mixed_engine"]] == ["transformers", "vllm"]
        assert metadata["model"]["id"] == "made-up"


class TestRemote:
    @pytest.fixture
    def urls(self, tmp_path: Path, memory) -> list[str]:
        for n in range(2):
            path = write_scores(tmp_path / f"{n}.parquet", shard_rows(f"{n}.tar", 70, means=[3 + n, 3, 3, 3]))
            memory.pipe(f"/scores/{n}.parquet", path.read_bytes())
        return [f"memory://scores/{n}.parquet" for n in range(2)]

    @pytest.mark.parametrize("source", ["memory://scores", "memory://scores/", "memory://scores/*.parquet"])
    def test_folders_and_globs(self, urls: list[str], source: str) -> None:
        assert keys(open_scores(source)) == [f"{n}.tar-{i}" for n in range(2) for i in range(70)]

    def test_queries_say_the_same_as_on_local_files(self, urls: list[str], tmp_path: Path) -> None:
        local = open_scores(str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet"))
        remote = open_scores(*urls)
        for ask in (
            lambda frame: frame.filter(pl.col("overall") > 3.1).select("key", "alignment_probs", "overall"),
            lambda frame: frame.head(3).select("key"),
            lambda frame: frame.slice(65, 10).select("index"),
            lambda frame: frame.with_row_index("n").filter(pl.col("n") % 7 == 0).select("n", "key"),
            lambda frame: frame.select(pl.len(), pl.col("overall").mean()),
        ):
            expected, found = (fetch(ask(scores.frame), "") for scores in (local, remote))
            assert found.rows() == expected.rows()

    def test_several_row_groups(self, memory, tmp_path: Path) -> None:
        table = pq.read_table(write_scores(tmp_path / "s.parquet", shard_rows("a", 50)))
        rewrite(table, tmp_path / "groups.parquet", row_group_size=7)
        memory.pipe("/s.parquet", (tmp_path / "groups.parquet").read_bytes())
        scores = open_scores("memory://s.parquet")
        assert keys(scores) == [f"a-{i}" for i in range(50)]
        assert fetch(scores.frame.head(9).select("index"), "")["index"].to_list() == list(range(9))

    def test_what_is_not_there(self, memory) -> None:
        with pytest.raises(TableError, match=r"memory://nope\.parquet"):
            open_scores("memory://nope.parquet")
        with pytest.raises(TableError, match=r"no \.parquet file at memory://nope"):
            open_scores("memory://nope")

    def test_an_unknown_protocol(self) -> None:
        with pytest.raises(UsageError, match="nosuch://"):
            open_scores("nosuch://bucket/scores.parquet")


class TestRefused:
    def test_a_missing_file_names_the_nearest(self, tmp_path: Path) -> None:
        write_scores(tmp_path / "scores.parquet", [row()])
        with pytest.raises(TableError, match=r"there is no .*score\.parquet: did you mean .*scores\.parquet\?"):
            open_scores(str(tmp_path / "score.parquet"))

    def test_a_missing_file_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="zscore score SHARDS --out scores.parquet"):
            open_scores(str(tmp_path / "nowhere" / "scores.parquet"))

    def test_an_unfinished_run(self, tmp_path: Path) -> None:
        (tmp_path / "scores.parquet.parts").mkdir()
        with pytest.raises(TableError, match="isn't finished: run the `zscore score` command again"):
            open_scores(str(tmp_path / "scores.parquet"))

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match=r"holds no \.parquet file"):
            open_scores(str(tmp_path))

    def test_what_is_not_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.parquet"
        for content in (b"", b"key,overall\na,1\n", b"PAR1"):
            path.write_bytes(content)
            with pytest.raises(TableError, match=r"scores\.parquet can't be read as parquet"):
                open_scores(str(path))

    def test_parquet_that_zscore_did_not_write(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.parquet"
        pl.DataFrame({"key": ["a"], "overall": [1.0]}).write_parquet(path)
        with pytest.raises(TableError, match="has no zscore metadata"):
            open_scores(str(path))

    def test_metadata_without_a_rubric(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.parquet"
        pl.DataFrame({"key": ["a"]}).write_parquet(path, metadata={"zscore": "{}"})
        with pytest.raises(TableError, match="has no rubric"):
            open_scores(str(path))

    def test_a_folder_named_like_a_file_that_can_not_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "parts" / "x.parquet").mkdir(parents=True)
        with pytest.raises(TableError, match=r"can't read .*x\.parquet"):
            open_scores(str(tmp_path / "parts"))

    @pytest.mark.parametrize(
        ("column", "values", "wanted"),
        [
            ("overall", ["3"], "a float"),
            ("realism", [3], "a float"),
            ("realism_std", ["x"], "a float"),
            ("realism_probs", [0.5], "a list of floats"),
            ("realism_probs", [["a"]], "a list of floats"),
            ("status", [1], "text"),
            ("key", [b"k"], "text"),
            ("index", ["0"], "an integer"),
        ],
    )
    def test_columns_of_another_type(self, tmp_path: Path, column: str, values: list, wanted: str) -> None:
        table = pq.read_table(write_scores(tmp_path / "s.parquet", [row()]))
        place = table.schema.get_field_index(column)
        rewrite(table.set_column(place, column, pa.array(values)), tmp_path / "wrong.parquet")
        with pytest.raises(TableError, match=rf"wrong\.parquet: the column '{column}' is .*, not {wanted}"):
            open_scores(str(tmp_path / "wrong.parquet"))

    def test_a_table_without_what_a_command_needs(self, tmp_path: Path) -> None:
        table = pq.read_table(write_scores(tmp_path / "s.parquet", [row()])).drop_columns(["status"])
        rewrite(table, tmp_path / "less.parquet")
        with pytest.raises(TableError, match=r"less\.parquet has no column 'status'.*--columns"):
            open_scores(str(tmp_path / "less.parquet")).require("key", "status")

    def test_a_file_that_breaks_off_in_the_middle(self, tmp_path: Path) -> None:
        path = write_scores(tmp_path / "s.parquet", random_rows(rows=500))
        data = bytearray(path.read_bytes())
        for place in range(200, len(data) * 2 // 3):
            data[place] ^= 0x5A
        path.write_bytes(data)
        scores = open_scores(str(path))
        with pytest.raises(TableError, match=r"can't read .*s\.parquet: ") as raised:
            fetch(scores.frame, scores.name)
        assert "\n" not in str(raised.value)

    def test_unknown_names_lead_to_the_nearest(self, tmp_path: Path) -> None:
        scores = open_scores(str(write_scores(tmp_path / "s.parquet", [row()])))
        assert scores.check_score("overall", "--min") == "overall"
        with pytest.raises(UsageError, match=r"--min: there is no dimension 'realsim': did you mean 'realism'\?"):
            scores.check_score("realsim", "--min")
        with pytest.raises(UsageError, match="there is no dimension 'overall'"):
            scores.check_score("overall", "--prob", overall=False)
        with pytest.raises(UsageError, match=r"--by: there is no column 'promt': did you mean 'prompt'\?"):
            scores.check_column("promt", "--by")
        with pytest.raises(UsageError, match="there are a, b"):
            known("xyz", ["a", "b"], "--min")


class TestMixed:
    DIFFERENT = (
        (
            "model",
            {"id": "another", "weights": "f" * 64},
            "model 'made-up', weights 0{12} and 'another', weights f{12}",
        ),
        ("layout", "separate", "layout 'joint' and 'separate'"),
        ("template", "2" * 64, "template '1{12}' and '2{12}'"),
        ("max_pixels", 1, "max_pixels '1048576' and '1'"),
    )

    @pytest.mark.parametrize(("field", "value", "shown"), DIFFERENT)
    def test_files_that_were_scored_differently_are_named(self, tmp_path: Path, field, value, shown: str) -> None:
        one = write_scores(tmp_path / "one.parquet", [row(0)])
        same = write_scores(tmp_path / "same.parquet", [row(1)])
        other = write_scores(tmp_path / "other.parquet", [row(2)], **{field: value})
        with pytest.raises(TableError, match=rf"one\.parquet and .*other\.parquet weren't scored alike: {shown};"):
            open_scores(str(one), str(same), str(other))
        scores = open_scores(str(one), str(other), allow_mixed=True)
        assert keys(scores) == ["k00000", "k00002"]
        assert len(scores.metadata[f"mixed_{field}"]) == 2

    def test_a_model_that_only_moved_is_the_same(self, tmp_path: Path) -> None:
        one = write_scores(tmp_path / "one.parquet", [row(0)])
        other = write_scores(tmp_path / "other.parquet", [row(1)], model={"id": "/elsewhere", "weights": "0" * 64})
        assert keys(open_scores(str(one), str(other))) == ["k00000", "k00001"]

    def test_rubrics_share_what_they_have_in_common(self, tmp_path: Path) -> None:
        one = write_scores(tmp_path / "one.parquet", [row(0)])
        other = write_scores(tmp_path / "other.parquet", [row(1, rubric=two())], two())
        with pytest.raises(
            TableError, match=r"weren't scored alike: rubric 'z-reward', hash \w{12} and 'two', hash \w{12};"
        ):
            open_scores(str(one), str(other))
        scores = open_scores(str(one), str(other), allow_mixed=True)
        assert scores.dimensions == ()
        assert scores.values == ()
        found = fetch(scores.frame.select("overall", "left", "realism", "left_probs"), scores.name)
        assert found.rows() == [(3.0, None, 3.0, None), (3.0, 3.0, None, [0.0, 0.5, 0.5])]

    def test_the_same_dimensions_on_other_levels(self, tmp_path: Path) -> None:
        metadata = metadata_of([], two())
        metadata["rubric"] |= {"hash": "another", "levels": [{"token": "1", "value": 1.0}]}
        one = write_scores(tmp_path / "one.parquet", [row(0, rubric=two())], two())
        other = rewrite(pq.read_table(one), tmp_path / "other.parquet", metadata)
        scores = open_scores(str(one), str(other), allow_mixed=True)
        assert scores.dimensions == ("left", "right")
        assert scores.values == ()

    def test_a_table_beside_its_own_source_is_refused(self, tmp_path: Path) -> None:
        folder = write_parts(tmp_path / "parts", random_rows(rows=20))
        assert zscore("filter", folder, "--out", tmp_path / "kept.parquet", "--quiet") == 0
        (tmp_path / "kept.parquet").rename(folder / "kept.parquet")
        with pytest.raises(TableError, match="was made by zscore score, .* was made by zscore filter;"):
            open_scores(str(folder))


class TestMetadata:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"rubric": "z-reward"}, "has no rubric in its metadata"),
            ({"rubric": {}}, r"its metadata's rubric\.dimensions isn't a list of names"),
            ({"rubric": {"dimensions": "abc", "levels": []}}, "dimensions isn't a list of names"),
            ({"rubric": {"dimensions": [1], "levels": []}}, "dimensions isn't a list of names"),
            ({"rubric": {"dimensions": []}}, r"rubric\.levels isn't a list of levels with a value each"),
            ({"rubric": {"dimensions": [], "levels": [{"token": "1"}]}}, "levels isn't a list of levels"),
            ({"rubric": {"dimensions": [], "levels": [{"value": "1"}]}}, "levels isn't a list of levels"),
            ({"rubric": {"dimensions": [], "levels": [{"value": math.nan}]}}, "levels isn't a list of levels"),
            ({"rubric": {"dimensions": [], "levels": [1.0, 2.0]}}, "levels isn't a list of levels"),
            ({"derived": ["x"]}, "its metadata's derived isn't a list of objects"),
            ({"derived": None}, "derived isn't a list of objects"),
            ({"counts": ["ok"]}, "counts isn't numbers by status"),
            ({"counts": {"ok": "many"}}, "counts isn't numbers by status"),
            ({"shards": None}, "shards isn't a number"),
            ({"created": 5}, "created isn't a text"),
            ({"finished": None}, "finished isn't a text"),
            ({"part": {"shard": "s"}}, "part isn't an object that names its shard"),
        ],
    )
    @pytest.mark.parametrize("command", ["show", "report"])
    def test_what_zscore_doesnt_write_is_told_in_one_line(
        self, tmp_path: Path, monkeypatch, capsys, changes, said: str, command: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = write_scores(tmp_path / "s.parquet", [row(0)])
        rewrite(pq.read_table(path), path, {**metadata_in(path), **changes})
        assert zscore(command, path) == 1
        shown = capsys.readouterr()
        assert re.search(said, shown.err)
        assert shown.err.startswith(f"zscore: {path}")
        assert shown.err.endswith("it isn't a scores table\n")
        assert (shown.err.count("\n"), shown.out) == (1, "")

    @pytest.mark.parametrize("text", ['["x"]', '"x"', "5", "null", "{", "", b"\xff\xfe{}"])
    @pytest.mark.parametrize("command", ["show", "report"])
    def test_metadata_that_is_no_object(self, tmp_path: Path, monkeypatch, capsys, text, command: str) -> None:
        monkeypatch.chdir(tmp_path)
        table = pq.read_table(write_scores(tmp_path / "s.parquet", [row(0)]))
        pq.write_table(table.replace_schema_metadata({"zscore": text}), tmp_path / "s.parquet")
        assert zscore(command, "s.parquet") == 1
        shown = capsys.readouterr().err
        assert shown.startswith("zscore: s.parquet has zscore metadata that isn't")
        assert shown.endswith("it isn't a scores table\n")

    def test_what_is_only_shown_may_be_missing(self, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        path = write_scores(tmp_path / "s.parquet", [row(0)])
        whole = metadata_in(path)["rubric"]
        bare = {"rubric": {"dimensions": whole["dimensions"], "levels": whole["levels"]}}
        for metadata in (bare, {**bare, "model": "x", "engine": 5, "options": None, "template": None}):
            rewrite(pq.read_table(path), path, metadata)
            for command in ("show", "report"):
                assert zscore(command, path) == 0
            assert capsys.readouterr().err == ""

    def test_files_that_differ_are_mixed(self, tmp_path: Path) -> None:
        one = write_scores(tmp_path / "1.parquet", [row(0)])
        same = write_scores(tmp_path / "2.parquet", [row(1)], options={"image_keys": "png"})
        other = write_scores(tmp_path / "3.parquet", [row(2)], layout="separate")
        step = write_scores(tmp_path / "4.parquet", [row(3)], derived=[{"command": "filter", "criteria": {}}])
        assert not open_scores(str(one), str(same), allow_mixed=True).mixed
        assert not open_scores(str(other), allow_mixed=True).mixed
        assert open_scores(str(one), str(other), allow_mixed=True).mixed
        assert open_scores(str(one), str(step), allow_mixed=True).mixed


class TestOutput:
    def test_files_appear_together_or_not_at_all(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        one.write_text("before")
        with pytest.raises(KeyError), written(str(one), None, str(other)) as (first, second, third):
            assert first is not None
            assert third is not None
            assert second is None
            first.write(b"half")
            third.write(b"half")
            raise KeyError
        assert one.read_text() == "before"
        assert [path.name for path in tmp_path.iterdir()] == ["one"]

    def test_columns_order_and_metadata_survive(self, tmp_path: Path) -> None:
        rows = random_rows(rows=300)
        path = write_scores(tmp_path / "s.parquet", rows, extra={"reasoning": [f"r{n}" for n in range(300)]})
        scores = open_scores(str(path))
        with written(str(tmp_path / "out.parquet")) as (stream,):
            assert stream is not None
            sink(scores.frame, stream, derived(scores.metadata, "copy", {"all": True}, {"rows": 300}), scores.name)
        assert read_rows(tmp_path / "out.parquet") == read_rows(path)
        metadata = metadata_in(tmp_path / "out.parquet")
        assert metadata.pop("derived") == [{"command": "copy", "criteria": {"all": True}, "counts": {"rows": 300}}]
        assert metadata == metadata_in(path)
        again = open_scores(str(tmp_path / "out.parquet"))
        assert derived(again.metadata, "filter", {}, {})["derived"][1]["command"] == "filter"

    @pytest.mark.parametrize("reader", ["duckdb", "pandas"])
    def test_others_read_what_is_written(self, tmp_path: Path, reader: str) -> None:
        scores = open_scores(str(write_scores(tmp_path / "s.parquet", random_rows(rows=30))))
        out = tmp_path / "out.parquet"
        with written(str(out)) as (stream,):
            assert stream is not None
            sink(scores.frame, stream, scores.metadata, scores.name)
        expected = [made["shard"] for made in read_rows(out)]
        if reader == "duckdb":
            import duckdb

            found = duckdb.sql(f"select shard, alignment_probs from '{out}'").fetchall()
            assert [shard for shard, _ in found] == expected
        else:
            import pandas as pd

            assert pd.read_parquet(out)["shard"].tolist() == expected

    def test_targets_are_checked_first(self, tmp_path: Path) -> None:
        source = write_scores(tmp_path / "s.parquet", [row()])
        (tmp_path / "soft.parquet").symlink_to(source)
        os.link(source, tmp_path / "hard.parquet")
        for name in ("s.parquet", "soft.parquet", "hard.parquet", "x/../s.parquet"):
            with pytest.raises(UsageError, match="is the table that is read"):
                check_targets([str(source)], {"--out": str(tmp_path / name)})
        with pytest.raises(UsageError, match="is a folder"):
            check_targets([], {"--out": str(tmp_path)})
        with pytest.raises(UsageError, match="--npy and --out name the same file"):
            check_targets([], {"--out": str(tmp_path / "a"), "--dropped": None, "--npy": str(tmp_path / "b/../a")})
        with pytest.raises(UsageError, match="is the table that is read"):
            check_targets(["s3://b/s.parquet"], {"--out": "s3://b/s.parquet"})
        with pytest.raises(UsageError, match=r"--out s3://b/2\.tar is the shard s3://b/2\.tar that is read"):
            check_targets([], {"--out": "s3://b/2.tar"}, shards=["s3://b/1.tar", "s3://b/2.tar"])
        with pytest.raises(UsageError, match=r"--out .*soft\.parquet is the shard .*s\.parquet that is read"):
            check_targets([], {"--out": str(tmp_path / "soft.parquet")}, shards=[str(source)])
        check_targets([], {"--out": str(tmp_path / "new.tar")}, shards=[str(source), "s3://b/new.tar"])
        check_targets([str(source)], {"--out": str(tmp_path / "new"), "--dropped": "s3://b/new"})

    @pytest.mark.parametrize(
        ("source", "target", "is_refused"),
        [
            ("parts", "parts/kept.parquet", True),
            ("./parts/", "parts/deeper/kept.parquet", True),
            ("link", "parts/kept.parquet", True),
            ("parts", "link/kept.parquet", True),
            (".", "kept.parquet", True),
            ("parts/*.parquet", "parts/kept.parquet", True),
            ("*/*.parquet", "parts/kept.parquet", True),
            ("**/*.parquet", "parts/deeper/kept.parquet", True),
            ("parts", "file://{here}/parts/kept.parquet", True),
            ("s3://b/parts", "s3://b/parts/kept.parquet", True),
            ("s3://b/parts/", "s3://b/parts/deeper/kept.parquet", True),
            ("s3://b/parts/*.parquet", "s3://b/parts/kept.parquet", True),
            ("parts", "kept.parquet", False),
            ("parts", "parts-kept.parquet", False),
            ("parts", "parts/_kept.parquet", False),
            ("parts", "parts/kept.npy", False),
            ("parts/*.parquet", "kept.parquet", False),
            ("parts/*.parquet", "parts/deeper/kept.parquet", False),
            ("parts/s-*.parquet", "parts/kept.parquet", False),
            ("parts", "s3://b/parts/kept.parquet", False),
            ("s3://b/parts", "s3://b/parts-kept.parquet", False),
            ("s3://b/parts", "parts/kept.parquet", False),
            ("s3://b/s.parquet", "s3://b/kept.parquet", False),
        ],
    )
    def test_an_output_that_would_become_an_input(
        self, tmp_path: Path, monkeypatch, source: str, target: str, is_refused: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_scores(tmp_path / "parts/s-0.parquet", [row()])
        (tmp_path / "link").symlink_to("parts")
        target = target.format(here=tmp_path)
        if is_refused:
            with pytest.raises(UsageError, match="from then on"):
                check_targets([], {"--out": None, "--dropped": target}, [source])
        else:
            check_targets([], {"--out": None, "--dropped": target}, [source])

    @pytest.mark.parametrize("command", ["filter", "select"])
    @pytest.mark.parametrize("source", ["parts", "parts/*.parquet"])
    def test_a_folder_can_be_read_again(self, tmp_path: Path, monkeypatch, capsys, command: str, source: str) -> None:
        monkeypatch.chdir(tmp_path)
        write_scores(tmp_path / "parts/s-0.parquet", [row()])
        inside = {"filter": ["--out", "--dropped"], "select": ["--out", "--stats", "--pairs"]}[command]
        for option in inside:
            assert zscore(command, source, option, "parts/new.parquet") == 2
            said = f"zscore: {option} parts/new.parquet would be read as a part of {source} from then on: write it"
            assert said in capsys.readouterr().err
        assert zscore(command, source, "--out", "new.parquet") == 0

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path: Path) -> None:
        write_scores(tmp_path / "scores.parquet", random_rows(rows=3000))
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "from zscore.cli import main; main()"
        )
        call = [sys.executable, "-c", code, "filter", "--out", "kept.parquet"]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("zscore: can't write kept.parquet")
        assert done.stderr.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]

    def test_a_folder_that_can_not_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="can't write"), written(str(tmp_path / "file" / "out.parquet")):
            pass


@pytest.mark.parametrize("kind", ["file", "parts", "mixed", "remote", "without index"])
def test_rows_by_mask_keep_their_order(tmp_path: Path, memory, kind: str) -> None:
    made = random_rows(rows=200)
    path = write_scores(tmp_path / "s.parquet", made)
    source: tuple[str, ...] = (str(path),)
    if kind == "parts":
        source = (str(write_parts(tmp_path / "parts", made)),)
    if kind == "mixed":
        source = (str(path), str(write_scores(tmp_path / "o.parquet", made, extra={"more": list(range(200))})))
    if kind == "remote":
        memory.pipe("/s.parquet", path.read_bytes())
        source = ("memory://s.parquet",)
    if kind == "without index":
        source = (str(rewrite(pq.read_table(path).drop_columns(["index"]), tmp_path / "less.parquet")),)
    scores = open_scores(*source)
    mask = np.random.default_rng(0).random(scores.rows) < 0.4
    found = fetch(scores.where(mask).select(ROW, "key"), scores.name)
    everything = keys(scores)
    assert len(everything) == scores.rows == (400 if kind == "mixed" else 200)
    assert found.rows() == [(n, everything[n]) for n in np.flatnonzero(mask).tolist()]
    assert fetch(scores.where(~mask).select(pl.len()), "").item() == scores.rows - mask.sum()


def test_deciding_loads_no_model_library(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.parquet", random_rows(rows=20))
    calls = ["filter --min 3 --fraction 0.5", "select --pairs p", "show"]
    code = (
        "import sys; from zscore.cli import main\n"
        f"for call in {calls}:\n"
        "    sys.argv = ['zscore', *call.split()]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "vllm", "triton", "scipy", "PIL"} & set(done.stderr.split())
