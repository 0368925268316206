"""A calibration: what it does to the model's distributions, and which pictures it lets one keep with confidence.

Every fitted dimension has a temperature T and a shift b (`zscore.fitting` finds them):

    p'_k ∝ p_k^(1/T) · exp(b · v_k)        v_k: value of level k, in rubric units

Beside them stand pairs (score, human score) of pictures that nothing was fitted to; a conformal test compares new
scores with these (`confident_threshold`).

Array legend: N samples, K levels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import polars as pl

from zscore import distribution_metrics
from zscore.errors import TableError, UsageError
from zscore.human import DECIMALS, OVERALL, read_text
from zscore.store import open_store, split_out
from zscore.table_metadata import difference, shown

if TYPE_CHECKING:
    from zscore.agreement import Floats

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)

GUARANTEE = (
    "If the rated samples and the scored ones are exchangeable, the kept set's expected share of samples whose human "
    "score is below the minimum is at most 1 - confidence. The expectation is over the draw of both; an empty set "
    "counts as share 0; in a single run the share may be higher."
)
FILE_VERSION = 1


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
    """How the scores were made (`table_metadata.identity`): others are refused. Settings, files, what was left out."""


def recalibrated(probs_NK: Floats, values_K: Floats, temperature: float, shift: float) -> Floats:
    """Distributions at another temperature, shifted along the levels."""
    return softmax(floored_log(probs_NK) / temperature + shift * values_K)


def floored_log(probs_NK: Floats) -> Floats:
    """Log-probabilities, each at least that of `distribution_metrics.FLOOR`."""
    # float32 underflow isn't certainty: a floor lets a high temperature bring mass back.
    return np.asarray(np.log(np.maximum(probs_NK, distribution_metrics.FLOOR)))


def softmax(logits_NK: Floats) -> Floats:
    """Distributions from logits, over the last axis."""
    weights_NK = np.exp(logits_NK - logits_NK.max(axis=-1, keepdims=True))
    return np.asarray(weights_NK / weights_NK.sum(axis=-1, keepdims=True))


def apply_calibration(frame: Frame, calibration: Calibration) -> Frame:
    """The scores with every fitted dimension's distribution, mean, std and entropy renewed, and `overall` from them.

    Raises:
        TableError: the frame has no distributions of a fitted dimension, or an `overall` without its dimensions.
    """
    columns = frame.collect_schema().names()
    fitted = [name for name, fit in calibration.fits.items() if not fit.is_identity]
    for name in fitted:
        if f"{name}_probs" not in columns:
            raise TableError(f"the scores have no column {name}_probs, which --calibration needs: keep all columns")
    if not fitted:
        return frame
    missing = [name for name in calibration.dimensions if name not in columns]
    if OVERALL in columns and missing:
        raise TableError(
            f"the scores have '{OVERALL}' but no column {', '.join(missing)}, so that it can't be renewed and would "
            f"stand raw among calibrated scores: keep all dimensions, or leave '{OVERALL}' out too"
        )
    values_K = np.asarray(calibration.values)
    frame = frame.with_columns(_renewed(name, calibration.fits[name], values_K) for name in fitted)
    for name in fitted:
        parts = {name: "mean", f"{name}_std": "std", f"{name}_entropy": "entropy", f"{name}_probs": "probs"}
        kept = {column: part for column, part in parts.items() if column in columns}
        struct = pl.col(f".{name}").struct
        frame = frame.with_columns(struct.field(part).alias(column) for column, part in kept.items())
    frame = frame.drop([f".{name}" for name in fitted])
    if OVERALL in columns:
        means = pl.mean_horizontal(pl.col(list(calibration.dimensions)).cast(pl.Float64), ignore_nulls=False)
        frame = frame.with_columns(means.cast(pl.Float32).alias(OVERALL))
    return frame


def _renewed(name: str, fit: Fit, values_K: Floats) -> pl.Expr:
    """A struct of mean, std, entropy and probs, named `.<dimension>`; null where there is no distribution."""
    kind = pl.Struct(
        {**dict.fromkeys(("mean", "std", "entropy"), pl.Float32), "probs": pl.Array(pl.Float32, values_K.size)}
    )

    def run(series: pl.Series) -> pl.Series:
        there = series.is_not_null()
        lists = series.filter(there)
        flat = lists.explode().to_numpy().astype(np.float64).reshape(len(lists), values_K.size)
        probs_NK = recalibrated(flat, values_K, fit.temperature, fit.shift)
        # What was no distribution must not become one: the floor would make a uniform one of zeros.
        probs_NK[~((flat >= 0).all(axis=1) & (flat.sum(axis=1) > 0))] = np.nan
        mean_N = probs_NK @ values_K
        std_N = np.sqrt(np.maximum(((values_K - mean_N[:, None]) ** 2 * probs_NK).sum(axis=1), 0))
        entropy_N = -(probs_NK * np.log(np.maximum(probs_NK, 1e-300))).sum(axis=1)
        found = pl.DataFrame(
            {"mean": mean_N, "std": std_N, "entropy": entropy_N},
            schema=dict.fromkeys(("mean", "std", "entropy"), pl.Float32),
        ).with_columns(probs=pl.Series(probs_NK.astype(np.float32), dtype=pl.Array(pl.Float32, values_K.size)))
        structs = found.to_struct(f".{name}")
        # Back to the full length: position among those that are there, null elsewhere.
        position = pl.select(pl.when(there).then(there.cum_sum().cast(pl.Int64) - 1)).to_series()
        return structs.gather(position).alias(f".{name}")

    return pl.col(f"{name}_probs").map_batches(run, return_dtype=kind, is_elementwise=True).alias(f".{name}")


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
    """Refuse scores that weren't made as those of the calibration were.

    Raises:
        TableError: naming what differs.
    """
    name = difference(calibration.provenance, metadata)
    if name:
        ours, theirs = (shown(data, name) for data in (calibration.provenance, metadata))
        raise TableError(f"{source} was scored with {name} {theirs}, the calibration is for {ours}: calibrate anew")
