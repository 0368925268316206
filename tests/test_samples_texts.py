"""Prompts and groups: where they may stand, and what can be wrong with them."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest

from tests.tars import END, member, read, statuses, text


def rows_of(folder, *files, **options):
    data = b"".join(member(f"a.{suffix}", content) for suffix, content in files)
    return read(member("a.jpg", b"1") + data + END, folder, **options)


def row_of(folder, *files, **options):
    (row,) = rows_of(folder, *files, **options)
    return row


def prompt_of(folder, *files, **options):
    row = row_of(folder, *files, **options)
    assert row.failure is None, row.failure
    return row.prompt


def failure_of(folder, *files, **options):
    row = row_of(folder, *files, **options)
    assert row.failure is not None
    return row.failure


def test_the_default_order(tmp_path):
    both = ("json", json.dumps({"prompt": "p", "caption": "c"}).encode())
    caption = ("json", json.dumps({"caption": "c"}).encode())
    assert prompt_of(tmp_path, ("txt", b"t"), both) == "p"
    assert prompt_of(tmp_path, ("txt", b"t"), caption) == "c"
    assert prompt_of(tmp_path, ("txt", b"t"), ("json", b"{}")) == "t"
    assert prompt_of(tmp_path, ("txt", b"t")) == "t"


@pytest.mark.parametrize("empty", [None, "", " \n\t\u3000"])
def test_what_is_blank_gives_way(tmp_path, empty):
    record = json.dumps({"prompt": empty, "caption": empty}).encode()
    assert prompt_of(tmp_path, ("json", record), ("txt", b"t")) == "t"
    assert failure_of(tmp_path, ("json", record)).status == "missing_prompt"
    assert failure_of(tmp_path, ("json", record), ("txt", b" \r\n")).status == "missing_prompt"


def test_no_prompt_at_all_says_where_it_was_looked_for(tmp_path):
    failure = failure_of(tmp_path, ("cls", b"3"))
    assert failure.status == "missing_prompt"
    assert "json:prompt, json:caption, txt" in failure.error


@pytest.mark.parametrize(
    ("prompt_keys", "expected"),
    [
        ("txt;json:prompt", "t"),
        ("json:long", "l"),
        ("meta.json:prompt", "m"),
        ("JSON:prompt", "p"),
        (" json:long ; txt ", "l"),
        ("json:Prompt;json:a:b", "colon"),
        ("caption", "raw"),
    ],
)
def test_other_orders(tmp_path, prompt_keys, expected):
    record = ("json", json.dumps({"prompt": "p", "long": "l", "a:b": "colon"}).encode())
    files = (record, ("txt", b"t"), ("meta.json", text("m")), ("caption", b"raw"))
    assert prompt_of(tmp_path, *files, prompt_keys=prompt_keys) == expected


def test_a_prompt_is_kept_to_the_letter(tmp_path):
    odd = "  two  spaces, <|im_end|> <|image_pad|>\n\nÜñí 猫 \U0001f408 e\u0301 \x00 \x1b tail "
    assert prompt_of(tmp_path, ("json", text(odd))) == odd
    assert prompt_of(tmp_path, ("txt", odd.encode())) == odd


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_the_line_feed_at_the_end_of_a_text_file_is_no_prompt(tmp_path, end):
    assert prompt_of(tmp_path, ("txt", ("a cat" + end).encode())) == "a cat"
    assert row_of(tmp_path, ("txt", b"a cat\n")).group == row_of(tmp_path, ("json", text("a cat"))).group


def test_a_byte_order_mark_is_no_prompt(tmp_path):
    assert prompt_of(tmp_path, ("txt", b"\xef\xbb\xbfa cat")) == "a cat"
    assert prompt_of(tmp_path, ("json", b"\xef\xbb\xbf" + text("a cat"))) == "a cat"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'["prompt"]',
        b'"prompt"',
        b"null",
        b"3",
        b"true",
        b"{",
        b'{"prompt": "x"',
        b'{"prompt": "x"} {}',
        b"{'prompt': 'x'}",
        b'{"prompt": 3}',
        b'{"prompt": ["x"]}',
        b'{"prompt": {"x": 1}}',
        b'{"prompt": false}',
        b'{"prompt": "\xff"}',
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}',
        b'{"prompt": "ok", "x": \xff}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"n": ' + b"9" * 10_000 + b', "prompt": "x"}',
    ],
    ids=lambda content: repr(content[:16]),
)
def test_json_that_is_no_use(tmp_path, content):
    assert failure_of(tmp_path, ("json", content), ("txt", b"not used")).status == "bad_text"


def test_surrogates_in_pairs_are_characters(tmp_path):
    assert prompt_of(tmp_path, ("json", b'{"prompt": "\\ud83d\\udc08"}')) == "\U0001f408"


def test_a_broken_second_choice_is_not_looked_at(tmp_path):
    assert prompt_of(tmp_path, ("json", text("p")), ("txt", b"\xff")) == "p"


def test_text_that_is_no_utf8(tmp_path):
    failure = failure_of(tmp_path, ("txt", b"caf\xe9"))
    assert failure.status == "bad_text"
    assert "0xe9 at 3" in failure.error


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_texts_at_and_over_the_limit(tmp_path, suffix):
    short, long = ("x" * 100, "x" * 101) if suffix == "txt" else ("x" * 86, "x" * 87)
    wrap = (lambda prompt: prompt.encode()) if suffix == "txt" else text
    assert len(wrap(short)) == 100
    assert prompt_of(tmp_path, (suffix, wrap(short)), max_text_bytes=100) == short
    failure = failure_of(tmp_path, (suffix, wrap(long)), max_text_bytes=100)
    assert failure.status == "prompt_too_long"
    assert "101 bytes; the limit is 100" in failure.error


def test_a_megabyte_of_prompt_is_read_and_more_is_not(tmp_path):
    assert len(prompt_of(tmp_path, ("txt", b"x" * (1 << 20)))) == 1 << 20
    assert failure_of(tmp_path, ("txt", b"x" * ((1 << 20) + 1))).status == "prompt_too_long"


@pytest.mark.parametrize("suffix", ["txt.gz", "json.gz", "TXT.GZ"])
def test_gzipped_texts(tmp_path, suffix):
    content = text("a cat") if suffix.startswith("json") else b"a cat\n"
    assert prompt_of(tmp_path, (suffix, gzip.compress(content, mtime=0))) == "a cat"


def test_the_plain_text_comes_before_the_gzipped(tmp_path):
    assert prompt_of(tmp_path, ("txt.gz", gzip.compress(b"packed", mtime=0)), ("txt", b"plain")) == "plain"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (gzip.compress(b"x" * 101, mtime=0), "prompt_too_long"),
        (gzip.compress(bytes(30 << 20), mtime=0)[:90], "prompt_too_long"),
        (gzip.compress(b"x" * 90, mtime=0)[:-1], "bad_text"),
        (b"no gzip", "bad_text"),
        (b"", "bad_text"),
        (gzip.compress(b"x" * 50, mtime=0)[:-8] + bytes(8), "bad_text"),
    ],
)
def test_gzipped_texts_are_bounded_and_checked(tmp_path, content, status):
    assert failure_of(tmp_path, ("txt.gz", content), max_text_bytes=100).status == status


def test_samples_of_one_prompt_are_a_group(tmp_path):
    row = row_of(tmp_path, ("txt", b"a cat"))
    assert row.group == hashlib.sha256(b"a cat").hexdigest()[:16]
    assert row_of(tmp_path, ("txt", b"a dog")).group != row.group


@pytest.mark.parametrize(
    ("value", "group"), [("g-1", "g-1"), (7, "7"), (-3, "-3"), ("ü", "ü"), (10**20, "1" + "0" * 20)]
)
def test_groups_by_a_field(tmp_path, value, group):
    assert row_of(tmp_path, ("json", text("x", id=value)), group_key="id").group == group


@pytest.mark.parametrize("value", [None, "", True, 1.5, [], {}, "\ud800"])
def test_groups_that_are_no_groups(tmp_path, value):
    failure = failure_of(tmp_path, ("json", text("x", id=value)), group_key="id")
    assert failure.status == "bad_text"
    assert "id" in failure.error


def test_a_missing_group_is_not_replaced_by_another(tmp_path):
    row = row_of(tmp_path, ("txt", b"x"), group_key="id")
    assert (row.failure.status, row.prompt, row.group) == ("bad_text", "x", "")
    assert "absent" in row.failure.error


def test_the_group_may_stand_beside_a_prompt_in_another_file(tmp_path):
    files = (("txt", b"t"), ("json", json.dumps({"id": 4}).encode()))
    row = row_of(tmp_path, *files, prompt_keys="txt", group_key="id")
    assert (row.prompt, row.group) == ("t", "4")


def test_the_picture_fails_first_and_the_prompt_is_kept(tmp_path):
    rows = read(member("a.txt", b"x") + member("b.json", b"[]") + END, tmp_path)
    assert statuses(rows) == ["missing_image", "missing_image"]
    assert [row.prompt for row in rows] == ["x", ""]
