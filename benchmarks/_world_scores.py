"""How scores agree with the truth of the rubric world, as means over its dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from zscore.agreement import correlations, count_pairs
from zscore_trainers.world.scenes import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

METRICS = ("plcc", "srcc", "hpa", "margin_hpa")


@dataclass(frozen=True, slots=True)
class Found:
    """Scores of one method and seed, with the truth; N pictures, D dimensions."""

    score_ND: NDArray[np.float64]
    truth_ND: NDArray[np.float64]
    group_N: NDArray[np.int64]
    tokens: float
    """Generated for a picture and dimension; 0 where the score is read from the prompt's last position."""
    valid: float


def read(scores: Path, truth: pl.DataFrame) -> Found:
    """Expected scores beside the true ones.

    A picture of which one output came to no score has failed, and counts as the middle of the scale on all dimensions.
    """
    rows = pl.read_parquet(scores).join(truth, on="key", suffix="_true").sort("shard", "index")
    assert rows.height == truth.height
    score_ND = rows.select(pl.col(DIMENSIONS).fill_null(3.0)).to_numpy().astype(np.float64).round(9)
    prompts = {name: at for at, name in enumerate(sorted(rows["group"].unique()))}
    tokens = rows["output_tokens"].mean() if "output_tokens" in rows.columns else None
    return Found(
        score_ND,
        rows.select([f"{name}_true" for name in DIMENSIONS]).to_numpy(),
        np.array([prompts[name] for name in rows["group"]]),
        float(tokens) / len(DIMENSIONS) if tokens is not None else 0.0,
        float((rows["status"] == "ok").mean()),
    )


def functions(found: Found, margin: float) -> dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]:
    """Each metric, averaged over the dimensions, as a function of how often each prompt is drawn."""
    groups = int(found.group_N.max()) + 1
    parts: dict[str, list[Any]] = {name: [] for name in METRICS}
    for at in range(len(DIMENSIONS)):
        score_N, truth_N = found.score_ND[:, at], found.truth_ND[:, at]
        found_functions = correlations(score_N, truth_N, found.group_N, groups)[1]
        parts["plcc"].append(found_functions["plcc"])
        parts["srcc"].append(found_functions["srcc"])
        for name, gap in (("hpa", 0.0), ("margin_hpa", margin)):
            counts = count_pairs(score_N, truth_N, found.group_N, groups, gap)
            parts[name].append(share(counts.right_G, counts.pairs_G))
    return {name: mean_of(some) for name, some in parts.items()}


def share(right_G: NDArray[np.float64], all_G: NDArray[np.float64]) -> Callable[..., NDArray[np.float64]]:
    """Of right pairs."""
    return lambda W_BG: (W_BG @ right_G) / (W_BG @ all_G)


def mean_of(some: Sequence[Callable[..., NDArray[np.float64]]]) -> Callable[..., NDArray[np.float64]]:
    """Of several functions."""
    return lambda W_BG: np.mean([one(W_BG) for one in some], axis=0)
