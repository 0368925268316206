"""What a model that reasons writes, read back: where its score stands, what it says, and several of them averaged.

    output tokens → ScoreFinder → position of the score, reasoning text
    LevelScores of all reasonings → merge → LevelScores of a sample

Array legend: D dimensions, K levels, R reasonings about one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zscore.errors import RubricError, UsageError
from zscore.records import Failure, LevelScores, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zscore.rubrics.rubric import Rubric


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningOptions:
    """How reasonings are drawn."""

    samples: int = 1
    """Reasonings a picture and dimension; their distributions are averaged."""
    temperature: float = 1.0
    """Of the words; the score's distribution is always read at 1."""
    max_tokens: int = 1024
    """Longest output; one without a score by then has none."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be meant.

        Raises:
            UsageError: names the option.
        """
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: at least 1")
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"--temperature {self.temperature}: 0 (the likeliest words) to 10")
        if self.max_tokens < 2:
            raise UsageError(f"--max-output-tokens {self.max_tokens}: at least 2, a word and the score")


class ScoreFinder:
    """Finds the score in an output: the level token right behind the last marker.

    Works on text, since a model may spell the marker with other tokens than a tokenizer would.

    Args:
        decode: token ids → text.
        marker: what stands before the score, like `Score: `.
        level_token_ids: the K level tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], marker: str, level_token_ids: Sequence[int]) -> None:
        if not marker.strip():
            raise RubricError("no marker: [layouts.reasoning] of the rubric must say what stands before the score")
        self.marker = marker
        self._decode = decode
        self._marker = marker.strip()
        self._levels = frozenset(level_token_ids)
        self._window = 4 * len(self._marker.encode())  # tokens that surely hold the marker and blanks around it

    def ends_here(self, output: Sequence[int]) -> bool:
        """Whether the last token is a score."""
        if not output or output[-1] not in self._levels:
            return False
        return self._decode(list(output[-1 - self._window : -1])).rstrip().endswith(self._marker)

    def find(self, output: Sequence[int]) -> int | None:
        """Position of the score token; None where there is none. Digits inside the reasoning don't count."""
        for at in range(len(output) - 1, -1, -1):
            if output[at] in self._levels and self.ends_here(output[: at + 1]):
                return at
        return None

    def words(self, output: Sequence[int], score_at: int) -> str:
        """The reasoning: what stands before the marker."""
        return self._decode(list(output[:score_at])).rstrip().removesuffix(self._marker).strip()


def finder(rubric: Rubric, decode: Callable[[Sequence[int]], str], level_token_ids: Sequence[int]) -> ScoreFinder:
    """The finder of a rubric's scores.

    Raises:
        RubricError: the rubric has no reasoning layout.
    """
    return ScoreFinder(decode, rubric.reasoning_marker, level_token_ids)


def from_level_logits(logits_K: np.ndarray, values: Sequence[float]) -> LevelScores:
    """Eqs. 1 and 2: the distribution at the score's position, one dimension."""
    shifted_K = np.exp(logits_K.astype(np.float64) - logits_K.max())
    return _described((shifted_K / shifted_K.sum())[None], values)


def merge(parts: Sequence[LevelScores | Failure], dimensions: int, values: Sequence[float]) -> LevelScores | Failure:
    """Scores of a sample from its reasonings, those about one dimension next to each other.

    The distribution of a dimension is the mean of those of its R reasonings; one without a score is left out, but its
    tokens count. A sample is scored on all dimensions or has failed: no row of a table is half a score.

    Returns:
        Scores, or the first failure where a dimension has no reasoning with a score.
    """
    each = len(parts) // dimensions
    probs_DK = []
    for first in range(0, len(parts), each):
        found = [part for part in parts[first : first + each] if isinstance(part, LevelScores)]
        if not found:
            return next(part for part in parts[first : first + each] if isinstance(part, Failure))
        probs_DK.append(np.mean([part.probs_DK[0] for part in found], axis=0, dtype=np.float64))
    return _described(
        np.stack(probs_DK),
        values,
        tuple(part.reasoning[0] if isinstance(part, LevelScores) else "" for part in parts),
        sum(part.output_tokens for part in parts),
    )


def _described(
    probs_DK: np.ndarray, values: Sequence[float], reasoning: tuple[str, ...] = (), output_tokens: int = 0
) -> LevelScores:
    values_K = np.asarray(values, dtype=np.float64)
    mean_D = probs_DK @ values_K
    variance_D = (probs_DK * (values_K - mean_D[:, None]) ** 2).sum(-1)
    entropy_D = -(probs_DK * np.log(np.where(probs_DK > 0, probs_DK, 1))).sum(-1)
    return LevelScores(
        probs_DK=probs_DK.astype(np.float32),
        mean_D=mean_D.astype(np.float32),
        std_D=np.sqrt(variance_D).astype(np.float32),
        entropy_D=entropy_D.astype(np.float32),
        reasoning=reasoning,
        output_tokens=output_tokens,
    )


def no_score(tokens: int, limit: int) -> Failure:
    """The failure of an output without a score."""
    cut = f"the model wrote {tokens} tokens and no score: raise --max-output-tokens (now {limit})"
    ended = f"the model ended its answer after {tokens} tokens without a score: was it trained to reason?"
    return Failure(Status.NO_SCORE, cut if tokens >= limit else ended, tokens)
