"""Reasonings that are given as data: what a larger judge said of each picture and dimension, and its score.

A JSON object a line: key, dimension, reasoning, score; and shard and index where keys repeat.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zscore.errors import TableError
from zscore_trainers.rewarddance import Told
from zscore_trainers.sequences import given
from zscore_trainers.targets import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from zscore.records import Sample
    from zscore.rubrics.rubric import Rubric
    from zscore_trainers.data import Collator


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of one picture on one dimension."""

    reasoning: str
    level: int


class ToldTable:
    """All of a file, by sample; `in` tells whether something is said of it."""

    def __init__(self, words: dict[object, dict[int, Words]], rubric: Rubric, source: str) -> None:
        self._words = words
        self._rubric = rubric
        self._source = source
        self.left_out: dict[str, int] = {}
        """Nothing: a line that can't be used is an error."""

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, sample: Sample) -> bool:
        return self._of(sample) is not None

    def _of(self, sample: Sample) -> dict[int, Words] | None:
        return self._words.get((sample.shard, sample.index)) or self._words.get(sample.key)

    def check(self, samples: Iterable[Sample]) -> None:
        """Refuse lines that may be about several of all samples of the shards.

        Raises:
            TableError: names the key and two of its samples.
        """
        first: dict[str, Sample] = {}
        for sample in samples:
            if sample.key not in self._words:
                continue
            here = f"sample {sample.index} of {sample.shard}"
            if (sample.shard, sample.index) in self._words:
                both = f"has lines by its key '{sample.key}' and by its shard and index"
                raise TableError(f"{self._source}: {here} {both}: give all of them shard and index")
            other = first.setdefault(sample.key, sample)
            if other is not sample:
                whose = f"key '{sample.key}' is of sample {other.index} of {other.shard} and {here}"
                raise TableError(f"{self._source}: {whose}: give shard and index in its lines")

    def target(self, sample: Sample) -> NDArray[np.float32]:
        """All mass on the given levels, (D, K); NaN where nothing is said of a dimension."""
        target_DK = np.full((len(self._rubric.names), len(self._rubric.values)), np.nan, np.float32)
        for dimension, words in (self._of(sample) or {}).items():
            target_DK[dimension] = 0
            target_DK[dimension, words.level] = 1
        return target_DK

    def outputs(self, collator: Collator) -> list[Told]:
        """What the policy is to write for the samples of a set."""
        return [
            Told(number, dimension, given(collator.builder, self._rubric, words.reasoning, words.level))
            for number, sample in enumerate(collator.train.samples)
            for dimension, words in sorted((self._of(sample) or {}).items())
        ]


def read_told(source: str, rubric: Rubric) -> ToldTable:
    """Read a file of given reasonings.

    Raises:
        TableError: a line that can't be used; names it.
    """
    try:
        lines = Path(source).read_text(encoding="utf-8").split("\n")  # splitlines() cuts at separators within a string
    except UnicodeDecodeError as error:
        raise TableError(f"{source} isn't text: reasonings are given as lines of JSON (reasoning.jsonl)") from error
    except OSError as error:
        raise TableError(f"{source} can't be read: {error}") from error
    words: dict[object, dict[int, Words]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            sample = (str(said["shard"]), int(said["index"])) if "shard" in said else said["key"]
            hash(sample)
            dimension = rubric.names.index(said["dimension"])
            found = Words(str(said["reasoning"]), _level(float(said["score"]), rubric.values))
        except (ValueError, KeyError, TypeError) as error:
            wanted = "a JSON object with key, dimension (of the rubric), reasoning and score is wanted"
            raise TableError(f"{source}, line {number}: {wanted} ({error})") from error
        if dimension in words.setdefault(sample, {}):
            raise TableError(f"{source}, line {number}: {sample} has a reasoning on {said['dimension']} already")
        words[sample][dimension] = found
    if not words:
        raise TableError(f"{source} is empty: nothing to train on")
    return ToldTable(words, rubric, source)


def _level(score: float, values: Sequence[float]) -> int:
    if not values[0] <= score <= values[-1]:
        raise ValueError(f"a score of {score} is outside {values[0]:g} to {values[-1]:g}")
    return int(nearest(np.array([score]), values)[0])
