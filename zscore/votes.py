"""Good/same/bad: side-by-side votes on two systems, and the net share that the first one wins (paper eq. 21)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from zscore.agreement import Bootstrap, Estimate
from zscore.errors import TableError
from zscore.human import read_columns

# Good: the first (new, left) picture is better. The last row is GenAI-Arena's wording.
WORDS = {
    **dict.fromkeys(("good", "g", "better", "win", "1", "+1", "leftvote", "left"), "good"),
    **dict.fromkeys(("same", "s", "tie", "0", "equal", "tievote", "bothbad_vote"), "same"),
    **dict.fromkeys(("bad", "b", "worse", "loss", "lose", "-1", "rightvote", "right"), "bad"),
}
OUTCOMES = ("good", "same", "bad")
VOTE_COLUMNS = ("vote", "gsb", "vote_type")
PROMPT_COLUMNS = ("group", "prompt_id", "prompt")


@dataclass(frozen=True, slots=True)
class Gsb:
    """Counts and the score of eq. 21."""

    good: int
    same: int
    bad: int
    prompts: int
    gsb: Estimate


def read_votes(source: str) -> pl.DataFrame:
    """Votes per row: columns good, same, bad (counts, int64) and prompt (text; a row without one is its own).

    Args:
        source: CSV or parquet with a `vote` column (good, same, bad; also g/s/b and 1/0/-1) or with one column of
            counts per outcome. A `prompt_id` (or `group`, `prompt`) column says which votes belong together.

    Raises:
        TableError: neither is there, or a vote is none of the known words.
    """
    frame = read_columns(source)
    by_name = {name.lower(): name for name in frame.columns}
    vote = next((by_name[name] for name in VOTE_COLUMNS if name in by_name), None)
    if vote is not None:
        word = pl.col(vote).cast(pl.String).str.strip_chars().str.to_lowercase()
        kind = word.replace_strict(WORDS, default=None, return_dtype=pl.String)
        wrong = frame.filter(kind.is_null())
        if wrong.height:
            raise TableError(
                f"{source}: {wrong.height:,} votes are neither good, same nor bad; the first: {wrong[vote][0]!r}"
            )
        counts = [(kind == outcome).cast(pl.Int64).alias(outcome) for outcome in OUTCOMES]
    elif all(outcome in by_name for outcome in OUTCOMES):
        counts = [pl.col(by_name[name]).cast(pl.Int64, strict=False).alias(name) for name in OUTCOMES]
    else:
        raise TableError(
            f"{source} has neither a 'vote' column nor the columns good, same, bad; it has {', '.join(frame.columns)}"
        )
    given = next((pl.col(by_name[name]) for name in PROMPT_COLUMNS if name in by_name), pl.lit(None))
    text = given.cast(pl.String)
    prompt = pl.coalesce(pl.when(text.str.strip_chars() != "").then(text), pl.format("\0{}", pl.int_range(pl.len())))
    votes = frame.select(prompt.alias("prompt"), *counts)
    broken = votes.filter(pl.any_horizontal(pl.col(OUTCOMES).is_null() | (pl.col(OUTCOMES) < 0)))
    if broken.height:
        raise TableError(
            f"{source}: {broken.height:,} rows whose counts aren't whole numbers; the first: {broken.row(0)}"
        )
    return votes


def gsb(votes: pl.DataFrame, bootstrap: Bootstrap) -> Gsb:
    """The score (G − B) / (G + S + B) with an interval over prompts (paper eq. 21)."""
    per_prompt = votes.group_by("prompt", maintain_order=True).agg(pl.col(OUTCOMES).sum())
    counts_G3 = per_prompt.select(OUTCOMES).to_numpy().astype(np.float64)
    good, same, bad = (int(count) for count in counts_G3.sum(axis=0))
    total = good + same + bad
    value = (good - bad) / total if total else None
    points = {"gsb": Estimate(value, undefined="" if total else "no votes")}

    def replicated(W_BG: np.ndarray) -> np.ndarray:
        good_B, same_B, bad_B = (W_BG @ counts_G3).T
        votes_B = good_B + same_B + bad_B
        return np.where(votes_B > 0, (good_B - bad_B) / np.maximum(votes_B, 1), np.nan)

    bootstrap.estimates(points, {"gsb": replicated}, (per_prompt.height, per_prompt.height))
    return Gsb(good, same, bad, per_prompt.height, points["gsb"])
