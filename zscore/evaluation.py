"""Scores against people: correlation, preference accuracy, distribution quality, each with its interval.

Departs from the paper in three places, each named in the output: tied scores are counted a second way (eq. 17 counts
them as wrong), Kendall's tau stands beside PLCC and SRCC, and distributions are compared with the raters' histograms.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from zscore import agreement, distribution_metrics
from zscore.agreement import Bootstrap, Estimate
from zscore.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from zscore.matching import Comparison, Matched

# A sum of absolute differences: drawing the prompts again adds noise to every bin. Of a calibrated model with 120
# prompts, none of 100 percentile intervals (95 %) held the true error, and 11 didn't hold the value itself.
NO_ECE_INTERVAL = "no interval: drawing prompts again adds to this error, so that it would lie above the truth"
RELATIVE = "ranks and votes compare pictures of one group only"


@dataclass(frozen=True, slots=True)
class DimensionReport:
    """All metrics of one dimension."""

    dimension: str
    note: str
    samples: int
    left_out: int
    """Rated samples whose score isn't finite, or whose distribution isn't one."""
    groups: int
    """Of the pairs: prompts, or single votes."""
    prompts: int
    """What the intervals draw."""
    ratings: int
    """Behind the human scores; 0 for an overall that is a mean of other dimensions."""
    pairs: int
    """Same-group pairs with a human preference."""
    margin_pairs: int
    human_ties: int
    score_ties: int
    """Of `pairs`, those whose scores tie."""
    metrics: dict[str, Estimate]
    distribution: dict[str, Estimate]
    """Empty where there are no distributions to compare."""
    scale: str
    """The raters' scale that distributions are compared on."""
    outside: int
    """Ratings beyond that scale, counted at its ends."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The reports and what they rest on."""

    dimensions: tuple[DimensionReport, ...]
    matched_by: str
    rated: int
    missing: int
    unscored: int
    not_compared: tuple[str, ...]
    margin: float
    bootstrap: Bootstrap

    def as_dict(self) -> dict[str, Any]:
        """For JSON; undefined values are null and carry their reason."""
        return asdict(self)


def evaluate(
    matched: Matched, level_values: Sequence[float], *, margin: float = 0.5, bootstrap: Bootstrap | None = None
) -> Evaluation:
    """Compare scores with human ratings.

    Args:
        matched: samples of both sides, from `zscore.matching.match`.
        level_values: the rubric's, ascending.
        margin: margin HPA only counts pairs whose human scores differ by more (paper, section 5.1: 0.5).
        bootstrap: how intervals are made.

    Raises:
        UsageError: the margin isn't a finite number, or below 0.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise UsageError(f"--margin {margin:g}: give a finite number of at least 0, like 0.5")
    bootstrap = bootstrap or Bootstrap()
    values_K = np.asarray(level_values, dtype=np.float64)
    return Evaluation(
        dimensions=tuple(_dimension(comparison, values_K, margin, bootstrap) for comparison in matched.comparisons),
        matched_by=matched.by,
        rated=matched.rated,
        missing=matched.missing,
        unscored=matched.unscored,
        not_compared=matched.not_compared,
        margin=margin,
        bootstrap=bootstrap,
    )


def _dimension(
    comparison: Comparison, values_K: agreement.Floats, margin: float, bootstrap: Bootstrap
) -> DimensionReport:
    groups, _ = _numbered(comparison.group_N)
    prompts, prompt_N = _numbered(comparison.prompt_N)
    tied, wide = _pairs(comparison, 0.0), _pairs(comparison, margin)
    points, functions = agreement.correlations(comparison.score_N, comparison.human_N, prompt_N, prompts)
    for prefix, counts in (("", tied), ("margin_", wide)):
        values, replicated = agreement.accuracies(counts, prefix)
        points |= values
        functions |= replicated
    # Human ties have no gap, so that "over the margin, with human ties" is no number.
    del points["margin_hpa_with_human_ties"], functions["margin_hpa_with_human_ties"]
    if comparison.relative:
        points |= {name: Estimate(None, undefined=RELATIVE) for name in points if not name.startswith("hpa")}
    bootstrap.estimates(points, functions, (prompts, comparison.score_N.size))
    distribution, scale, outside = _distribution(comparison, values_K, bootstrap)
    return DimensionReport(
        dimension=comparison.dimension,
        note=comparison.note,
        samples=comparison.score_N.size,
        left_out=comparison.left_out,
        groups=groups,
        prompts=prompts,
        ratings=0 if comparison.note else int(comparison.ratings.list.len().sum()),
        pairs=int(tied.pairs_G.sum()),
        margin_pairs=int(wide.pairs_G.sum()),
        human_ties=int(tied.human_tied_G.sum()),
        score_ties=int(tied.score_tied_G.sum()),
        metrics=points,
        distribution=distribution,
        scale=scale,
        outside=outside,
    )


def _pairs(comparison: Comparison, margin: float) -> agreement.PairCounts:
    """Pairs within groups, counted per prompt."""
    groups, group_N = _numbered(comparison.group_N)
    prompts, prompt_N = _numbered(comparison.prompt_N)
    prompt_G = np.zeros(groups, dtype=np.int64)
    prompt_G[group_N] = prompt_N
    counts = agreement.count_pairs(comparison.score_N, comparison.human_N, group_N, groups, margin)
    return counts.summed(prompt_G, prompts)


def _numbered(number_N: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
    """How many groups (or prompts) are present, and the number of each sample's, from 0 without gaps."""
    present_G, group_N = np.unique(number_N, return_inverse=True)
    return present_G.size, group_N.astype(np.int64)


def _distribution(
    comparison: Comparison, values_K: agreement.Floats, bootstrap: Bootstrap
) -> tuple[dict[str, Estimate], str, int]:
    """Distribution quality, the scale that it was measured on, and how many ratings lay outside it."""
    probs_NK = comparison.probs_NK
    if comparison.relative or probs_NK is None or not probs_NK.size:
        return {}, "", 0
    prompts, prompt_N = _numbered(comparison.prompt_N)
    scale = distribution_metrics.raters_scale(values_K, distribution_metrics.flat_ratings(comparison.ratings)[0])
    human_NJ, outside = distribution_metrics.histograms(comparison.ratings, scale)
    probs_NJ = probs_NK @ scale.from_levels_KJ
    probs_NJ /= probs_NJ.sum(axis=1, keepdims=True)
    per_sample = {
        "nll": distribution_metrics.nll(probs_NJ, human_NJ),
        "rps": distribution_metrics.rps(probs_NJ, human_NJ, scale.points_J),
        "emd": distribution_metrics.emd(probs_NJ, human_NJ, scale.points_J),
    } | {
        f"coverage_{level:.0%}".rstrip("%"): distribution_metrics.coverage(probs_NJ, human_NJ, level)
        for level in distribution_metrics.COVERAGE_LEVELS
    }
    points = {name: Estimate(float(values_N.mean())) for name, values_N in per_sample.items()}
    functions = {name: agreement.mean_of(values_N, prompt_N, prompts) for name, values_N in per_sample.items()}
    bootstrap.estimates(points, functions, (prompts, prompts))
    points["ece"] = Estimate(distribution_metrics.calibration_error(probs_NJ, human_NJ), undefined=NO_ECE_INTERVAL)
    return points, str(scale), outside
