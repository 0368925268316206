"""Fits the model's distributions to people's, and collects what a guarantee rests on.

Two steps on two halves of the rated prompts. On the first half each dimension gets a temperature T and a shift b, by
maximum likelihood of the raters' histograms:

    p'_k ∝ p_k^(1/T) · exp(b · v_k)        v_k: value of level k, in rubric units

On the second half, scored with these, stand the pairs (score, human score) that a conformal test compares new scores
with (`zscore.calibration.confident_threshold`). The halves must differ: a score that was fitted to a sample isn't
exchangeable with new ones.

Array legend: N samples, K levels, J points of the raters' scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy.optimize import minimize

from zscore import distribution_metrics
from zscore.calibration import Calibration, Fit, Reference, apply_calibration, floored_log, recalibrated, softmax
from zscore.errors import TableError, UsageError
from zscore.human import OVERALL, aggregate
from zscore.matching import match
from zscore.table_metadata import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zscore.agreement import Floats
    from zscore.human import Aggregation, Ratings
    from zscore.matching import Comparison, Matched
    from zscore.tables import Scores

    Rematch = Callable[[Calibration], Matched]

# Wider would call a model useless or a rater infallible; a fit that ends here says so.
INVERSE_TEMPERATURES = (0.05, 20.0)
SHIFTS = (-8.0, 8.0)
# Below, two parameters fit noise.
MIN_SAMPLES = 20


def calibrate_scores(
    scores: Scores,
    ratings: Ratings,
    *,
    aggregation: Aggregation = "trimmed",
    by: str | None = None,
    allow_missing: bool = False,
    fit_share: float = 0.5,
    seed: int = 0,
) -> Calibration:
    """Calibrate a scored table on people's ratings of some of its rows.

    Args:
        scores: the table.
        ratings: of its pictures, on the rubric's scale, or on a known one that is mapped to it.
        aggregation: how several raters become one human score and one histogram.
        by: scores column that holds the groups (prompts).
        allow_missing: leave rated samples out that the table doesn't have.
        fit_share: see `calibrate`.
        seed: see `calibrate`.

    Raises:
        TableError: ratings outside their scale, or what `calibrate` and `zscore.matching.match` refuse.
    """
    given, ratings = ratings.scale, _on_levels(ratings, scores)
    aggregated = aggregate(ratings, aggregation)
    dimensions = tuple(scores.metadata["rubric"]["dimensions"])

    def rematch(calibration: Calibration) -> Matched:
        frame = scores.frame
        if is_partial and not all(fit.is_identity for fit in calibration.fits.values()):
            frame = frame.drop(OVERALL)
        frame = apply_calibration(frame, calibration)
        return match(frame, dimensions, ratings, aggregated, by=by, allow_missing=allow_missing, source=scores.name)

    # Such an overall can't be renewed; nobody misses it who didn't rate it.
    is_partial = scores.dimensions != dimensions and OVERALL in scores.schema
    is_partial = is_partial and OVERALL not in aggregated["dimension"]
    settings = {"aggregate": aggregation, "fit_share": fit_share, "seed": seed}
    made_for = identity(scores.metadata)
    sources = {"scores": list(scores.files), "human": ratings.source, "human_scale": given}
    empty = Calibration(scores.values, dimensions, {}, {}, {**made_for, "settings": settings, "sources": sources})
    return calibrate(rematch(empty), empty, rematch, fit_share=fit_share, seed=seed)


def _on_levels(ratings: Ratings, scores: Scores) -> Ratings:
    """The ratings from the rubric's lowest level to its highest.

    A guarantee on another scale would be one about other people's numbers: 4 of 7 isn't 4 of 5.
    """
    if ratings.relative:
        return ratings
    ends = scores.values[0], scores.values[-1]
    low, high = ratings.scale or ends
    names = [*scores.metadata["rubric"]["dimensions"], OVERALL]
    compared_R = ratings.frame.filter(pl.col("dimension").is_in(names))["score"].to_numpy()
    outside = int(((compared_R < low) | (compared_R > high)).sum())
    if outside:
        raise TableError(
            f"{outside:,} of the {compared_R.size:,} ratings of {ratings.source} are outside the scale, {low:g} to "
            f"{high:g}: they go from {compared_R.min():g} to {compared_R.max():g}; rescale them to the rubric's "
            f"levels, {ends[0]:g} to {ends[1]:g}"
        )
    share = (pl.col("score") - low) / (high - low)
    mapped = ratings.frame.with_columns(score=ends[0] + share * (ends[1] - ends[0]))
    return ratings if (low, high) == ends else replace(ratings, frame=mapped, scale=ends)


def calibrate(
    matched: Matched, calibration: Calibration, rematch: Rematch, *, fit_share: float = 0.5, seed: int = 0
) -> Calibration:
    """Fit every rated dimension, then collect the references.

    Args:
        matched: uncalibrated scores beside human ones.
        calibration: values, dimensions and provenance; the rest is filled in.
        rematch: matches the same ratings with scores that a given calibration was applied to.
        fit_share: of the rated samples, by whole prompts; 0 leaves the distributions as they are.
        seed: of the split.

    Raises:
        UsageError: `fit_share` isn't in [0, 1).
        TableError: the ratings are ranks or votes, which say nothing of a scale.
    """
    if not 0 <= fit_share < 1:
        raise UsageError(f"--fit-share {fit_share:g}: at least 0 and below 1, so that some are left for the thresholds")
    if any(comparison.relative for comparison in matched.comparisons):
        raise TableError("ranks and votes have no scale to calibrate to: give ratings on the rubric's scale")
    fitted_groups = _split(matched.comparisons, fit_share, seed)
    values_K = np.asarray(calibration.values)
    rated = [comparison for comparison in matched.comparisons if comparison.probs_NK is not None]
    fits = {comparison.dimension: _fit(comparison, values_K, fitted_groups) for comparison in rated}
    calibration = replace(calibration, fits=fits)
    references = {}
    for comparison in rematch(calibration).comparisons:
        if comparison.dimension == OVERALL and comparison.note and set(fits) != set(calibration.dimensions):
            continue  # a mean of some dimensions isn't what the column `overall` says
        held_N = ~np.isin(comparison.group_N, fitted_groups)
        references[comparison.dimension] = Reference(
            tuple(comparison.score_N[held_N].tolist()), tuple(comparison.human_N[held_N].tolist())
        )
    left_out = {comparison.dimension: comparison.left_out for comparison in matched.comparisons}
    return replace(calibration, references=references, provenance={**calibration.provenance, "left_out": left_out})


def _split(comparisons: Sequence[Comparison], share: float, seed: int) -> np.ndarray:
    """Groups whose samples are fitted: drawn at random until they hold that share of the samples."""
    most = max(comparisons, key=lambda comparison: comparison.group_N.size)
    groups, counts = np.unique(most.group_N, return_counts=True)
    order = np.random.default_rng(seed).permutation(groups.size)
    taken = np.searchsorted(np.cumsum(counts[order]), share * counts.sum(), side="right")
    return groups[order[:taken]]


def _fit(comparison: Comparison, values_K: Floats, fitted_groups: np.ndarray) -> Fit:
    assert comparison.probs_NK is not None
    scale = distribution_metrics.raters_scale(values_K, distribution_metrics.flat_ratings(comparison.ratings)[0])
    human_NJ, _ = distribution_metrics.histograms(comparison.ratings, scale)
    fitted_N = np.isin(comparison.group_N, fitted_groups)
    samples = int(fitted_N.sum())
    if samples < MIN_SAMPLES:
        note = (
            f"{samples} samples to fit, at least {MIN_SAMPLES} are needed: left as it is" if fitted_groups.size else ""
        )
        return Fit(samples=samples, note=note)
    split_KJ = scale.from_levels_KJ
    temperature, shift, at_bound = fit_distribution(
        comparison.probs_NK[fitted_N], human_NJ[fitted_N], values_K, split_KJ
    )
    held_NK, truth_NJ = comparison.probs_NK[~fitted_N], human_NJ[~fitted_N]
    after_NK = recalibrated(held_NK, values_K, temperature, shift)
    return Fit(
        temperature=temperature,
        shift=shift,
        samples=samples,
        nll_before=_mean_nll(held_NK @ split_KJ, truth_NJ),
        nll_after=_mean_nll(after_NK @ split_KJ, truth_NJ),
        note="the fit ends at its bound: too few samples, or scores that say nothing" if at_bound else "",
    )


def _mean_nll(probs_NJ: Floats, human_NJ: Floats) -> float | None:
    return float(distribution_metrics.nll(probs_NJ, human_NJ).mean()) if probs_NJ.shape[0] else None


def fit_distribution(
    probs_NK: Floats, human_NJ: Floats, values_K: Floats, split_KJ: Floats
) -> tuple[float, float, bool]:
    """Temperature and shift that make the raters' histograms most likely, and whether a bound stopped them."""
    centre = values_K.mean()
    features_2NK = np.stack([floored_log(probs_NK), np.broadcast_to(values_K - centre, probs_NK.shape)])

    def loss(theta: Floats) -> tuple[float, Floats]:
        new_NK = softmax(np.tensordot(theta, features_2NK, axes=1))
        likelihood_NJ = np.maximum(new_NK @ split_KJ, 1e-300)
        # How much of each level's mass the ratings ask for; the gradient is what is asked for minus what is there.
        asked_NK = new_NK * ((human_NJ / likelihood_NJ) @ split_KJ.T)
        gradient_2 = np.einsum("pnk,nk->p", features_2NK, new_NK - asked_NK) / probs_NK.shape[0]
        return float(-(human_NJ * np.log(likelihood_NJ)).sum(axis=1).mean()), gradient_2

    bounds = [INVERSE_TEMPERATURES, SHIFTS]
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds)
    inverse, shift = (float(value) for value in found.x)
    at_bound = any(
        abs(value - end) < 1e-6 for value, ends in zip((inverse, shift), bounds, strict=True) for end in ends
    )
    return 1 / inverse, shift, at_bound
