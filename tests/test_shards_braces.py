"""Brace patterns: the same as the library that webdataset uses, and bounded."""

from __future__ import annotations

import time
from itertools import accumulate, islice

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tars import FUZZ
from zscore.braces import expand_braces
from zscore.errors import UsageError


@pytest.mark.parametrize(
    "pattern",
    [
        "plain.tar",
        "",
        "{00000..00003}.tar",
        "{8..11}",
        "{08..11}",
        "{3..0}",
        "{-2..2}",
        "{-02..2}",
        "{0..9..4}",
        "{9..0..4}",
        "{0..4..0}",
        "{a..e}",
        "{e..a..2}",
        "{X..c}",
        "{a,b}/{0..1}.tar",
        "{a,{b,c}{1,2}}x",
        "{,x}",
        "{a}",
        "{}",
        "a{b}c{1,2}",
        "{{1,2},{3,4}}",
        "\\{a,b\\}",
        "{a\\,b,c}",
        "s3://bucket/{train,val}/{000..002}.tar.gz",
    ],
)
def test_equal_to_the_library(pattern):
    assert expand_braces(pattern, 1000) == list(braceexpand(pattern))


@settings(FUZZ, max_examples=200)
@given(st.text(st.sampled_from("{}{},,..019ab"), max_size=14))
def test_equal_to_the_library_on_anything(pattern):  # but backslashes, which it takes away twice in {\\\\}
    depths = list(accumulate((character == "{") - (character == "}") for character in pattern))
    if min(depths, default=0) < 0 or (depths and depths[-1]):  # the library refuses most of these; bash keeps them
        expand_braces(pattern, 1000)
        return
    expected = list(islice(braceexpand(pattern), 1001))
    if len(expected) <= 1000:
        assert expand_braces(pattern, 1000) == expected


@pytest.mark.parametrize("pattern", ["{", "}", "a{b", "a}b", "{a,b", "}{", "{1..2", "a,b"])
def test_braces_without_a_partner_stay(pattern):
    assert expand_braces(pattern, 10) == [pattern]


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..99999999999}.tar",
        "{0..99999999999..2}",
        "{0..999999999999999999}",
        "{0..9}" * 30,
        "{a,b}" * 2000,
        "{{0..999},{0..999}}",
        "{0..500}{0..500}",
        "{" * 20 + "a,b" + "}" * 20,
    ],
)
def test_bombs_are_refused_at_once(pattern):
    start = time.monotonic()
    with pytest.raises(UsageError, match="the limit is 1000"):
        expand_braces(pattern, 1000)
    assert time.monotonic() - start < 2


def test_the_error_counts():
    with pytest.raises(UsageError, match=r"'\{0\.\.1000\}' stands for 1001 names; the limit is 1000"):
        expand_braces("{0..1000}", 1000)
    assert len(expand_braces("{1..1000}", 1000)) == 1000


def test_more_digits_than_any_shard_has_are_no_range():
    assert expand_braces("{0.." + "9" * 30 + "}", 10) == ["{0.." + "9" * 30 + "}"]
