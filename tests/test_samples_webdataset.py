"""The same samples as the webdataset library itself, on shards that it can read, and on real ones."""

from __future__ import annotations

import csv
import json
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from tests.tars import FUZZ, check_rows, keys, packed, read, shard_at, statuses, text
from zscore.samples import ReadOptions, count_samples, read_samples, split_name
from zscore.shards import expand

IMAGES = ReadOptions().image_keys.split(";")


def library_samples(path):
    """(key, picture, texts) of every sample as webdataset groups them."""
    found = []
    with Path(path).open("rb") as file:
        for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
            image = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
            texts = {suffix: sample[suffix] for suffix in ("txt", "json") if suffix in sample}
            found.append((sample["__key__"], image, texts))
    return found


def assert_same(path):
    rows = list(read_samples(shard_at(path)))
    expected = library_samples(path)
    check_rows(rows)
    assert keys(rows) == [key for key, _, _ in expected]
    for row, (_, image, texts) in zip(rows, expected, strict=True):
        if row.image:
            assert row.image == image
            prompt = json.loads(texts["json"])["prompt"] if "json" in texts else texts["txt"].decode()
            assert row.prompt == prompt
        elif row.failure.status == "missing_image":
            assert image is None
    assert count_samples(shard_at(path)) == len(rows)
    return rows


names = st.text(st.sampled_from("ab._/A-é "), min_size=1, max_size=12)


@settings(FUZZ, max_examples=500)
@given(names)
def test_keys_are_those_of_the_library(name):
    expected = base_plus_ext(name)
    skipped = name.startswith("__") and name.partition("/")[0].endswith("__") and len(name.partition("/")[0]) >= 4
    if expected == (None, None) or skipped:
        assert split_name(name) is None
    else:
        assert split_name(name) == (expected[0], expected[1].lower())


@settings(FUZZ, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "d/a", "./a", "d.1/b", "__x__", "__x__/a", ".h", "../up", "/abs/a", "é"]),
            st.sampled_from(["jpg", "PNG", "txt", "json", "cls", "seg.png", ""]),
        ),
        max_size=12,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_order_of_members(members, layout):
    files = []
    for at, (key, suffix) in enumerate(members):
        name = f"{key}.{suffix}" if suffix else key
        content = text(f"prompt {at}") if suffix == "json" else f"content {at}".encode()
        files.append((name, content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        path.write_bytes(packed(files, layout))
        try:
            library_samples(path)
        except ValueError:  # the same name twice: an error there, another sample here
            read(path)
            return
        assert_same(path)


def test_the_rated_pictures(shared_data):
    shards = expand([str(shared_data / "avt-shards")])
    assert [shard.name for shard in shards] == [f"avt-{i:06d}.tar" for i in range(5)]
    rows = [row for shard in shards for row in assert_same(shard.url)]
    assert statuses(rows) == ["ok"] * 134
    assert len({row.group for row in rows}) == 27


def test_the_odd_pictures(shared_data):
    rows = assert_same(shared_data / "odd-shard" / "odd-000000.tar")
    with (shared_data / "odd-shard" / "manifest.csv").open(newline="") as file:
        assert keys(rows) == [line["key"] for line in csv.DictReader(file)]
    assert set(statuses(rows)) == {"ok"}
    assert {row.prompt for row in rows} == {"a test picture"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip-retrieval/image1.tar", {"missing_prompt": 4}),
        ("clip-retrieval/image2.tar", {"missing_prompt": 3}),
        ("clip-retrieval/image3.tar", {"missing_prompt": 2}),
        ("clip-retrieval/image4.tar", {"missing_prompt": 2}),
        ("nemo-curator/00000.tar", {"missing_prompt": 1}),
        ("webdataset/compressed.tar", {"missing_image": 3}),
        ("webdataset/mpdata.tar", {"missing_image": 100}),
        ("webdataset/sample.tgz", {"missing_prompt": 90}),
        ("webdataset/tendata.tar", {"missing_image": 100}),
        ("webdataset/testgz.tar", {"missing_image": 1000}),
    ],
)
def test_found_shards(shared_data, name, expected):
    rows = assert_same(shared_data / "found-shards" / name)
    assert Counter(statuses(rows)) == expected


def test_found_gzipped_texts_are_read(shared_data):
    rows = list(read_samples(shard_at(shared_data / "found-shards" / "webdataset" / "compressed.tar")))
    assert keys(rows) == ["compressed/0001", "compressed/0002", "compressed/0003"]
    assert rows[0].prompt == "hello"
    rows = list(read_samples(shard_at(shared_data / "found-shards" / "webdataset" / "testgz.tar")))
    assert sum(bool(row.prompt) for row in rows) > 990


def test_keys_repeat_over_found_shards(shared_data):
    shards = expand([str(shared_data / "found-shards" / "clip-retrieval")])
    found = [(shard.name, row.key) for shard in shards for row in read_samples(shard)]
    assert len(found) == 11
    assert len({key for _, key in found}) < 11
    assert len(set(found)) == 11
