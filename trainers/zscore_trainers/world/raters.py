"""What people would say of a picture whose true scores are known.

A rater's score is the truth plus a rater's own leaning plus noise that is widest in the middle of the scale (people
agree on what is perfect and on what is broken), rounded to half-points.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from zscore_trainers.world.scenes import BEST, WORST

if TYPE_CHECKING:
    from collections.abc import Mapping

LEANING = 0.15
NARROW, WIDE = 0.2, 0.6
"""Standard deviations at the ends and in the middle of the scale."""


def spread(truth: float) -> float:
    """Standard deviation of the ratings of a picture."""
    middle = (BEST + WORST) / 2
    return WIDE - (WIDE - NARROW) * abs(truth - middle) / (BEST - middle)


def rate(truth: Mapping[str, float], rater: int, seed: int) -> dict[str, float]:
    """One rater's scores; the same arguments give the same scores."""
    leaning = random.Random(f"rater {rater}").gauss(0, LEANING)  # noqa: S311 - ratings, not secrets
    rng = random.Random(f"{seed} {rater}")  # noqa: S311
    return {name: _half_point(rng.gauss(value + leaning, spread(value))) for name, value in truth.items()}


def _half_point(score: float) -> float:
    return min(BEST, max(WORST, round(2 * score) / 2))
