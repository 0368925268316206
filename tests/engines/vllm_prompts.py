"""Prompts for the demo student, put together from token ids; no library needed."""

from __future__ import annotations

import numpy as np

from zscore.demo.tokenizer import IDS
from zscore.records import EnginePrompt, Failure, LevelScores, Pixels

LEVEL_IDS = tuple(range(16, 25))  # "1" … "9": bytes come first in the vocabulary, in the order of their characters
LEVEL_VALUES = tuple(1 + i / 2 for i in range(9))
WINDOW = 9  # tokens from the first probe to the end of a joint prompt
IMAGE = IDS["<|image_pad|>"]


def pixels(seed: int, grid: tuple[int, int] = (8, 8)) -> Pixels:
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (grid[0] * grid[1], 3, 16, 16), dtype=np.uint8)
    return Pixels(patches, grid, grid[1] * 16, grid[0] * 16)


def joint(seed: int, grid: tuple[int, int] = (8, 8), *, words: int = 30, picture: Pixels | None = None) -> EnginePrompt:
    """A prompt with four probes, the last at its last token."""
    tokens = _tokens(seed, picture.grid if picture else grid, words)
    last = len(tokens) - 1
    return EnginePrompt(tokens, (last - WINDOW + 1, last - 5, last - 2, last), picture or pixels(seed, grid))


def separate(seed: int, grid: tuple[int, int] = (8, 8), *, words: int = 30) -> EnginePrompt:
    """A prompt with one probe."""
    tokens = _tokens(seed, grid, words)
    return EnginePrompt(tokens, (len(tokens) - 1,), pixels(seed, grid))


def _tokens(seed: int, grid: tuple[int, int], words: int) -> tuple[int, ...]:
    rng = np.random.default_rng((seed, 1))
    picture = [IMAGE] * (grid[0] * grid[1] // 4)
    head = [IDS["<|im_start|>"], 84, 82, IDS["<|vision_start|>"]]
    return (*head, *picture, IDS["<|vision_end|>"], *(int(token) for token in rng.integers(0, 700, words)))


def run(engine, prompts: list[EnginePrompt]) -> list[LevelScores | Failure]:
    """Score all at once; results in the prompts' order."""
    for tag, prompt in enumerate(prompts):
        engine.submit(tag, prompt)
    results: dict[int, LevelScores | Failure] = {}
    while len(results) < len(prompts):
        for tag, result in engine.step():
            assert tag not in results
            results[tag] = result
    return [results[tag] for tag in range(len(prompts))]


def apart(left: list[LevelScores | Failure], right: list[LevelScores | Failure]) -> tuple[float, float]:
    """Largest difference of any probability, and of any mean."""
    assert all(isinstance(scores, LevelScores) for scores in (*left, *right))
    pairs = list(zip(left, right, strict=True))
    return (
        max(float(np.abs(a.probs_DK - b.probs_DK).max()) for a, b in pairs),
        max(float(np.abs(a.mean_D - b.mean_D).max()) for a, b in pairs),
    )
