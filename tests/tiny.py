"""Small inputs for tests: shards of tiny pictures, and a rubric whose prompt is short."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from zscore.records import LevelScores, Pixels

RUBRIC = """
name = "tiny"
overall = "mean"
levels = [{token = "1", value = 1.0}, {token = "2", value = 2.0}, {token = "3", value = 4.0}]
[text]
prompt = "P: {prompt}\\n"
scale = "1 to 3.\\n"
question = "{title}? {question}{anchors}"
anchor = ""
[layouts.separate]
probe = "Score: "
[layouts.joint]
probe = "{title}: "
between = "\\n"
[[dimensions]]
name = "left"
title = "L"
question = "l\\n"
anchors = {1 = "no"}
[[dimensions]]
name = "right"
title = "R"
question = "r\\n"
anchors = {1 = "no"}
"""


def write_rubric(folder: Path) -> Path:
    path = folder / "tiny.toml"
    path.write_text(RUBRIC)
    return path


def png(seed: int, size: int = 64) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(key: str, seed: int, *, broken: bool = False, size: int = 64) -> list[tuple[str, bytes]]:
    picture = b"not a picture" if broken else png(seed, size)
    return [(f"{key}.png", picture), (f"{key}.json", json.dumps({"prompt": f"prompt {seed}"}).encode())]


def write_shards(folder: Path, shards: int, samples: int, *, broken: frozenset[int] = frozenset()) -> list[Path]:
    """`broken` holds the running numbers of samples whose picture is garbage."""
    paths = []
    for shard in range(shards):
        members = []
        for index in range(samples):
            number = shard * samples + index
            members += sample_members(f"s{number:04d}", number, broken=number in broken)
        paths.append(write_tar(folder / f"t-{shard:04d}.tar", members))
    return paths


def pixels(seed: int = 0, grid: tuple[int, int] = (4, 4)) -> Pixels:
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (grid[0] * grid[1], 3, 16, 16), dtype=np.uint8)
    return Pixels(patches, grid, grid[1] * 16, grid[0] * 16)


def level_scores(seed: int, dimensions: int, levels: int) -> LevelScores:
    """A proper random distribution at each probe."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(levels), dimensions).astype(np.float32)
    values = np.arange(1, levels + 1, dtype=np.float32)
    mean = probs @ values
    std = np.sqrt(np.maximum(probs @ values**2 - mean**2, 0))
    entropy = -(probs * np.log(np.maximum(probs, 1e-30))).sum(1)
    return LevelScores(probs, mean, std, entropy.astype(np.float32))
