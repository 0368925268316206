from __future__ import annotations

import json

import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.test_parquet import TINY, row
from zscore.errors import OutputMismatchError
from zscore.output import Output
from zscore.parquet import read_metadata, rows_to_table
from zscore.records import ShardRef

SHARDS = [ShardRef(f"/in/{name}", name, 10, "v1") for name in ("b/one.tar", "a/one.tar", "ünï.tar.gz")]
PROVENANCE = {"engine": {"name": "fake"}, "created": "then", "version": "0"}


def output(tmp_path, out="scores.parquet", **settings):
    return Output(
        str(tmp_path / out) + ("/" if out.endswith("/") else ""), TINY, {"model": "m", **settings}, PROVENANCE
    )


def write_part(target, shard, rows):
    with target.part(shard) as part:
        if rows:
            part.write(rows_to_table(rows, TINY))
    return target.info(shard, part)


def fill(target, shards=SHARDS, samples=3):
    for shard in shards:
        write_part(target, shard, [row(i, ok=i != 1, shard=shard.name) for i in range(samples)])


def commit(target, shards=SHARDS):
    inputs = [[shard.name, shard.size, shard.version] for shard in shards]
    target.commit(shards, {**PROVENANCE, "inputs": inputs, "created": "then", "options": {"model": "m"}, "counts": {}})


def test_parts_become_one_file_in_shard_order_and_vanish(tmp_path):
    target = output(tmp_path)
    with target.locked(SHARDS):
        target.begin(SHARDS)
        fill(target, SHARDS[::-1])
        assert not (tmp_path / "scores.parquet").exists()
        commit(target)
    frame = pl.read_parquet(tmp_path / "scores.parquet")
    assert frame["shard"].cast(str).to_list() == [shard.name for shard in SHARDS for _ in range(3)]
    assert frame["index"].to_list() == [0, 1, 2] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.parquet"]


def test_same_named_shards_of_two_folders_have_parts_of_their_own(tmp_path):
    names = {output(tmp_path).part_name(shard) for shard in SHARDS}
    assert len(names) == 3
    assert all("/" not in name for name in names)


def test_finished_parts_are_kept_while_their_shard_is_the_same(tmp_path):
    target = output(tmp_path)
    target.begin(SHARDS)
    fill(target)
    again = output(tmp_path)
    again.begin(SHARDS)
    assert set(again.finished(SHARDS)) == {shard.name for shard in SHARDS}
    assert again.finished(SHARDS)["b/one.tar"].counts == {"ok": 2, "bad_image": 1}
    changed = [ShardRef(s.url, s.name, s.size, "v2" if n == 0 else s.version) for n, s in enumerate(SHARDS)]
    assert set(again.finished(changed)) == {"a/one.tar", "ünï.tar.gz"}
    grown = [ShardRef(s.url, s.name, 11 if n == 1 else s.size, s.version) for n, s in enumerate(SHARDS)]
    assert set(again.finished(grown)) == {"b/one.tar", "ünï.tar.gz"}


def test_other_settings_are_refused_with_the_field_and_both_values(tmp_path):
    output(tmp_path, layout="joint").begin(SHARDS)
    with pytest.raises(OutputMismatchError, match="layout = 'joint', this run has 'separate'.*--overwrite"):
        output(tmp_path, layout="separate").begin(SHARDS)
    with pytest.raises(OutputMismatchError, match="extra = None, this run has 1"):
        output(tmp_path, layout="joint", extra=1).begin(SHARDS)


def test_overwrite_drops_what_was_there(tmp_path):
    target = output(tmp_path, layout="joint")
    target.begin(SHARDS)
    fill(target)
    other = output(tmp_path, layout="separate")
    other.begin(SHARDS, overwrite=True)
    assert other.finished(SHARDS) == {}


def test_a_part_that_fails_half_way_doesn_t_appear(tmp_path):
    target = output(tmp_path)
    target.begin(SHARDS)
    with pytest.raises(RuntimeError), target.part(SHARDS[0]) as part:
        part.write(rows_to_table([row(0)], TINY))
        raise RuntimeError
    assert target.finished(SHARDS) == {}


def test_a_folder_keeps_its_parts_each_a_full_scores_file(tmp_path):
    target = output(tmp_path, "dir/")
    with target.locked(SHARDS):
        target.begin(SHARDS)
        fill(target)
        commit(target)
    parts = sorted((tmp_path / "dir").glob("*.parquet"))
    assert len(parts) == 3
    for part in parts:
        metadata = read_metadata(str(part), "p")
        assert metadata["engine"] == {"name": "fake"}
        assert metadata["counts"] == {"ok": 2, "bad_image": 1}
    assert pl.read_parquet(tmp_path / "dir" / "*.parquet").height == 9
    assert json.loads((tmp_path / "dir" / "run.json").read_text())["settings"] == {"model": "m"}


def test_retry_splits_a_finished_file_and_keeps_its_good_rows(tmp_path):
    first = output(tmp_path)
    first.begin(SHARDS)
    fill(first, SHARDS[:2])
    write_part(first, SHARDS[2], [row(0, shard=SHARDS[2].name)])
    commit(first)
    before = pq.read_table(tmp_path / "scores.parquet")

    retry = output(tmp_path)
    retry.begin_retry(SHARDS)
    kept = retry.finished(SHARDS, retry=True)
    assert set(kept) == {"ünï.tar.gz"}  # the only shard without a failure
    assert retry.kept_rows(SHARDS[0])["index"].to_pylist() == [0, 2]
    assert (tmp_path / "scores.parquet").exists()

    done = write_part(retry, SHARDS[0], [row(i, shard=SHARDS[0].name) for i in range(3)])
    assert done.counts == {"ok": 3}
    resumed = output(tmp_path)  # killed here: the next retry goes on
    resumed.begin_retry(SHARDS)
    assert set(resumed.finished(SHARDS, retry=True)) == {"ünï.tar.gz", "b/one.tar"}
    write_part(resumed, SHARDS[1], [row(i, ok=i != 1, shard=SHARDS[1].name) for i in range(3)])
    commit(resumed)
    after = pq.read_table(tmp_path / "scores.parquet")
    assert after.num_rows == before.num_rows
    assert after["status"].to_pylist() == ["ok", "ok", "ok", "ok", "bad_image", "ok", "ok"]
    untouched = after.filter([n == "ünï.tar.gz" for n in after["shard"].to_pylist()])
    assert untouched.to_pylist() == before.filter([n == "ünï.tar.gz" for n in before["shard"].to_pylist()]).to_pylist()


def test_an_empty_shard_has_a_part_without_rows(tmp_path):
    target = output(tmp_path)
    target.begin(SHARDS)
    info = write_part(target, SHARDS[0], [])
    assert (info.rows, info.counts) == (0, {})
    assert target.finished(SHARDS)["b/one.tar"].rows == 0


def test_a_retry_doesn_t_take_a_finished_runs_leftover_parts_for_its_own(tmp_path):
    first = output(tmp_path)
    first.begin(SHARDS)
    fill(first, SHARDS[:1])
    leftovers = {entry.name: entry.read_bytes() for entry in (tmp_path / "scores.parquet.parts").iterdir()}
    commit(first, SHARDS[:1])
    for name, data in leftovers.items():  # killed between the rename and the cleaning up
        (tmp_path / "scores.parquet.parts" / name).write_bytes(data)
    retry = output(tmp_path)
    retry.begin_retry(SHARDS[:1])
    assert retry.finished(SHARDS[:1], retry=True) == {}


def test_a_folder_is_retried_in_place(tmp_path):
    first = output(tmp_path, "dir/")
    first.begin(SHARDS)
    fill(first)
    retry = output(tmp_path, "dir/")
    retry.begin_retry(SHARDS)
    assert retry.finished(SHARDS, retry=True) == {}
    assert retry.kept_rows(SHARDS[0])["index"].to_pylist() == [0, 2]
    write_part(retry, SHARDS[0], [row(i, shard=SHARDS[0].name) for i in range(3)])
    assert set(retry.finished(SHARDS, retry=True)) == {"b/one.tar"}


def test_a_retry_of_some_shards_only_is_refused(tmp_path):
    first = output(tmp_path)
    first.begin(SHARDS)
    fill(first)
    commit(first)
    before = (tmp_path / "scores.parquet").read_bytes()
    with pytest.raises(OutputMismatchError, match="holds 3 shards, and --retry-failed was given 1"):
        output(tmp_path).begin_retry(SHARDS[:1])
    assert (tmp_path / "scores.parquet").read_bytes() == before


def test_rows_of_a_shard_that_changed_aren_t_kept(tmp_path):
    first = output(tmp_path)
    first.begin(SHARDS)
    fill(first)
    commit(first)
    changed = [ShardRef(s.url, s.name, s.size, "v2" if n == 0 else s.version) for n, s in enumerate(SHARDS)]
    retry = output(tmp_path)
    retry.begin_retry(changed)
    assert retry.kept_rows(changed[0]) is None
    assert retry.kept_rows(changed[1]) is not None


def test_overwrite_in_a_folder_leaves_what_isn_t_ours(tmp_path):
    target = output(tmp_path, "dir/")
    target.begin(SHARDS)
    fill(target)
    (tmp_path / "dir" / "mine.parquet").write_bytes(b"mine")
    output(tmp_path, "dir/").begin(SHARDS[:1], overwrite=True)
    left = {entry.name for entry in (tmp_path / "dir").iterdir()}
    assert left == {"mine.parquet", "run.json", target.part_name(SHARDS[1]), target.part_name(SHARDS[2])}


def test_two_machines_fill_one_folder(tmp_path):
    first, second = output(tmp_path, "dir/"), output(tmp_path, "dir/")
    with first.locked(SHARDS[:2]):
        first.begin(SHARDS[:2])
        with first.part(SHARDS[0]) as part:
            part.write(rows_to_table([row(0, shard=SHARDS[0].name)], TINY))
            with second.locked(SHARDS[2:]):
                second.begin(SHARDS[2:])
                fill(second, SHARDS[2:])
    assert len(list((tmp_path / "dir").glob("*.parquet"))) == 2


def test_another_shard_of_the_same_name_is_refused(tmp_path):
    target = output(tmp_path, "dir/")
    target.begin(SHARDS)
    fill(target, SHARDS[:1])
    other = ShardRef("/elsewhere/b/one.tar", SHARDS[0].name, 12, "v9")
    with pytest.raises(OutputMismatchError, match="rows of /in/b/one.tar under the name b/one.tar"):
        output(tmp_path, "dir/").finished([other])


def test_leftovers_of_a_kill_are_swept_by_the_next_run(tmp_path):
    target = output(tmp_path)
    parts = tmp_path / "scores.parquet.parts"
    parts.mkdir()
    for path in (tmp_path / ".scores.parquet.x.tmp", parts / f".{target.part_name(SHARDS[0])}.x.tmp"):
        path.touch()
    with target.locked(SHARDS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_run_file_is_refused(tmp_path):
    (tmp_path / "dir").mkdir()
    for content in ("{}", "[]", "no json", '{"settings": 1}'):
        (tmp_path / "dir" / "run.json").write_text(content)
        with pytest.raises(OutputMismatchError, match="isn't zscore's"):
            output(tmp_path, "dir/").begin(SHARDS)


def test_parts_of_another_dtype_are_refused(tmp_path):
    target = output(tmp_path)
    target.begin(SHARDS)
    target.check_engine({"name": "vllm", "version": "1", "dtype": "bfloat16"})
    again = output(tmp_path)
    again.begin(SHARDS)
    again.check_engine({"name": "vllm", "version": "2", "dtype": "bfloat16"})
    with pytest.raises(OutputMismatchError, match="engine dtype = 'bfloat16', this run has 'float32'"):
        again.check_engine({"name": "vllm", "version": "1", "dtype": "float32"})
