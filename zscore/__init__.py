"""zscore: text-to-image pictures as distributions over rubric levels.

from zscore import Scorer

scores = Scorer("path/to/student").score([("a red cube on a table", "cube.png")])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zscore.errors import ZscoreError
    from zscore.records import Failure
    from zscore.scorer import LevelDistribution, Score, Scorer

__all__ = ["Failure", "LevelDistribution", "Score", "Scorer", "ZscoreError"]

_HOMES = {
    "Failure": "zscore.records",
    "LevelDistribution": "zscore.scorer",
    "Score": "zscore.scorer",
    "Scorer": "zscore.scorer",
    "ZscoreError": "zscore.errors",
}


def __getattr__(name: str) -> object:
    """Import on first use: the command line must not pay for the library."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zscore' has no attribute {name!r}")
