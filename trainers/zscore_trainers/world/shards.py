"""The rubric world as files: webdataset shards, ratings and true scores, like any annotated set of pictures.

OUT/world-000000.tar …   KEY.png and KEY.json (prompt, group); all candidates of a prompt lie together
OUT/ratings.csv          key, rater, dimension, score: what annotators would hand in
OUT/truth.csv            key, dimension, score
OUT/reasoning.jsonl      key, dimension, reasoning, score: a judge's words, for algorithms that learn from given ones
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from PIL import Image

from zscore_trainers.world.raters import rate
from zscore_trainers.world.render import Canvas, render, to_uint8
from zscore_trainers.world.scenes import draw_prompt, draw_scene, reasoning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zscore_trainers.world.scenes import Scene, Thing

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_SHARES = {"test": 10, "validation": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldOptions:
    """What to draw."""

    split: Split = "train"
    """A prompt belongs to one split, whatever the seed: what is learned on one is new to the others."""
    prompts: int = 256
    candidates: int = 4
    raters: int = 5
    per_shard: int = 256
    """Prompts a shard."""
    seed: int = 0


def split_of(prompt: str) -> Split:
    """Which split a prompt belongs to: by its hash, 85 : 5 : 10."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    if place < _SHARES["test"]:
        return "test"
    return "validation" if place < _SHARES["test"] + _SHARES["validation"] else "train"


def draw_groups(options: WorldOptions) -> Iterator[list[Scene]]:
    """Candidates of one prompt after the other, without end; `options.prompts` doesn't count here.

    No prompt comes twice: of a split's prompts for one thing there are few, and met again and again they would make
    most of the same-prompt pairs.
    """
    seen: set[tuple[Thing, ...]] = set()
    for number in range(1 << 60):
        rng = random.Random(f"{options.seed} {number}")  # noqa: S311 - drawings, not secrets
        asked = prompt_of(options.split, rng)
        while asked in seen:
            asked = prompt_of(options.split, rng)
        seen.add(asked)
        yield [draw_scene(asked, rng) for _ in range(options.candidates)]


def prompt_of(split: Split, rng: random.Random) -> tuple[Thing, ...]:
    """A prompt of a split."""
    while True:
        asked = draw_prompt(rng)
        if split_of(" and ".join(map(str, asked))) == split:
            return asked


def train_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Candidates for prompts of the train split, one each."""
    return [draw_scene(prompt_of("train", rng), rng) for _ in range(count)]


def write_world(folder: Path, options: WorldOptions) -> list[Path]:
    """Write the files; returns the shards' paths. The same options give the same bytes.

    The tables beside the shards appear when all is written, so a set that has them is whole.
    """
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    groups = draw_groups(options)
    with _Tables(folder) as tables:
        for first in range(0, options.prompts, options.per_shard):
            paths.append(folder / f"world-{len(paths):06d}.tar")
            with paths[-1].open("wb") as stream, webdataset.TarWriter(stream, mtime=0.0) as writer:
                for number in range(first, min(first + options.per_shard, options.prompts)):
                    scenes = next(groups)
                    for candidate, (scene, png) in enumerate(zip(scenes, _pngs(scenes), strict=True)):
                        key = f"p{number:06d}c{candidate}"
                        about = {"prompt": scene.prompt, "group": f"p{number:06d}"}
                        writer.write({"__key__": key, "png": png, "json": about})
                        tables.add(key, scene, options.raters)
    return paths


class _Tables:
    """The files beside the shards."""

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._files = [folder / name for name in ("ratings.csv", "truth.csv", "reasoning.jsonl")]
        for file in self._files:
            file.unlink(missing_ok=True)
        opened = [self._stack.enter_context(_draft(file).open("w", newline="")) for file in self._files]
        self._ratings, self._truth = (csv.writer(file, lineterminator="\n") for file in opened[:2])
        self._words = opened[2]
        self._ratings.writerow(("key", "rater", "dimension", "score"))
        self._truth.writerow(("key", "dimension", "score"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._stack.close()
        for file in sorted(self._files):  # truth.csv last
            if error is None:
                _draft(file).rename(file)
            else:
                _draft(file).unlink()

    def add(self, key: str, scene: Scene, raters: int) -> None:
        for rater in range(raters):
            scores = rate(scene.truth, rater, scene.seed)
            self._ratings.writerows((key, f"rater{rater}", name, score) for name, score in scores.items())
        for name, score in scene.truth.items():
            self._truth.writerow((key, name, score))
            said = {"key": key, "dimension": name, "reasoning": reasoning(scene, name), "score": score}
            self._words.write(json.dumps(said) + "\n")


def _draft(file: Path) -> Path:
    return file.with_name(f"{file.name}.draft")


def _pngs(scenes: list[Scene]) -> Iterator[bytes]:
    for pixels_HWC in to_uint8(render(Canvas.of(scenes))):
        stream = io.BytesIO()
        Image.fromarray(pixels_HWC).save(stream, "PNG")
        yield stream.getvalue()
