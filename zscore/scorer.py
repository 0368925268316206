"""The library: `Scorer(model).score([(prompt, image), …])`."""

from __future__ import annotations

import itertools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from zscore import images
from zscore.errors import SampleError, UsageError
from zscore.judge import JudgeOptions, plan_judge
from zscore.records import Failure, LevelScores, Pixels, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray
    from PIL.Image import Image

    from zscore.engines.base import Engine

    Picture = Image | NDArray[np.uint8] | bytes | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class LevelDistribution:
    """A distribution over rubric levels (paper eq. 1) and its summary."""

    probs: NDArray[np.float32]
    """Shape (K,), in the order of `values`; sums to 1."""
    values: tuple[float, ...]
    """Rubric value of each level, shape (K,)."""
    mean: float
    """Expected level value (paper eq. 2)."""
    std: float
    """In rubric units."""
    entropy: float
    """In nats."""

    def at_least(self, value: float) -> float:
        """P(score ≥ value) under the distribution."""
        return float(self.probs[np.asarray(self.values) >= value].sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Score:
    """What one picture got: a distribution per dimension."""

    dimensions: Mapping[str, LevelDistribution]
    """By dimension name, in rubric order."""
    overall: float
    """Mean of the dimensions' means."""
    reasoning: tuple[str, ...] = ()
    """With `layout="reasoning"`: what the model wrote, dimension after dimension."""

    def __getitem__(self, dimension: str) -> LevelDistribution:
        return self.dimensions[dimension]


class Scorer:
    """Scores pictures in this process. Keep one and call it often: making it loads the model.

        with Scorer("path/to/student") as scorer:
            (score,) = scorer.score([("a red cube on a table", "cube.png")])
        score["alignment"].mean, score["alignment"].probs, score.overall

    Args:
        model: checkpoint folder or hub id; None for `ZSCORE_MODEL`, else the demo student (with a warning).
        options: everything else about the judge (rubric, layout, engine, dtype, image budget), as keywords.

    Raises:
        ZscoreError: the model can't be loaded, or an option is wrong.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        try:
            chosen = JudgeOptions(model=None if model is None else os.fspath(model), **options)
        except TypeError as error:
            raise UsageError(f"Scorer: {error}") from error
        self._judge = plan_judge(chosen)
        for notice in self._judge.notices:
            warnings.warn(notice, stacklevel=2)
        self._engine: Engine | None = self._judge.engine()
        self._tags = itertools.count()

    def score(
        self, pairs: Iterable[tuple[str, Picture]], *, on_error: Literal["raise", "return"] = "raise"
    ) -> list[Score | Failure]:
        """Score (prompt, picture) pairs; pictures are PIL images, uint8 arrays (H, W, 3), encoded bytes or paths.

        Args:
            pairs: any number; at most the engine's batch is held decoded at once.
            on_error: `raise` stops at the first picture that can't be scored; `return` puts a `Failure` in its place.

        Returns:
            One entry a pair, in order: a `Score`, or with `on_error="return"` possibly a `Failure`.

        Raises:
            SampleError: a picture can't be read or a prompt is too long (only with `on_error="raise"`).
        """
        if on_error not in {"raise", "return"}:
            raise UsageError(f"on_error={on_error!r}: choose 'raise' or 'return'")
        if self._engine is None:
            raise UsageError("this Scorer is closed: make a new one")
        parts: dict[int, list[LevelScores | Failure | None]] = {}
        tags: dict[int, tuple[int, int]] = {}
        for number, (prompt, picture) in enumerate(pairs):
            built = self._prompts(prompt, picture)
            if isinstance(built, Failure):
                if on_error == "raise":
                    self._drain(tags, parts)
                    raise SampleError(f"pair {number}: {built.status}: {built.error}")
                parts[number] = [built]
                continue
            parts[number] = [None] * len(built)
            for position, engine_prompt in enumerate(built):
                tag = next(self._tags)
                tags[tag] = (number, position)
                self._engine.submit(tag, engine_prompt)
            while len(tags) >= self._engine.max_in_flight:
                self._step(tags, parts)
        self._drain(tags, parts)
        return list(self._results(parts, on_error))

    def _prompts(self, prompt: str, picture: Picture) -> list[Any] | Failure:
        if not isinstance(prompt, str):
            return Failure(Status.BAD_TEXT, f"the prompt is a {type(prompt).__name__}; a str is wanted")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            return Failure(Status.BAD_TEXT, "the prompt has half of a surrogate pair: decode it as UTF-8 first")
        pixels = self._pixels(picture)
        return pixels if isinstance(pixels, Failure) else self._judge.builder.build(prompt, pixels)

    def _pixels(self, picture: Picture) -> Pixels | Failure:
        options = self._judge.pixels
        if isinstance(picture, str | os.PathLike):
            try:
                picture = Path(picture).read_bytes()
            except OSError as error:
                return Failure(Status.MISSING_IMAGE, f"can't read {os.fspath(picture)!s}: {error.strerror}")
        if isinstance(picture, bytes | bytearray | memoryview):
            return images.load(bytes(picture), options)
        return images.load_array(picture, options)

    def _step(self, tags: dict[int, tuple[int, int]], parts: dict[int, list[LevelScores | Failure | None]]) -> None:
        assert self._engine is not None
        for tag, result in self._engine.step():
            if tag in tags:  # else it is left over from a call that was interrupted
                number, position = tags.pop(tag)
                parts[number][position] = result

    def _drain(self, tags: dict[int, tuple[int, int]], parts: dict[int, list[LevelScores | Failure | None]]) -> None:
        while tags:
            self._step(tags, parts)

    def _results(
        self, parts: dict[int, list[LevelScores | Failure | None]], on_error: str
    ) -> Iterator[Score | Failure]:
        for number in sorted(parts):
            found = parts[number]
            # A pair that couldn't be built has one result, whatever the layout.
            failed = isinstance(found[0], Failure) and len(found) == 1
            result = found[0] if failed else self._judge.combine([part for part in found if part is not None])
            if isinstance(result, LevelScores):
                yield self._score(result)
                continue
            assert result is not None
            if on_error == "raise":
                raise SampleError(f"pair {number}: {result.status}: {result.error}")
            yield result

    def _score(self, scores: LevelScores) -> Score:
        values = self._judge.rubric.values
        dimensions = {
            name: LevelDistribution(
                probs=scores.probs_DK[d],
                values=values,
                mean=float(scores.mean_D[d]),
                std=float(scores.std_D[d]),
                entropy=float(scores.entropy_D[d]),
            )
            for d, name in enumerate(self._judge.rubric.names)
        }
        return Score(dimensions, float(scores.mean_D.mean(dtype=np.float64)), scores.reasoning)

    def close(self) -> None:
        """Free the model. Idempotent."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
