"""The demo student: a tiny checkpoint that was trained on the rubric world, and ships with the package.

It reads 96x96 drawings of shapes (`zscore_trainers.world`) and knows nothing else. `scripts/demo_student.py` made it;
`checkpoint/recipe.json` says how, with which seed, and what it reached.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "checkpoint"


def demo_student() -> Path:
    """Return the checkpoint's folder."""
    return FOLDER
