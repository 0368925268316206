"""Refusals of settings that can't be meant: a line with the setting, its value and what it may be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that a setting doesn't know.

    Raises:
        UsageError: names the setting, the word and those it knows.
    """
    if value not in known:
        raise UsageError(f"{name} is '{value}': choose {' or '.join(known)}")


def check_least(config: object, least: int, *names: str) -> None:
    """Refuse numbers below a limit.

    Raises:
        UsageError: names the first setting, its value and the limit.
    """
    _check(config, names, lambda value: value >= least, f"at least {least}")


def check_positive(config: object, *names: str) -> None:
    """Refuse 0 and what is below; raises as `check_least` does."""
    _check(config, names, lambda value: value > 0, "more than 0")


def check_share(config: object, *names: str) -> None:
    """Refuse what is no share of a whole; raises as `check_least` does."""
    _check(config, names, lambda value: 0 <= value <= 1, "0 to 1")


def _check(config: object, names: Sequence[str], fits: Callable[[float], bool], wanted: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not math.isfinite(value):
            raise UsageError(f"{name} is {value}: a finite number, {wanted}")
        if not fits(value):
            raise UsageError(f"{name} is {value}: {wanted}")
