"""Scores from reasoning, as an engine: what a generator writes, read at the position of its score."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from zscore.reasoning import from_level_logits, no_score
from zscore.records import Failure, LevelScores, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore.engines.generate import Generator, Output
    from zscore.reasoning import ReasoningOptions, ScoreFinder
    from zscore.records import EnginePrompt


class ReasoningEngine:
    """Lets the model reason and reads its distribution at the score (see `zscore.engines.base.Engine`).

    Args:
        generator: writes the outputs.
        finder: knows where a score stands.
        level_values: what each level is worth.
        options: how reasonings are drawn.
    """

    lockstep = True

    def __init__(
        self, generator: Generator, finder: ScoreFinder, level_values: Sequence[float], options: ReasoningOptions
    ) -> None:
        self._generator = generator
        self._finder = finder
        self._values = level_values
        self._options = options
        self.name, self.version, self.dtype = generator.name, generator.version, generator.dtype
        self.max_in_flight, self.max_tokens = generator.max_in_flight, generator.max_tokens

    def submit(self, tag: int, prompt: EnginePrompt) -> None:
        """Queue one prompt; what is drawn depends on its words, its number and the run's seed."""
        self._generator.submit(tag, prompt, draw_seed(self._options.seed, prompt))

    def step(self) -> list[tuple[int, LevelScores | Failure]]:
        """Advance; an output without a score is a failure."""
        return [
            (tag, found if isinstance(found, Failure) else self._scores(found)) for tag, found in self._generator.step()
        ]

    def _scores(self, output: Output) -> LevelScores | Failure:
        at = self._finder.find(output.tokens)
        if at is None:
            return no_score(len(output.tokens), self._options.max_tokens)
        logits_K = output.level_logprob_TK[at]
        if not np.isfinite(logits_K).all():
            return Failure(Status.NONFINITE_SCORE, "the model gave NaN or infinite scores: try --dtype float32")
        scores = from_level_logits(logits_K, self._values)
        words = self._finder.words(output.tokens, at)
        return LevelScores(scores.probs_DK, scores.mean_D, scores.std_D, scores.entropy_D, (words,), len(output.tokens))

    def close(self) -> None:
        """Free the model."""
        self._generator.close()


def draw_seed(seed: int, prompt: EnginePrompt) -> int:
    """A seed of 63 bits for one reasoning."""
    words = hashlib.sha256(f"{seed} {prompt.draw}".encode() + np.asarray(prompt.token_ids, "<u4").tobytes())
    words.update(prompt.pixels.patches_NCPP.tobytes())
    return int.from_bytes(words.digest()[:8], "big") >> 1
