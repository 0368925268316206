"""Shards of small drawn pictures, so that the main job can be tried on a machine that has none.

Coloured shapes on a plain ground, four candidates a prompt, from a fixed seed: the same bytes every time.
"""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 256
CANDIDATES = 4
COLOURS = {"red": "#d03030", "green": "#30a040", "blue": "#3050d0", "yellow": "#e0c020", "purple": "#8030a0"}
SHAPES = ("circle", "square", "triangle")


def write_demo_shards(folder: Path, *, shards: int = 4, prompts_per_shard: int = 2, seed: int = 0) -> list[Path]:
    """Write webdataset shards; samples are `.png` + `.json` with a `prompt` field.

    Returns:
        The shards' paths. `shards × prompts_per_shard × 4` pictures in all.
    """
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)  # noqa: S311 - drawings, not secrets
    paths = []
    for number in range(shards):
        path = folder / f"demo-{number:06d}.tar"
        with path.open("wb") as stream, webdataset.TarWriter(stream, mtime=0.0) as writer:
            for prompt in range(prompts_per_shard):
                shape, colour = rng.choice(SHAPES), rng.choice(sorted(COLOURS))
                for candidate in range(CANDIDATES):
                    writer.write(
                        {
                            "__key__": f"p{number * prompts_per_shard + prompt:03d}_c{candidate}",
                            "png": _png(_draw(shape, colour, candidate, rng)),
                            "json": {"prompt": f"a {colour} {shape} on a plain background"},
                        }
                    )
        paths.append(path)
    return paths


def _draw(shape: str, colour: str, candidate: int, rng: random.Random) -> Image.Image:
    """One candidate: right, off-colour, blurred, or another shape."""
    if candidate == 1:
        colour = rng.choice([name for name in sorted(COLOURS) if name != colour])
    if candidate == 3:
        shape = rng.choice([name for name in SHAPES if name != shape])
    image = Image.new("RGB", (SIZE, SIZE), "#e8e4dc")
    draw = ImageDraw.Draw(image)
    edge = rng.randint(SIZE // 4, SIZE // 2)
    left, top = rng.randint(8, SIZE - edge - 8), rng.randint(8, SIZE - edge - 8)
    box = (left, top, left + edge, top + edge)
    if shape == "circle":
        draw.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle(box, fill=COLOURS[colour])
    else:
        draw.polygon([(left + edge // 2, top), (left, top + edge), (left + edge, top + edge)], fill=COLOURS[colour])
    return image.filter(ImageFilter.GaussianBlur(6)) if candidate == 2 else image


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
