"""The main job in this process, with the real reference engine on the demo student and real shards."""

from __future__ import annotations

import dataclasses
import shutil
import uuid

import fsspec
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.running import Watching, rows, run, shared_judge
from tests.tiny import sample_members, write_shards, write_tar
from zscore.errors import OutputLockedError, OutputMismatchError, ShardNotFoundError, UsageError
from zscore.judge import plan_judge
from zscore.parquet import read_metadata
from zscore.samples import ReadOptions
from zscore.store import open_store


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    with shared_judge(tmp_path_factory.mktemp("rubric")) as shared:
        yield shared


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    write_shards(folder, 4, 5, broken=frozenset({7}))
    return folder


@pytest.fixture(scope="module")
def whole(judge, shards, tmp_path_factory):
    """An uninterrupted run's file."""
    out = tmp_path_factory.mktemp("whole") / "scores.parquet"
    summary = run(judge, shards, out)
    assert dict(summary.counts) == {"ok": 19, "bad_image": 1}
    return out


def test_every_sample_is_a_row_in_order_with_proper_distributions(whole):
    frame = pl.read_parquet(whole)
    assert frame["key"].to_list() == [f"s{n:04d}" for n in range(20)]
    assert frame["shard"].cast(str).to_list() == [f"t-{n // 5:04d}.tar" for n in range(20)]
    assert frame["index"].to_list() == [n % 5 for n in range(20)]
    good = frame.filter(pl.col("status") == "ok")
    for name in ("left", "right"):
        probs = good[f"{name}_probs"].to_numpy().astype(np.float64)
        values = np.array([1.0, 2.0, 4.0])
        mean = probs @ values
        assert probs.sum(1) == pytest.approx(1, abs=1e-6)
        assert good[name].to_numpy() == pytest.approx(mean, abs=1e-5)
        assert good[f"{name}_std"].to_numpy() == pytest.approx(np.sqrt(probs @ values**2 - mean**2), abs=1e-4)
        assert good[f"{name}_entropy"].to_numpy() == pytest.approx(-(probs * np.log(probs)).sum(1), abs=1e-5)
    assert good["overall"].to_numpy() == pytest.approx((good["left"] + good["right"]).to_numpy() / 2, abs=1e-6)
    assert good["left"].n_unique() > 15  # the pictures differ, so do the scores


def test_a_broken_picture_is_a_row_with_its_reason(whole):
    (bad,) = [row for row in rows(whole) if row["status"] != "ok"]
    assert (bad["key"], bad["status"]) == ("s0007", "bad_image")
    assert bad["error"]
    assert "\n" not in bad["error"]
    assert bad["sha256"]
    assert all(bad[name] is None for name in ("overall", "left", "left_std", "left_entropy", "left_probs", "width"))


def test_metadata_says_how_the_scores_were_made(whole, judge):
    metadata = read_metadata(str(whole), "scores")
    assert metadata["rubric"]["name"] == "tiny"
    assert metadata["rubric"]["dimensions"] == ["left", "right"]
    assert [level["value"] for level in metadata["rubric"]["levels"]] == [1.0, 2.0, 4.0]
    assert metadata["layout"] == "joint"
    assert metadata["model"]["weights"].startswith("sha256:")
    assert metadata["engine"]["name"] == "transformers"
    assert metadata["engine"]["dtype"] == "float32"
    assert metadata["counts"] == {"ok": 19, "bad_image": 1}
    assert metadata["template"] == judge.builder.hash
    assert metadata["created"] < metadata["finished"]
    assert metadata["max_pixels"] == 4096


def test_the_same_command_again_does_nothing(judge, shards, whole):
    before, loads = whole.read_bytes(), judge.loads
    summary = run(judge, shards, whole)
    assert summary.already_done
    assert judge.loads == loads
    assert whole.read_bytes() == before
    assert [entry.name for entry in whole.parent.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_don_t_depend_on_the_workers(judge, shards, whole, tmp_path, workers):
    run(judge, shards, tmp_path / "s.parquet", workers=workers)
    assert rows(tmp_path / "s.parquet") == rows(whole)


@pytest.mark.parametrize("stop_after", [1, 6, 14, 19])
def test_an_interrupted_run_resumes_to_the_same_rows(judge, shards, whole, tmp_path, stop_after):
    out = tmp_path / "scores.parquet"

    def stop(reporter):
        if reporter.rows == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(judge, shards, out, Watching(stop))
    assert not out.exists()
    again = Watching()
    summary = run(judge, shards, out, again)
    assert again.rows == 20 - (stop_after - 1) // 5 * 5  # shards that were finished aren't scored again
    assert summary.rows == 20
    assert rows(out) == rows(whole)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_second_run_into_one_output_is_refused(judge, shards, tmp_path):
    out = tmp_path / "scores.parquet"
    seen = []

    def second(reporter):
        if reporter.rows == 1:
            with pytest.raises(OutputLockedError, match="another run is writing"):
                run(judge, shards, out)
            seen.append(True)

    run(judge, shards, out, Watching(second))
    assert seen
    assert pl.read_parquet(out).height == 20


def test_other_settings_are_refused_by_name(judge, shards, whole, tmp_path):
    out = tmp_path / "scores.parquet"
    shutil.copy(whole, out)
    with pytest.raises(OutputMismatchError, match=r"limit = None, this run has 3"):
        run(judge, shards, out, limit=3)
    with pytest.raises(OutputMismatchError, match="group_key"):
        run(judge, shards, out, read=ReadOptions(group_key="id"))
    run(judge, shards, out, limit=3, overwrite=True)
    assert pl.read_parquet(out).height == 3


def test_other_shards_are_refused(judge, whole, tmp_path):
    out = tmp_path / "scores.parquet"
    shutil.copy(whole, out)
    write_shards(tmp_path / "in", 1, 2)
    with pytest.raises(OutputMismatchError, match="4 then, 1 now"):
        run(judge, tmp_path / "in", out)


@pytest.mark.parametrize("limit", [1, 5, 7, 100])
def test_limit_counts_samples_over_shards_also_when_resumed(judge, shards, whole, tmp_path, limit):
    out = tmp_path / "scores.parquet"

    def stop(reporter):
        if reporter.rows == 6:
            raise KeyboardInterrupt

    if limit > 6:
        with pytest.raises(KeyboardInterrupt):
            run(judge, shards, out, Watching(stop), limit=limit)
    run(judge, shards, out, limit=limit)
    assert [row["key"] for row in rows(out)] == [row["key"] for row in rows(whole)][:limit]
    assert [row["status"] for row in rows(out)] == [row["status"] for row in rows(whole)][:limit]


def test_retry_scores_only_what_failed(judge, tmp_path):
    write_shards(tmp_path / "in", 3, 4, broken=frozenset({5}))
    out = tmp_path / "scores.parquet"
    run(judge, tmp_path / "in", out)
    before = rows(out)
    reporter = Watching()
    summary = run(judge, tmp_path / "in", out, reporter, retry_failed=True)
    assert (reporter.rows, summary.rows) == (1, 12)
    assert rows(out) == before
    good = run(judge, tmp_path / "in", out)
    assert good.already_done


def test_retry_takes_up_a_shard_that_was_cut_off(judge, tmp_path):
    folder = tmp_path / "in"
    write_shards(folder, 2, 4)
    data = (folder / "t-0001.tar").read_bytes()
    (folder / "t-0001.tar").write_bytes(data[: len(data) // 2])
    out = tmp_path / "scores.parquet"
    run(judge, folder, out)
    cut = rows(out)
    assert cut[-1]["status"] == "truncated_shard"
    assert cut[-1]["error"]
    (folder / "t-0001.tar").write_bytes(data)
    run(judge, folder, out, retry_failed=True)
    assert [(row["key"], row["status"]) for row in rows(out)] == [(f"s{n:04d}", "ok") for n in range(8)]


def test_retry_without_an_output_says_so(judge, shards, tmp_path):
    from zscore.errors import OutputError

    with pytest.raises(OutputError, match="there is no .* yet"):
        run(judge, shards, tmp_path / "scores.parquet", retry_failed=True)
    with pytest.raises(UsageError, match="one of the two"):
        run(judge, shards, tmp_path / "scores.parquet", retry_failed=True, overwrite=True)


def test_a_folder_gets_a_part_a_shard_and_resumes(judge, shards, whole, tmp_path):
    out = f"{tmp_path}/dir/"

    def stop(reporter):
        if reporter.rows == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(judge, shards, out, Watching(stop))
    assert len(list((tmp_path / "dir").glob("*.parquet"))) == 2
    run(judge, shards, out)
    parts = sorted((tmp_path / "dir").glob("*.parquet"))
    assert len(parts) == 4
    assert [row for part in parts for row in rows(part)] == rows(whole)
    assert read_metadata(str(parts[0]), "p")["rubric"]["name"] == "tiny"
    assert sorted(entry.name for entry in (tmp_path / "dir").iterdir() if not entry.name.endswith("parquet")) == [
        "run.json"
    ]


def test_an_fsspec_output_is_like_a_local_one(judge, shards, whole):
    url = f"memory://{uuid.uuid4().hex}/out/scores.parquet"

    def stop(reporter):
        if reporter.rows == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(judge, shards, url, Watching(stop))
    again = Watching()
    run(judge, shards, url, again)
    assert again.rows == 10
    with fsspec.open(url) as stream:
        assert pq.read_table(stream).to_pylist() == rows(whole)
    filesystem, path = fsspec.core.url_to_fs(url)
    assert [entry.rsplit("/", 1)[-1] for entry in filesystem.find(path.rsplit("/", 1)[0])] == ["scores.parquet"]
    assert run(judge, shards, url).already_done


def test_all_rows_failed_is_still_a_table(judge, tmp_path):
    write_tar(tmp_path / "in" / "a.tar", [*sample_members("a", 1, broken=True), ("b.txt", b"no picture")])
    summary = run(judge, tmp_path / "in", tmp_path / "s.parquet")
    assert dict(summary.counts) == {"bad_image": 1, "missing_image": 1}
    assert summary.failed_share == 1.0


def test_an_empty_shard_beside_a_full_one(judge, tmp_path):
    write_tar(tmp_path / "in" / "a.tar", [])
    write_tar(tmp_path / "in" / "b.tar", sample_members("b", 1))
    summary = run(judge, tmp_path / "in", tmp_path / "s.parquet")
    assert summary.rows == 1
    assert summary.shards == 2


def test_a_too_long_prompt_fails_alone(judge, tmp_path):
    members = sample_members("a", 1)
    long = [("b.png", members[0][1]), ("b.txt", b"word " * 20_000), ("c.png", members[0][1]), ("c.txt", b"ok")]
    write_tar(tmp_path / "in" / "a.tar", members + long)
    run(judge, tmp_path / "in", tmp_path / "s.parquet")
    assert [(row["key"], row["status"]) for row in rows(tmp_path / "s.parquet")] == [
        ("a", "ok"),
        ("b", "prompt_too_long"),
        ("c", "ok"),
    ]


def test_retrying_only_the_bad_shard_is_refused_and_loses_nothing(judge, tmp_path):
    write_shards(tmp_path / "in", 3, 2, broken=frozenset({3}))
    out = tmp_path / "scores.parquet"
    run(judge, tmp_path / "in", out)
    before = rows(out)
    with pytest.raises(OutputMismatchError, match="3 shards, and --retry-failed was given 1"):
        run(judge, tmp_path / "in" / "t-0001.tar", out, retry_failed=True)
    assert rows(out) == before


def test_retry_of_a_shard_that_was_rewritten_scores_it_anew(judge, tmp_path):
    write_shards(tmp_path / "in", 1, 4, broken=frozenset({1}))
    out = tmp_path / "scores.parquet"
    run(judge, tmp_path / "in", out)
    members = [member for n in range(3) for member in sample_members(f"new{n}", n)]
    write_tar(tmp_path / "in" / "t-0000.tar", members)
    run(judge, tmp_path / "in", out, retry_failed=True)
    assert [(row["key"], row["index"]) for row in rows(out)] == [("new0", 0), ("new1", 1), ("new2", 2)]


def test_an_interrupted_retry_survives_the_plain_command(judge, tmp_path):
    write_shards(tmp_path / "in", 3, 2, broken=frozenset({1, 5}))
    out = tmp_path / "scores.parquet"
    run(judge, tmp_path / "in", out)

    def stop(reporter):
        if reporter.rows == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(judge, tmp_path / "in", out, Watching(stop), retry_failed=True)
    assert run(judge, tmp_path / "in", out).already_done
    again = Watching()
    run(judge, tmp_path / "in", out, again, retry_failed=True)
    assert again.rows == 1
    assert len(rows(out)) == 6


def test_a_limit_holds_when_an_earlier_shard_has_changed(judge, tmp_path):
    folder = tmp_path / "in"
    write_shards(folder, 3, 3)
    out = tmp_path / "scores.parquet"

    def stop(reporter):
        if reporter.rows == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(judge, folder, out, Watching(stop), limit=8)
    write_tar(folder / "t-0000.tar", [member for n in range(5) for member in sample_members(f"n{n}", n)])
    run(judge, folder, out, limit=8)
    assert len(rows(out)) == 8


def test_exactly_the_allowed_share_of_failures_is_allowed(judge, tmp_path):
    write_shards(tmp_path / "in", 1, 20, broken=frozenset({7}))
    assert run(judge, tmp_path / "in", tmp_path / "s.parquet").failed_share == 0.05


def test_no_shard_is_an_error_before_anything_is_written(judge, tmp_path):
    with pytest.raises(ShardNotFoundError):
        run(judge, tmp_path / "none", tmp_path / "s.parquet")
    assert list(tmp_path.iterdir()) == []


def test_separate_and_joint_layouts_both_score(judge, shards, tmp_path):
    options = dataclasses.replace(judge.options, layout="separate")
    separate = plan_judge(options)
    assert any("trained in the joint layout" in notice for notice in separate.notices)
    run(separate, shards, tmp_path / "s.parquet", limit=3)
    frame = pl.read_parquet(tmp_path / "s.parquet")
    assert frame["status"].cast(str).to_list() == ["ok"] * 3
    assert frame["left_probs"].to_numpy().sum(1) == pytest.approx(1, abs=1e-6)
    assert (frame["left_probs"].to_numpy() != frame["right_probs"].to_numpy()).any()


def test_the_lock_is_free_after_a_run(judge, shards, tmp_path):
    run(judge, shards, tmp_path / "s.parquet", limit=1)
    with open_store(f"{tmp_path}/s.parquet.parts").lock("lock"):
        pass
