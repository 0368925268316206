"""Bash's brace expansion, counted before it is carried out: `{00000..00099}`, `{a,b}`, `{0..9..3}`, `{a..e}`, nested.

The `braceexpand` package that webdataset uses gives the same (a test holds that), but takes `{0..99999999999}` at its
word until the memory is gone.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_MAX_DEPTH = 16
_NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_CHARACTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d{1,18}))?")


def expand_braces(pattern: str, limit: int) -> list[str]:
    r"""Returns every string that `pattern` stands for, in its order.

    A backslash takes the next character's meaning; braces without a partner, a comma or a range stay as they are.

    Args:
        pattern: What the user wrote.
        limit: Most strings.

    Raises:
        UsageError: More than `limit`, or braces too deep.
    """
    try:
        return [_unescaped(text) for text in _expand(pattern, limit, 0)]
    except OverflowError as error:
        raise UsageError(f"{pattern!r} stands for {error}; the limit is {limit}") from None


def _expand(text: str, limit: int, depth: int) -> list[str]:
    if depth > _MAX_DEPTH:
        raise OverflowError(f"braces in more than {_MAX_DEPTH} braces")
    results = [""]
    for piece, is_braced in _pieces(text):
        choices = _choices(piece, limit, depth) if is_braced else [piece]
        if len(results) * len(choices) > limit:
            raise OverflowError(f"{len(results) * len(choices)} names or more")
        results = [head + tail for head in results for tail in choices]
    return results


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Splits into plain stretches and the insides of outermost braces."""
    start = at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "{" and (end := _partner(text, at)) > 0:
            yield text[start:at], False
            yield text[at + 1 : end], True
            start, at = end + 1, end
        at += 1
    yield text[start:], False


def _partner(text: str, start: int) -> int:
    depth = 0
    at = start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return -1


def _choices(inside: str, limit: int, depth: int) -> Sequence[str]:
    if match := _NUMBERS.fullmatch(inside):
        return _numbers(match[1], match[2], int(match[3] or 1) or 1, limit)
    if match := _CHARACTERS.fullmatch(inside):
        first, last = _LETTERS.index(match[1]), _LETTERS.index(match[2])
        step = int(match[3] or 1) or 1
        return [_LETTERS[at] for at in _range(first, last, step)]
    parts = list(_comma_parts(inside))
    if len(parts) == 1:
        return ["{" + text + "}" for text in _expand(inside, limit, depth + 1)]
    choices: list[str] = []
    for part in parts:
        choices += _expand(part, limit, depth + 1)
        if len(choices) > limit:
            raise OverflowError(f"{len(choices)} names or more")
    return choices


def _numbers(first: str, last: str, step: int, limit: int) -> list[str]:
    padded = any(text.lstrip("-").startswith("0") and text not in {"0", "-0"} for text in (first, last))
    width = max(len(first), len(last)) if padded else 0
    numbers = _range(int(first), int(last), step)
    if len(numbers) > limit:
        raise OverflowError(f"{len(numbers)} names")
    return [f"{number:0{width}d}" for number in numbers]


def _range(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def _comma_parts(inside: str) -> Iterator[str]:
    start = at = depth = 0
    while at < len(inside):
        character = inside[at]
        if character == "\\":
            at += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        elif character == "," and depth == 0:
            yield inside[start:at]
            start = at + 1
        at += 1
    yield inside[start:]


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
