"""Fits the model's distributions to people's, and says which pictures can be kept with confidence.

Two steps on two halves of the rated prompts. On the first half each dimension gets a temperature T and a shift b, by
maximum likelihood of the raters' histograms:

    p'_k ∝ p_k^(1/T) · exp(b · v_k)        v_k: value of level k, in rubric units

On the second half, scored with these, stand the pairs (score, human score) that a conformal test compares new scores
with (`confident_threshold`). The halves must differ: a score that was fitted to a sample isn't exchangeable with new
ones.

Array legend: N samples, K levels, J points of the raters' scale.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import polars as pl
from scipy.optimize import minimize

from zscore import distribution_metrics
from zscore.errors import TableError, UsageError
from zscore.human import DECIMALS, OVERALL, aggregate, read_text
from zscore.matching import match
from zscore.store import open_store, split_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zscore.agreement import Floats
    from zscore.human import Aggregation, Ratings
    from zscore.matching import Comparison, Matched
    from zscore.tables import Scores

    Rematch = Callable[["Calibration"], Matched]

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)

GUARANTEE = (
    "If the rated samples and the scored ones are exchangeable, the kept set's expected share of samples whose human "
    "score is below the minimum is at most 1 - confidence. The expectation is over the draw of both; an empty set "
    "counts as share 0; in a single run the share may be higher."
)
FILE_VERSION = 1
# Wider would call a model useless or a rater infallible; a fit that ends here says so.
INVERSE_TEMPERATURES = (0.05, 20.0)
SHIFTS = (-8.0, 8.0)
# Below, two parameters fit noise.
MIN_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Fit:
    """Temperature and shift of one dimension."""

    temperature: float = 1.0
    shift: float = 0.0
    """Log-odds per rubric point; positive moves mass to higher levels."""
    samples: int = 0
    nll_before: float | None = None
    """On the samples that weren't fitted, in nats."""
    nll_after: float | None = None
    note: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.temperature == 1.0 and self.shift == 0.0


@dataclass(frozen=True, slots=True)
class Reference:
    """What new scores of one column are compared with."""

    score: tuple[float, ...]
    """After the fit."""
    human: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that calibration.json holds."""

    values: tuple[float, ...]
    """Of the rubric's levels."""
    dimensions: tuple[str, ...]
    """All of the rubric's, whether they were rated or not."""
    fits: dict[str, Fit]
    references: dict[str, Reference]
    """By score column: the rated dimensions, and `overall` where people rated it or all dimensions."""
    provenance: dict[str, Any]
    """Rubric, model, aggregation, files: scores made otherwise are refused."""


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
        ratings: of its pictures, on the rubric's scale.
        aggregation: how several raters become one human score and one histogram.
        by: scores column that holds the groups (prompts).
        allow_missing: leave rated samples out that the table doesn't have.
        fit_share: see `calibrate`.
        seed: see `calibrate`.
    """
    aggregated = aggregate(ratings, aggregation)
    dimensions = tuple(scores.metadata["rubric"]["dimensions"])

    def rematch(calibration: Calibration) -> Matched:
        frame = apply_calibration(scores.frame, calibration)
        return match(frame, dimensions, ratings, aggregated, by=by, allow_missing=allow_missing)

    settings = {"aggregate": aggregation, "fit_share": fit_share, "seed": seed}
    made_for = {
        "rubric": {name: scores.metadata["rubric"][name] for name in ("name", "hash")},
        "model": scores.metadata["model"],
    }
    sources = {"scores": list(scores.files), "human": ratings.source}
    empty = Calibration(scores.values, dimensions, {}, {}, {**made_for, "settings": settings, "sources": sources})
    return calibrate(rematch(empty), empty, rematch, fit_share=fit_share, seed=seed)


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
    return replace(calibration, references=references)


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
    features_2NK = np.stack([_log(probs_NK), np.broadcast_to(values_K - centre, probs_NK.shape)])

    def loss(theta: Floats) -> tuple[float, Floats]:
        new_NK = _softmax(np.tensordot(theta, features_2NK, axes=1))
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


def recalibrated(probs_NK: Floats, values_K: Floats, temperature: float, shift: float) -> Floats:
    """Distributions at another temperature, shifted along the levels."""
    return _softmax(_log(probs_NK) / temperature + shift * values_K)


def _log(probs_NK: Floats) -> Floats:
    # float32 underflow isn't certainty: a floor lets a high temperature bring mass back.
    return np.asarray(np.log(np.maximum(probs_NK, distribution_metrics.FLOOR)))


def _softmax(logits_NK: Floats) -> Floats:
    weights_NK = np.exp(logits_NK - logits_NK.max(axis=-1, keepdims=True))
    return np.asarray(weights_NK / weights_NK.sum(axis=-1, keepdims=True))


def apply_calibration(frame: Frame, calibration: Calibration) -> Frame:
    """The scores with every fitted dimension's distribution, mean, std and entropy renewed, and `overall` from them.

    Raises:
        TableError: the frame has no distributions of a fitted dimension.
    """
    columns = frame.collect_schema().names()
    fitted = [name for name, fit in calibration.fits.items() if not fit.is_identity]
    for name in fitted:
        if f"{name}_probs" not in columns:
            raise TableError(f"the scores have no column {name}_probs, which --calibration needs: keep all columns")
    if not fitted:
        return frame
    values_K = np.asarray(calibration.values)
    frame = frame.with_columns(_renewed(name, calibration.fits[name], values_K) for name in fitted)
    for name in fitted:
        parts = {name: "mean", f"{name}_std": "std", f"{name}_entropy": "entropy", f"{name}_probs": "probs"}
        kept = {column: part for column, part in parts.items() if column in columns}
        struct = pl.col(f"_{name}").struct
        frame = frame.with_columns(struct.field(part).alias(column) for column, part in kept.items())
    frame = frame.drop([f"_{name}" for name in fitted])
    if OVERALL in columns and all(name in columns for name in calibration.dimensions):
        means = pl.mean_horizontal(pl.col(list(calibration.dimensions)).cast(pl.Float64))
        frame = frame.with_columns(means.cast(pl.Float32).alias(OVERALL))
    return frame


def _renewed(name: str, fit: Fit, values_K: Floats) -> pl.Expr:
    """A struct of mean, std, entropy and probs, named `_<dimension>`; null where there is no distribution."""
    kind = pl.Struct(
        {**dict.fromkeys(("mean", "std", "entropy"), pl.Float32), "probs": pl.Array(pl.Float32, values_K.size)}
    )

    def run(series: pl.Series) -> pl.Series:
        there = series.is_not_null()
        lists = series.filter(there)
        flat = lists.explode().to_numpy().astype(np.float64).reshape(len(lists), values_K.size)
        probs_NK = recalibrated(flat, values_K, fit.temperature, fit.shift)
        mean_N = probs_NK @ values_K
        std_N = np.sqrt(np.maximum(((values_K - mean_N[:, None]) ** 2 * probs_NK).sum(axis=1), 0))
        entropy_N = -(probs_NK * np.log(np.maximum(probs_NK, 1e-300))).sum(axis=1)
        found = pl.DataFrame(
            {"mean": mean_N, "std": std_N, "entropy": entropy_N},
            schema=dict.fromkeys(("mean", "std", "entropy"), pl.Float32),
        ).with_columns(probs=pl.Series(probs_NK.astype(np.float32), dtype=pl.Array(pl.Float32, values_K.size)))
        structs = found.to_struct(f"_{name}")
        # Back to the full length: position among those that are there, null elsewhere.
        position = pl.select(pl.when(there).then(there.cum_sum().cast(pl.Int64) - 1)).to_series()
        return structs.gather(position).alias(f"_{name}")

    return pl.col(f"{name}_probs").map_batches(run, return_dtype=kind, is_elementwise=True).alias(f"_{name}")


def confident_threshold(
    scores: pl.Series, calibration: Calibration, minimum: float, confidence: float, column: str = OVERALL
) -> float:
    """The score above which a picture is kept so that kept ones are truly ≥ `minimum` (see `GUARANTEE`).

    Conformal selection (Jin and Candès 2023, arXiv:2210.01408): of n rated samples, those whose human score is below
    the minimum are the null; a new score t has the p-value (1 + #{null scores ≥ t}) / (n + 1), and Benjamini and
    Hochberg's procedure at level 1 − confidence over all new scores bounds the false discovery rate. P-values fall as
    scores rise, so what is kept is everything above one threshold, which depends on all scores.

    Args:
        scores: all scores of the column, calibrated (`apply_calibration`); null where there is none.
        calibration: with a reference for the column.
        minimum: on the human scale.
        confidence: of the kept set, in (0, 1).
        column: `overall` or a dimension.

    Returns:
        Keep what is strictly above: −inf keeps all, +inf none.

    Raises:
        UsageError: no reference for the column, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence:g}: give a share between 0 and 1, like 0.9")
    reference = calibration.references.get(column)
    if reference is None:
        known = ", ".join(calibration.references) or "nothing"
        raise UsageError(f"the calibration has no human scores of '{column}', only of {known}")
    human_N = np.round(np.asarray(reference.human, dtype=np.float64), DECIMALS)
    null_desc = -np.sort(-np.asarray(reference.score, dtype=np.float64)[human_N < minimum])
    found = scores.drop_nulls().cast(pl.Float64).round(DECIMALS).to_numpy()
    found = np.sort(found[np.isfinite(found)])
    # Step r keeps what lies above the r-th highest null score, counted from 0; the last step keeps all.
    cuts = np.append(null_desc, -np.inf)
    kept = found.size - np.searchsorted(found, cuts, side="right")
    p_values = (1 + np.arange(cuts.size)) / (human_N.size + 1)
    alpha = round(1 - confidence, 12)
    passing = np.flatnonzero((kept > 0) & (p_values * found.size <= alpha * kept * (1 + 1e-12)))
    return float(cuts[passing[-1]]) if passing.size else float("inf")


def select_confident(
    scores: pl.Series, calibration: Calibration, minimum: float, confidence: float, column: str = OVERALL
) -> pl.Series:
    """Mask of the scores that `confident_threshold` keeps; null scores are not kept."""
    threshold = confident_threshold(scores, calibration, minimum, confidence, column)
    numbers = scores.cast(pl.Float64).round(DECIMALS)
    return (numbers.is_finite() & (numbers > threshold)).fill_null(value=False)


def write_calibration(calibration: Calibration, out: str) -> None:
    """Write calibration.json, whole or not at all."""
    folder, name = split_out(out)
    body = {"zscore_calibration": FILE_VERSION, "guarantee": GUARANTEE, **asdict(calibration)}
    with open_store(folder).write(name) as stream:
        stream.write((json.dumps(body, indent=1, allow_nan=False) + "\n").encode())


def read_calibration(source: str) -> Calibration:
    """Read calibration.json.

    Raises:
        TableError: missing, of another version, or not a calibration.
    """
    try:
        body = json.loads(read_text(source))
        version = body.pop("zscore_calibration")
        if version != FILE_VERSION:
            raise TableError(f"{source} is a calibration of version {version}; this zscore reads {FILE_VERSION}")
        return Calibration(
            values=tuple(body["values"]),
            dimensions=tuple(body["dimensions"]),
            fits={name: Fit(**fit) for name, fit in body["fits"].items()},
            references={
                name: Reference(tuple(pairs["score"]), tuple(pairs["human"]))
                for name, pairs in body["references"].items()
            },
            provenance=body["provenance"],
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise TableError(f"{source} isn't a calibration made by `zscore calibrate`: {error}") from error


def check_made_for(calibration: Calibration, metadata: dict[str, Any], source: str) -> None:
    """Refuse scores that were made with another rubric or model than the calibration.

    Raises:
        TableError: naming what differs.
    """
    for field, key in (("rubric", "hash"), ("model", "id"), ("model", "weights")):
        ours, theirs = calibration.provenance.get(field, {}).get(key), metadata.get(field, {}).get(key)
        if ours != theirs:
            raise TableError(
                f"{source} was scored with {field} {key} {theirs!r}, the calibration is for {ours!r}: calibrate anew"
            )
