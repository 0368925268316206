"""Preference pairs from ranked candidates, in the columns that TRL's DPO trainers read.

TRL takes `prompt`, `chosen` and `rejected` as text; here the two name pictures, as `SHARD/KEY`. Shard, index, key and
sha256 of both sides stand in columns of their own, so that a loader can put the pictures themselves in their place.
There is no column `images`: TRL takes that for what the prompt shows.

Rows that have a score and no distribution (nothing, NaN, infinity or less than 0 at a level, no mass at all) are in no
pair.

`probability` is P(chosen > rejected) + ½ P(chosen = rejected) under the model's own distributions, the two pictures
and the dimensions taken as independent.

Array legend: P pairs, R rows, K levels, G groups, n candidates of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from zscore.errors import TableError, UsageError
from zscore.expressions import preference
from zscore.parquet import TableWriter
from zscore.table_output import fetch
from zscore.tables import ROW, looked_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from zscore.expressions import ScoreExpression
    from zscore.ranking import Ranking
    from zscore.tables import Scores

# A gap that is 0.5 on paper may be 0.4999998 between float32 scores.
SLACK = 1e-6
# All pairs of a larger group don't fit in memory, and nobody trains on 8 million pairs of one prompt.
MAX_CANDIDATES = 4096
# Both sides of as many pairs take about 0.5 GB while they are written.
PAIRS_AT_ONCE = 400_000
_SIDE = (("shard", pa.string()), ("index", pa.int32()), ("key", pa.string()), ("sha256", pa.string()))
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("prompt", "chosen", "rejected", "group")),
        *(
            (f"{side}_{name}", kind)
            for side in ("chosen", "rejected")
            for name, kind in (*_SIDE, ("score", pa.float32()))
        ),
        ("gap", pa.float32()),
        ("probability", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Chosen pairs, by row numbers, group by group in the order of the input."""

    chosen_P: NDArray[np.uint32]
    rejected_P: NDArray[np.uint32]
    chosen_score_P: NDArray[np.float32]
    rejected_score_P: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.chosen_P)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """Which pairs of a group are taken: the widest gaps first; of equal ones those of better rank."""

    min_gap: float = 0.0
    """Least difference of scores; equal scores never make a pair."""
    max_pairs: int | None = 1
    """Per group; None takes all."""

    def check(self, scores: Scores, expression: ScoreExpression) -> None:
        """Refuse what can't be paired, before anything is computed.

        Raises:
            UsageError: a bound that can't hold, or a score whose distribution isn't known.
            TableError: a column that pairs need is missing.
        """
        if not 0 <= self.min_gap < float("inf"):
            raise UsageError(f"--min-gap {self.min_gap:g}: give 0 or more")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise UsageError(f"--max-pairs {self.max_pairs}: give 1 or more")
        expression.check_independent()
        scores.require("prompt", *(name for name, _ in _SIDE), *(f"{name}_probs" for name in expression.leaves()))
        if not scores.values:
            raise TableError("--pairs: the files' rubrics have different levels; pair them one by one")


def has_distribution(scores: Scores, expression: ScoreExpression) -> pl.Expr:
    """Whether a row has one in every dimension that the score reads."""
    found = []
    for name in dict.fromkeys(expression.leaves()):
        column, length = f"{name}_probs", len(scores.values)
        levels = [scores.level(column, k).cast(pl.Float64) for k in range(length)]
        found += [level.is_finite() & (level >= 0) for level in levels]
        # One level more than the rubric has would be none of its distributions either.
        found += [pl.sum_horizontal(levels) > 0, scores.level(column, length).is_null()]
    return pl.all_horizontal(found).fill_null(value=False)


def choose_pairs(ranking: Ranking, options: PairOptions) -> Pairs:
    """Choose pairs.

    Raises:
        UsageError: a group is too large for all its pairs.
    """
    scores_M = ranking.scores()
    better, worse, group = [], [], []
    for groups, at in ranking.by_size():
        for chunk, of_group in _split(groups, at, options):
            found, one, two = _pairs_of(scores_M[of_group].astype(np.float64), options)
            better.append(of_group[found, one])
            worse.append(of_group[found, two])
            group.append(ranking.first_G[chunk[found]])
    empty = np.zeros(0, dtype=np.int64)
    better_P, worse_P = np.concatenate([empty, *better]), np.concatenate([empty, *worse])
    order_P = np.argsort(np.concatenate([empty, *group]), kind="stable")
    better_P, worse_P = better_P[order_P], worse_P[order_P]
    rows_M = ranking.rows()
    return Pairs(rows_M[better_P], rows_M[worse_P], scores_M[better_P], scores_M[worse_P])


def _split(
    groups: NDArray[np.int64], at: NDArray[np.int64], options: PairOptions
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Groups of one size, so many at a time that 2²² pairs are looked at."""
    size = at.shape[1]
    if size < 2:
        return
    if options.max_pairs != 1 and size > MAX_CANDIDATES:
        raise UsageError(
            f"a group has {size} candidates, pairs are taken from at most {MAX_CANDIDATES}:"
            " pass --max-pairs 1, or group by something finer with --by"
        )
    looked_at = size if options.max_pairs == 1 else size * (size - 1) // 2
    parts = -(-len(groups) * looked_at // (1 << 22))
    yield from zip(np.array_split(groups, parts), np.array_split(at, parts), strict=True)


def _pairs_of(
    score_Gn: NDArray[np.float64], options: PairOptions
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Group, rank of the chosen and rank of the rejected for every pair that is taken; scores descend."""
    size = score_Gn.shape[1]
    if options.max_pairs == 1:
        # Widest: the first of the best and the first of the worst.
        one = np.zeros((len(score_Gn), 1), dtype=np.int64)
        two = np.argmax(score_Gn == score_Gn[:, -1:], axis=1)[:, None]
    else:
        all_one, all_two = np.triu_indices(size, 1)
        order = np.argsort(score_Gn[:, all_two] - score_Gn[:, all_one], axis=1, kind="stable")[:, : options.max_pairs]
        one, two = all_one[order], all_two[order]
    gap = np.take_along_axis(score_Gn, one, axis=1) - np.take_along_axis(score_Gn, two, axis=1)
    group, place = np.nonzero((gap > 0) & (gap >= options.min_gap - SLACK))
    return group, one[group, place], two[group, place]


def write_pairs(
    scores: Scores, pairs: Pairs, stream: IO[bytes], metadata: dict[str, Any], *, by: str, expression: ScoreExpression
) -> None:
    """Write the pairs, a batch at a time; each batch reads the rows that it needs."""
    with TableWriter(stream, SCHEMA) as writer:
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            batch = slice(start, start + PAIRS_AT_ONCE)
            writer.write(_batch(scores, by, expression, pairs, batch))
        writer.close(metadata)


def _batch(scores: Scores, by: str, expression: ScoreExpression, pairs: Pairs, batch: slice) -> pa.Table:
    chosen_P, rejected_P = pairs.chosen_P[batch], pairs.rejected_P[batch]
    rows_R = np.unique(np.concatenate([chosen_P, rejected_P]))
    found = _rows(scores, by, expression, rows_R)
    at = {"chosen": np.searchsorted(rows_R, chosen_P), "rejected": np.searchsorted(rows_R, rejected_P)}
    sides = {side: found[place] for side, place in at.items()}
    columns: dict[str, Any] = {"prompt": sides["chosen"]["prompt"]}
    columns |= {
        side: pl.select(pl.format("{}/{}", rows["shard"], rows["key"])).to_series() for side, rows in sides.items()
    }
    columns["group"] = sides["chosen"]["__group"]
    score_P = {"chosen": pairs.chosen_score_P[batch], "rejected": pairs.rejected_score_P[batch]}
    for side, rows in sides.items():
        columns |= {f"{side}_{name}": rows[name] for name, _ in _SIDE}
        columns[f"{side}_score"] = score_P[side]
    columns["gap"] = score_P["chosen"] - score_P["rejected"]
    support = {name: _distributions(found[f"{name}_probs"]) for name in expression.leaves()}
    probs_PS = [
        expression.distribution({name: probs_RK[place] for name, probs_RK in support.items()}, scores.values)[1]
        for place in at.values()
    ]
    columns["probability"] = preference(*probs_PS).astype(np.float32)
    return pl.DataFrame(columns).to_arrow().cast(SCHEMA)


def _rows(scores: Scores, by: str, expression: ScoreExpression, rows_R: NDArray[np.uint32]) -> pl.DataFrame:
    """The columns that a pair needs, for these rows (ascending)."""
    low, high = int(rows_R[0]), int(rows_R[-1]) + 1
    mask = np.zeros(high - low, dtype=bool)
    mask[rows_R - low] = True
    rows = scores.frame.slice(low, high - low).with_row_index(ROW).filter(looked_up(mask, pl.Boolean))
    text = ["prompt", *(name for name, _ in _SIDE if name != "index")]
    wanted = [
        *(pl.col(name).cast(pl.String) for name in text),
        pl.col("index"),
        pl.col(by).cast(pl.String).alias("__group"),
        *(pl.col(f"{name}_probs") for name in expression.leaves()),
    ]
    return fetch(rows.select(wanted), scores.name)


def _distributions(lists: pl.Series) -> NDArray[np.float64]:
    """(R, K) from a column of lists."""
    return lists.explode().to_numpy().astype(np.float64).reshape(len(lists), -1)
