"""Grouping members into samples, and the pictures among them."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from tests.tars import (
    END,
    base256,
    check_rows,
    header,
    keys,
    member,
    packed,
    padded,
    pair,
    pax,
    read,
    shard_at,
    statuses,
    text,
)
from zscore.errors import UsageError
from zscore.records import Status
from zscore.samples import ReadOptions, count_samples, read_samples, split_name


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.JPG", ("a", "jpg")),
        ("a.seg.png", ("a", "seg.png")),
        ("a.", ("a", "")),
        ("./a.jpg", ("./a", "jpg")),
        ("/abs/a.jpg", ("/abs/a", "jpg")),
        ("../../a.jpg", ("../../a", "jpg")),
        ("d.v1/a.jpg", ("d.v1/a", "jpg")),
        ("d/.hidden.jpg", ("d/", "hidden.jpg")),
        (".hidden.jpg", None),
        ("./.hidden", None),
        ("d.v1/.hidden", None),
        ("a", None),
        ("d.v1/a", None),
        ("", None),
        ("d/", None),
        ("a.jpg/", None),
        ("__index__", None),
        ("__meta__/a.jpg", None),
        ("__meta__x/a.jpg", ("__meta__x/a", "jpg")),
        ("__a.jpg__", None),
        ("__a__.jpg", ("__a__", "jpg")),
        ("___/a.jpg", ("___/a", "jpg")),
        ("d/__a__/b.jpg", ("d/__a__/b", "jpg")),
        ("img_1.5_x.jpg", ("img_1", "5_x.jpg")),
    ],
)
def test_keys_and_suffixes(name, expected):
    assert split_name(name) == expected


def test_samples_in_order(tmp_path):
    rows = read(pair("b", b"1", "bee") + pair("a", b"2", "ay") + END, tmp_path)
    assert [(row.key, row.image, row.prompt, row.failure) for row in rows] == [
        ("b", b"1", "bee", None),
        ("a", b"2", "ay", None),
    ]


def test_the_order_inside_a_sample_does_not_matter(tmp_path):
    rows = read(member("a.json", text("x")) + member("a.cls", b"3") + member("a.jpg", b"1") + END, tmp_path)
    assert [(row.key, row.image, row.prompt) for row in rows] == [("a", b"1", "x")]


@pytest.mark.parametrize(
    "between",
    [
        member("d/", b"", b"5"),
        member("README"),
        member("__index__.x__"),
        member(".hidden.json"),
        member("a.cls", b"", b"2"),
    ],
    ids=["folder", "no suffix", "metadata", "hidden", "unwanted link"],
)
def test_what_is_no_sample_does_not_end_one(tmp_path, between):
    rows = read(member("a.jpg", b"1") + between + member("a.json", text("x")) + END, tmp_path)
    assert statuses(rows) == ["ok"]


def test_a_key_that_comes_back_is_another_sample(tmp_path):
    rows = read(pair("a") + pair("b") + pair("a") + END, tmp_path)
    assert keys(rows) == ["a", "b", "a"]
    assert statuses(rows) == ["ok"] * 3


@pytest.mark.parametrize("again", ["a.jpg", "a.JPG", "a.json", "a.cls"])
def test_a_suffix_that_comes_twice_begins_a_sample(tmp_path, again):
    data = {"jpg": b"2", "json": text("second"), "cls": b"2"}
    first = member("a.jpg", b"1") + member("a.json", text("first")) + member("a.cls", b"1")
    rows = read(first + member(again, data[again[2:].lower()]) + END, tmp_path)
    assert keys(rows) == ["a", "a"]
    assert rows[0].prompt == "first"
    assert rows[0].failure is None
    assert rows[1].failure is not None


def test_two_whole_samples_of_one_key_stay_two(tmp_path):
    rows = read(pair("a", b"1", "one") + pair("a", b"2", "two") + END, tmp_path)
    assert [(row.image, row.prompt, row.failure) for row in rows] == [(b"1", "one", None), (b"2", "two", None)]


def test_a_sample_without_picture_is_a_row(tmp_path):
    rows = read(member("a.cls", b"1") + pair("b") + END, tmp_path)
    assert statuses(rows) == ["missing_image", "ok"]
    assert ".cls" in rows[0].failure.error


def test_a_picture_with_a_dot_in_its_name_is_told_apart(tmp_path):
    rows = read(b"".join(member(f"img_1.{i}.jpg", b"1") for i in range(9)) + END, tmp_path)
    assert statuses(rows) == ["missing_image"]
    assert ".0.jpg, .1.jpg" in rows[0].failure.error
    assert "…" in rows[0].failure.error


@pytest.mark.parametrize("order", [("png", "jpg"), ("jpg", "png")])
@pytest.mark.parametrize(("image_keys", "expected"), [("jpg;png", b"jpg"), ("png;jpg", b"png"), (" .PNG ", b"png")])
def test_the_first_choice_of_pictures(tmp_path, order, image_keys, expected):
    data = b"".join(member(f"a.{suffix}", suffix.encode()) for suffix in order) + member("a.txt", b"x") + END
    assert [row.image for row in read(data, tmp_path, image_keys=image_keys)] == [expected]


@pytest.mark.parametrize("suffix", ["jpg", "png", "jpeg", "webp", "avif", "gif", "bmp", "tif", "tiff", "JPeG"])
def test_the_default_pictures(tmp_path, suffix):
    assert statuses(read(member(f"a.{suffix}", b"1") + member("a.txt", b"x") + END, tmp_path)) == ["ok"]


def test_a_suffix_of_several_parts(tmp_path):
    data = member("a.png", b"no") + member("a.gen.png", b"yes") + member("a.txt", b"x") + END
    assert read(data, tmp_path, image_keys="gen.png")[0].image == b"yes"


def test_an_empty_picture(tmp_path):
    rows = read(member("a.jpg") + member("a.txt", b"x") + END, tmp_path)
    assert statuses(rows) == ["bad_image"]
    assert "0 bytes" in rows[0].failure.error


def test_a_picture_at_and_over_the_limit(tmp_path):
    rows = read(pair("a", b"1" * 10) + pair("b", b"1" * 11) + pair("c") + END, tmp_path, max_image_bytes=10)
    assert statuses(rows) == ["ok", "image_too_large", "ok"]
    assert rows[1].prompt == "a cat"
    assert "b.jpg has 11 bytes; the limit is 10" in rows[1].failure.error


def test_a_first_choice_that_is_too_large_is_not_replaced_by_another(tmp_path):
    data = member("a.jpg", b"1" * 11) + member("a.png", b"2") + member("a.txt", b"x") + END
    assert statuses(read(data, tmp_path, max_image_bytes=10)) == ["image_too_large"]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6"])
def test_what_stands_in_for_a_picture_is_said(tmp_path, kind):
    link = header("a.jpg", 0, kind, patch={157: b"/etc/passwd"})
    rows = read(link + member("a.txt", b"x") + pair("b") + END, tmp_path)
    assert keys(rows) == ["a", "b"]
    assert statuses(rows) == ["missing_image", "ok"]
    assert "a.jpg is a" in rows[0].failure.error
    assert "root" not in rows[0].failure.error


def test_a_link_alone_is_a_row_too(tmp_path):
    rows = read(header("a.jpg", 0, b"1", patch={157: b"b.jpg"}) + pair("b") + END, tmp_path)
    assert statuses(rows) == ["missing_image", "ok"]


def test_a_link_beside_another_choice_is_passed(tmp_path):
    data = header("a.jpg", 0, b"2") + member("a.png", b"1") + member("a.txt", b"x") + END
    assert statuses(read(data, tmp_path)) == ["ok"]


def test_a_link_in_place_of_the_prompt(tmp_path):
    rows = read(member("a.jpg", b"1") + header("a.txt", 0, b"2") + END, tmp_path)
    assert statuses(rows) == ["missing_prompt"]
    assert "a.txt is a link" in rows[0].failure.error


def test_a_folder_called_like_a_picture(tmp_path):
    assert keys(read(header("a.jpg/", 0, b"5") + pair("b") + END, tmp_path)) == ["b"]


@pytest.mark.parametrize(("real", "status"), [(10 << 30, "image_too_large"), (100, "bad_image")])
def test_sparse_pictures(tmp_path, real, status):
    sparse = pax({"GNU.sparse.size": str(real), "GNU.sparse.name": "a.jpg"}) + member("GNUSparseFile.0/x", b"abc")
    rows = read(sparse + member("a.txt", b"x") + pair("b") + END, tmp_path)
    assert statuses(rows) == [status, "ok"]


def test_sparse_texts(tmp_path):
    sparse = pax({"GNU.sparse.size": "100", "GNU.sparse.name": "a.txt"}) + member("GNUSparseFile.0/x", b"abc")
    assert statuses(read(member("a.jpg", b"1") + sparse + END, tmp_path)) == ["bad_text"]


def test_names_are_data(tmp_path):
    evil = [
        "/etc/cron.d/a",
        "../../a",
        "\\\\host\\a",
        "a\nb",
        "a\x1b[2J",
        "C:\\a",
        "a" * 5000,
        "'; drop table",
        "\N{CAT FACE}",
    ]
    before = sorted(tmp_path.parent.iterdir())
    data = packed([(f"{key}.{suffix}", value) for key in evil for suffix, value in (("jpg", b"1"), ("txt", b"x"))])
    rows = read(data, tmp_path)
    assert keys(rows) == evil
    assert statuses(rows) == ["ok"] * len(evil)
    assert sorted(tmp_path.parent.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shard.tar"]


def test_names_that_are_no_utf8(tmp_path):
    data = member(b"\xff\xfe.jpg", b"1") + member(b"\xff\xfe.txt", b"x") + END
    rows = read(data, tmp_path)
    assert [(row.key, row.failure) for row in rows] == [("\\xff\\xfe", None)]


def test_errors_with_evil_names_stay_one_line(tmp_path):
    rows = read(member("a\nb\x1b.jpg") + member(f"{'x' * 90}.jpg") + END, tmp_path)
    assert statuses(rows) == ["bad_image", "bad_image"]


def test_too_many_samples(tmp_path):
    rows = read(b"".join(pair(str(i)) for i in range(5)) + END, tmp_path, max_samples=3)
    assert statuses(rows) == ["ok", "ok", "ok", "bad_shard"]
    assert keys(rows) == ["0", "1", "2", ""]
    assert "max_samples" in rows[-1].failure.error


def test_a_run_without_end_takes_bounded_memory(tmp_path):
    data = b"".join(member(f"a.{i}.bin") for i in range(6000)) + member("a.jpg", b"1") + member("a.txt", b"x") + END
    assert statuses(read(data, tmp_path)) == ["ok"]


def test_a_hundred_thousand_tiny_members(tmp_path):
    one = padded(b"1")
    # Digits whose sum is the same for every number keep the checksum: 10 times faster than a header for each.
    image, prompt = header("0000099999.jpg", 1), header("0000099999.txt", 1)
    path = tmp_path / "many.tar"
    with path.open("wb") as file:
        for i in range(50_000):
            key = b"%05d%05d" % (i, 99_999 - i)
            file.write(key + image[10:] + one + key + prompt[10:] + one)
        file.write(END)
    count = 0
    for row in read_samples(shard_at(path)):
        assert row.index == count
        assert row.failure is None
        count += 1
    assert count == 50_000
    assert count_samples(shard_at(path)) == 50_000


def test_large_pictures_next_to_tiny_ones(tmp_path):
    chance = random.Random(1)
    images = [chance.randbytes(chance.choice((1, 500, 512, 32_767, 32_768, 65_536, 300_001))) for _ in range(60)]
    rows = read(b"".join(pair(f"{i}", image) for i, image in enumerate(images)) + END, tmp_path)
    assert [row.image for row in rows] == images


def test_a_picture_that_claims_more_than_memory_holds(tmp_path):
    rows = read(pair("a") + header("b.jpg", base256(1 << 60)) + b"abc", tmp_path)
    assert keys(rows) == ["a", "b"]
    assert statuses(rows) == ["ok", "truncated_shard"]


def test_the_image_is_empty_where_anything_fails(tmp_path):
    rows = read(member("a.jpg", b"1") + END, tmp_path)
    assert rows[0].failure.status is Status.MISSING_PROMPT
    assert rows[0].image == b""


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_keys": ""}, "image_keys"),
        ({"image_keys": "jpg;;png"}, "image_keys"),
        ({"image_keys": "a/b"}, "'a/b'"),
        ({"prompt_keys": ""}, "prompt_keys"),
        ({"prompt_keys": "json"}, "json:prompt"),
        ({"prompt_keys": "json:"}, "names no field"),
        ({"prompt_keys": ":prompt"}, "prompt_keys"),
        ({"group_key": ""}, "group_key"),
        ({"max_image_bytes": 0}, "max_image_bytes is 0"),
        ({"max_text_bytes": -1}, "max_text_bytes is -1"),
        ({"max_samples": 0}, "max_samples"),
        ({"attempts": 0}, "attempts"),
        ({"retry_wait": -1.0}, "retry_wait"),
    ],
)
def test_options_that_cannot_be_meant(options, word):
    with pytest.raises(UsageError, match=word):
        ReadOptions(**options)


def test_options_travel_to_other_processes():
    options = ReadOptions(group_key="id")
    assert pickle.loads(pickle.dumps(options)) == options


def test_reading_can_stop_anywhere(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"".join(pair(str(i)) for i in range(9)) + END)
    open_before = open_files()
    rows = read_samples(shard_at(tmp_path / "shard.tar"))
    first = [next(rows), next(rows)]
    rows.close()
    check_rows(first)
    assert open_files() == open_before
