"""What goes wrong around a run: full disks, read-only folders, tars made to break readers."""

from __future__ import annotations

import contextlib
import os
import resource
import signal

import pytest

from tests.running import Watching, rows, run, shared_judge
from tests.tars import END, header, member
from tests.tiny import png, sample_members, write_shards, write_tar
from zscore.errors import OutputError


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    with shared_judge(tmp_path_factory.mktemp("rubric")) as shared:
        yield shared


@contextlib.contextmanager
def file_size_limit(size):
    """Stands for a full disk: writes over `size` fail with EFBIG, as they would with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def ordinary_user():
    """Root may write anywhere; for the block's time we are nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_full_disk_stops_the_run_and_loses_nothing(judge, tmp_path):
    write_shards(tmp_path / "in", 3, 3)
    out = tmp_path / "out" / "scores.parquet"
    whole = tmp_path / "whole.parquet"
    run(judge, tmp_path / "in", whole)

    def fill_up(reporter):
        if reporter.rows == 5:  # the first shard is finished by now
            limit.enter_context(file_size_limit(100))

    with contextlib.ExitStack() as limit:
        with pytest.raises(OutputError, match="can't write .*free some space; finished shards are kept"):
            run(judge, tmp_path / "in", out, Watching(fill_up), workers=0)
        assert not out.exists()
    again = Watching()
    run(judge, tmp_path / "in", out, again)
    assert again.rows == 6
    assert rows(out) == rows(whole)


def test_a_full_disk_at_the_last_step_keeps_every_part(judge, tmp_path):
    write_shards(tmp_path / "in", 2, 2)
    out = tmp_path / "scores.parquet"

    class FullAtTheEnd(Watching):
        def shard_done(self, shard):
            if shard.name == "t-0001.tar":
                limit.enter_context(file_size_limit(100))

    with contextlib.ExitStack() as limit, pytest.raises(OutputError, match="can't write"):
        run(judge, tmp_path / "in", out, FullAtTheEnd(), workers=0)
    again = Watching()
    run(judge, tmp_path / "in", out, again)
    assert (again.rows, len(rows(out))) == (0, 4)


def test_a_read_only_folder_is_refused_before_the_model_is_loaded(judge, tmp_path):
    write_shards(tmp_path / "in", 1, 1)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    loads = judge.loads
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    with ordinary_user(), pytest.raises(OutputError, match="can't write .*check that the folder exists"):
        run(judge, tmp_path / "in", locked / "scores.parquet")
    assert judge.loads == loads
    assert list(locked.iterdir()) == []


def test_nasty_tars_beside_a_good_one(judge, tmp_path):
    """Every way to break a tar ends as rows, and the good shard is scored all the same."""
    folder = tmp_path / "in"
    good = b"".join(member(name, data) for name, data in sample_members("g", 1))
    cut = b"".join(member(name, data) for name, data in sample_members("h", 2))
    evil = {
        "empty.tar": END,
        "garbage.tar": os.urandom(5000),
        "cut-header.tar": good + cut[:100],
        "cut-picture.tar": good + cut[:700],
        "links.tar": member("a.png", kind=b"2") + member("a.txt", b"p") + member("dev.png", kind=b"3") + good + END,
        "names.tar": member("/etc/passwd.png", png(3)) + member("/etc/passwd.txt", b"p") + member("../../x.png", png(4))
        + member("../../x.txt", b"p") + END,
        "latin.tar": member(b"caf\xe9.png", png(5)) + member(b"caf\xe9.txt", b"p") + END,
        "list.tar": member("l.png", png(6)) + member("l.json", b"[1, 2]") + END,
        "sparse.tar": member("s.txt", b"p") + header("s.png", 10 << 30, b"S") + good + END,
        "z-good.tar": good + END,
    }  # fmt: skip
    folder.mkdir()
    for name, data in evil.items():
        (folder / name).write_bytes(data)
    run(judge, folder, tmp_path / "s.parquet")
    found = {}
    for row in rows(tmp_path / "s.parquet"):
        found.setdefault(row["shard"], []).append((row["key"], row["status"]))
        assert (row["error"] is None) == (row["status"] == "ok")
        assert "\n" not in (row["error"] or "")
    assert "empty.tar" not in found
    assert [status for _, status in found["garbage.tar"]] == ["bad_shard"]
    assert found["cut-header.tar"][0] == ("g", "ok")
    assert found["cut-header.tar"][-1][1] == "truncated_shard"
    assert found["cut-picture.tar"][0] == ("g", "ok")
    assert found["cut-picture.tar"][-1][1] == "truncated_shard"
    assert found["links.tar"][0] == ("a", "missing_image")
    assert found["links.tar"][-1] == ("g", "ok")
    assert [status for _, status in found["names.tar"]] == ["ok", "ok"]
    assert [status for _, status in found["latin.tar"]] == ["ok"]
    assert found["list.tar"] == [("l", "bad_text")]
    assert found["sparse.tar"][0][0] == "s"
    assert found["sparse.tar"][0][1] != "ok"
    assert found["z-good.tar"] == [("g", "ok")]
    assert not (tmp_path.parent / "x.png").exists()


def test_a_hundred_thousand_tiny_members_cost_rows_not_memory(judge, tmp_path):
    folder = tmp_path / "in"
    data = b"".join(member(f"{n:06d}.txt", b"p") for n in range(100_000))
    folder.mkdir()
    (folder / "many.tar").write_bytes(data + END)
    write_tar(folder / "one.tar", sample_members("a", 1))
    summary = run(judge, folder, tmp_path / "s.parquet")
    assert dict(summary.counts) == {"missing_image": 100_000, "ok": 1}
    assert rows(tmp_path / "s.parquet")[-2]["key"] == "099999"


def test_all_shared_odd_pictures_follow_pillow(judge, shared_data, tmp_path):
    import polars as pl

    run(judge, shared_data / "odd-shard", tmp_path / "s.parquet", workers=2)
    manifest = pl.read_csv(shared_data / "odd-shard" / "manifest.csv")
    frame = pl.read_parquet(tmp_path / "s.parquet").with_columns(pl.col("status").cast(str))
    joined = manifest.join(frame, on="key", how="left")
    assert joined.height == frame.height == 152
    wrong = joined.filter((pl.col("pillow") == "ok") != (pl.col("status") == "ok"))
    assert wrong.select("key", "file", "pillow", "status", "error").rows() == []
    reasons = set(joined.filter(pl.col("status") != "ok")["status"])
    assert reasons == {"bad_image", "image_too_large"}


def test_found_shards_of_other_projects_give_a_row_a_sample(judge, shared_data, tmp_path):
    import polars as pl

    run(judge, shared_data / "found-shards", tmp_path / "s.parquet", workers=2)
    frame = pl.read_parquet(tmp_path / "s.parquet").with_columns(pl.col("shard").cast(str), pl.col("status").cast(str))
    counts = dict(frame.group_by("shard").len().rows())
    assert {name.rsplit("/", 1)[-1]: n for name, n in counts.items()} == {
        "sample.tgz": 90,
        "compressed.tar": 3,
        "testgz.tar": 1000,
        "mpdata.tar": 100,
        "tendata.tar": 100,
        "image1.tar": 4,
        "image2.tar": 3,
        "image3.tar": 2,
        "image4.tar": 2,
        "00000.tar": 1,
    }
    assert set(frame["status"]) == {"missing_image", "missing_prompt"}
    repeated = frame.filter(pl.col("key") == "123_456")
    assert repeated.height > 1
    assert repeated["shard"].n_unique() == repeated.height
