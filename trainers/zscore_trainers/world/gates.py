"""Can a model be compared in the world at all? What it has to do before its scores mean anything.

    python -m zscore_trainers.world.gates scores.parquet drawn/

`scores.parquet` is of `zscore score --reasoning`, `drawn/` what `zscore_trainers.world` drew.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from zscore_trainers.world.scenes import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

SEEN = re.compile(r"Alignment: I see (.*?)\.")
VERDICT = re.compile(r"The ([\w ]+) is ([\w ,]+)\.")
THING = re.compile(r"(small|large) (\w+) (\w+) at the (\w+(?: \w+)?)(?= and |$)")


@dataclass(frozen=True, slots=True)
class Gates:
    """Shares of 1, and correlations with the truth."""

    captions: float
    """Pictures whose caption names exactly what is shown."""
    things: float
    """Things shown that a caption names with the right size, colour, form and place."""
    comparisons: float
    """Things asked for of which it is rightly said whether they are there, and in what they differ."""
    valid: float
    """Pictures with a score on every dimension."""
    plcc: dict[str, float]
    """Of the valid ones, by dimension; NaN where all scores are the same."""


def gates(scores: Path, drawn: Path) -> Gates:
    """What a model that reasons reached on a set of the world.

    Raises:
        ValueError: pictures of the set were not scored, or the table has no reasonings.
    """
    rows = pl.read_parquet(scores)
    if "reasoning" not in rows.columns:
        raise ValueError(f"{scores} has no column 'reasoning': score with --reasoning")
    said = (
        pl.read_ndjson(drawn / "reasoning.jsonl").filter(pl.col("dimension") == "alignment").select("key", "reasoning")
    )
    truth = read_truth(drawn)
    both = truth.join(said.rename({"reasoning": "wanted"}), on="key").join(rows, on="key", suffix="_found")
    if both.height != truth.height:
        raise ValueError(
            f"{truth.height - both.height:,} of {truth.height:,} pictures of {drawn} are not in {scores}: score all"
        )
    wanted = [named(f"Alignment: {text}") for text in both["wanted"]]
    found = [named(text or "") for text in both["reasoning"]]
    ok = both.filter(pl.col("status") == "ok")
    return Gates(
        captions=float(np.mean([one == other for one, other in zip(found, wanted, strict=True)])),
        things=sum(len(one & other) for one, other in zip(found, wanted, strict=True)) / sum(map(len, wanted)),
        comparisons=_right(both["reasoning"], both["wanted"]),
        valid=ok.height / both.height,
        plcc={name: float(np.corrcoef(ok[name], ok[f"{name}_found"])[0, 1]) for name in DIMENSIONS},
    )


def read_truth(drawn: Path) -> pl.DataFrame:
    """True scores of a set: key, and a column a dimension."""
    return pl.read_csv(drawn / "truth.csv").pivot("dimension", index="key", values="score")


def named(reasoning: str) -> frozenset[tuple[str, ...]]:
    """The things that a caption names: size, colour, form, place."""
    seen = SEEN.search(reasoning)
    return frozenset(THING.findall(seen[1])) if seen else frozenset()


def verdicts(reasoning: str) -> frozenset[tuple[str, str]]:
    """What is said of the things that were asked for: each with its verdict."""
    about = reasoning.partition("\n\n")[0]  # the other dimensions' words follow
    return frozenset(VERDICT.findall(about))


def _right(found: Iterable[str | None], wanted: Iterable[str]) -> float:
    """Share of the wanted verdicts that were given."""
    pairs = [(verdicts(text or ""), verdicts(said)) for text, said in zip(found, wanted, strict=True)]
    return sum(len(one & other) for one, other in pairs) / sum(len(other) for _, other in pairs)


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path)
    parser.add_argument("drawn", type=Path)
    options = parser.parse_args()
    try:
        found = gates(options.scores, options.drawn)
    except (ValueError, OSError, pl.exceptions.PolarsError) as error:
        parser.error(str(error).splitlines()[0])
    print(json.dumps(asdict(found), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
