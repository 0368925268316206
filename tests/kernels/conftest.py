"""What other versions of triton than the pinned one warn of; all warnings are errors here."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
IGNORED = (
    "ignore:Conversion of an array with ndim:DeprecationWarning",  # the interpreter of 3.6 on numpy 2
    "ignore:.*FP_FUSION:UserWarning",  # 3.9, though the launcher says what it wants
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            for ignored in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(ignored))
