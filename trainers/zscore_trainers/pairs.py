"""Same-prompt pairs with unequal labels: what GRPO and GDSO learn from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.records import Sample


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures for one prompt, judged on one dimension."""

    dimension: int
    winner: int
    """Sample of the set."""
    loser: int
    labels: tuple[float, float]
    """Of winner and loser, in rubric units; the first is higher."""


def make_pairs(samples: Sequence[Sample], labels_ND: NDArray[np.floating], *, most: int, seed: int) -> list[Pair]:
    """Pairs of unequal labels, by dimension and prompt.

    Args:
        samples: the set.
        labels_ND: their labels; NaN where there is none.
        most: pairs of one prompt and dimension; where there are more, a random choice.
        seed: of that choice.

    Raises:
        ValueError: no two candidates of a prompt differ in a label.
    """
    groups: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(sample.group or sample.prompt, []).append(number)
    rng = np.random.default_rng(seed)
    pairs = []
    for dimension, members in itertools.product(range(labels_ND.shape[1]), groups.values()):
        label = {one: float(labels_ND[one, dimension]) for one in members}
        found = []
        for two in itertools.combinations(members, 2):
            low, high = sorted(two, key=lambda one: label[one])
            if label[low] < label[high]:  # never true of NaN
                found.append(Pair(dimension, high, low, (label[high], label[low])))
        chosen = range(len(found)) if len(found) <= most else sorted(rng.choice(len(found), most, replace=False))
        pairs += [found[number] for number in chosen]
    if not pairs:
        raise ValueError("no two pictures of a prompt have different labels: pairs need at least two candidates")
    return pairs
