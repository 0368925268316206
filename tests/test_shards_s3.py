"""Shards in an S3 store, over its real protocol: found, read, retried, refused."""

from __future__ import annotations

import gzip
import subprocess
import sys

import pytest

from tests.s3server import BUCKET, s3_server
from tests.tars import END, check_rows, pair, statuses
from zscore.errors import ShardNotFoundError, UsageError
from zscore.records import ShardRef
from zscore.samples import ReadOptions, count_samples, read_samples
from zscore.shards import expand


@pytest.fixture(scope="module")
def files():
    with pytest.MonkeyPatch.context() as monkeypatch, s3_server(monkeypatch) as files:
        tar = b"".join(pair(f"{i}", b"1" * 1000) for i in range(5)) + END
        for name in ("run/00000.tar", "run/00001.tar", "run/deep/00002.tar", "other/x.tar"):
            files.pipe(f"{BUCKET}/{name}", tar)
        files.pipe(f"{BUCKET}/run/zipped.tar.gz", gzip.compress(tar))
        files.pipe(f"{BUCKET}/run/LICENSE", b"text")
        files.pipe(f"{BUCKET}/run/.hidden.tar", tar)
        files.pipe(f"{BUCKET}/run/cut.tgz", gzip.compress(tar)[:-20])
        yield files


RUN = ["00000.tar", "00001.tar", "cut.tgz", "deep/00002.tar", "zipped.tar.gz"]
FAST = ReadOptions(retry_wait=0.001)


def names(*inputs):
    return [shard.name for shard in expand([f"s3://{BUCKET}/{value}" for value in inputs])]


def test_folders_globs_and_braces(files):
    assert names("run") == RUN
    assert names("run/") == RUN
    assert names("") == ["other/x.tar", *(f"run/{name}" for name in RUN)]
    assert names("run/*.tar") == ["00000.tar", "00001.tar"]
    assert names("run/**/*.tar") == ["00000.tar", "00001.tar", "deep/00002.tar"]
    assert names("run/*") == RUN
    assert names("run/{00001,00000}.tar") == ["00001.tar", "00000.tar"]
    assert names("run/{00000..00001}.tar", "run/0*.tar") == ["00000.tar", "00001.tar"]
    assert names("{run,other}/*.tar") == ["run/00000.tar", "run/00001.tar", "other/x.tar"]
    assert names("run/deep/00002.tar") == ["00002.tar"]
    assert names("run/LICENSE", "other/x.tar") == ["other/x.tar"]


def test_shards_know_size_and_version(files):
    (shard,) = expand([f"s3://{BUCKET}/run/00000.tar"])
    details = files.info(f"{BUCKET}/run/00000.tar")
    assert shard.url == f"s3://{BUCKET}/run/00000.tar"
    assert shard.size == details["size"]
    assert shard.version == details["ETag"].strip('"')
    assert expand([f"s3://{BUCKET}/run"])[0] == shard


def test_a_listing_is_never_an_old_one(files):
    assert names("other") == ["x.tar"]
    files.pipe(f"{BUCKET}/other/new.tar", END)
    assert names("other") == ["new.tar", "x.tar"]
    files.rm(f"{BUCKET}/other/new.tar")
    assert names("other") == ["x.tar"]


def test_samples(files):
    for shard in expand([f"s3://{BUCKET}/run"]):
        rows = list(read_samples(shard, FAST))
        check = statuses(rows)
        assert count_samples(shard, FAST) == len(rows)
        if shard.name == "cut.tgz":
            assert check[-1] == "truncated_shard"
            assert check[:-1] == ["ok"] * (len(rows) - 1)
        else:
            assert check == ["ok"] * 5
            assert [row.image for row in rows] == [b"1" * 1000] * 5


def test_shards_larger_than_a_window(files):
    images = [bytes([i]) * 3_000_000 for i in range(7)]
    files.pipe(f"{BUCKET}/big/x.tar", b"".join(pair(f"{i}", image) for i, image in enumerate(images)) + END)
    (shard,) = expand([f"s3://{BUCKET}/big"])
    assert [row.image for row in read_samples(shard, FAST)] == images
    assert count_samples(shard, FAST) == 7
    small = ReadOptions(max_image_bytes=1000)
    assert statuses(list(read_samples(shard, small))) == ["image_too_large"] * 7


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("run/00009.tar", ["run/00009.tar", "near it", "00000.tar"]),
        ("run/{00000..00003}.tar", ["2 of the 4", "00002.tar"]),
        ("nothing", ["nothing"]),
        ("nothing/*.tar", ["nothing/*.tar"]),
        ("run/LICENSE", ["LICENSE", ".tgz"]),
    ],
)
def test_what_leads_to_no_shard(files, value, words):
    with pytest.raises(ShardNotFoundError) as caught:
        names(value)
    for word in words:
        assert word in str(caught.value)


def test_a_bucket_that_does_not_exist(files):
    with pytest.raises((ShardNotFoundError, UsageError), match="nobucket"):
        expand(["s3://nobucket/x.tar"])


def test_a_shard_that_goes_away_is_a_row(files):
    gone = ShardRef(f"s3://{BUCKET}/run/gone.tar", "shard.tar", -1, "")
    rows = list(read_samples(gone, FAST))
    check_rows(rows)
    assert statuses(rows) == ["unreadable_shard"]
    assert count_samples(gone, FAST) == 1


def test_a_shard_that_is_overwritten_while_it_is_read(files):
    path = f"{BUCKET}/changing/x.tar"
    files.pipe(path, b"".join(pair(f"{i}", b"1" * 3_000_000) for i in range(9)) + END)
    (shard,) = expand([f"s3://{path}"])
    rows = []
    for row in read_samples(shard, FAST):
        rows.append(row)
        if row.index == 0:
            files.pipe(path, b"".join(pair(f"{i}", b"2" * 3_000_000) for i in range(9)) + END)
    assert statuses(rows)[-1] == "unreadable_shard"
    assert "overwritten" in rows[-1].failure.error
    assert {row.image[:1] for row in rows[:-1]} == {b"1"}


def test_local_and_remote_together(files, tmp_path):
    (tmp_path / "l.tar").write_bytes(END)
    shards = expand([str(tmp_path), f"s3://{BUCKET}/other", f"s3://{BUCKET}/run/00000.tar"])
    assert [shard.name for shard in shards] == [
        f"{tmp_path}/l.tar",
        f"s3://{BUCKET}/other/x.tar",
        f"s3://{BUCKET}/run/00000.tar",
    ]


def test_without_its_package_a_protocol_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from zscore.errors import UsageError; from zscore.shards import expand\n"
        "try: expand(['s3://bucket/x.tar'])\n"
        "except UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'zscore-reward[s3]'" in done.stdout


@pytest.mark.parametrize("value", ["nonsense://x/y.tar", "://x.tar"])
def test_unknown_protocols(value):
    with pytest.raises(UsageError, match=value.replace(".", r"\.")):
        expand([value])
