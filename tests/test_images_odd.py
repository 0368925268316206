"""The odd shard: 152 pictures that real software wrote, each against Pillow and a manifest of what it makes of them."""

from __future__ import annotations

import csv
import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from zscore.images import decode, load
from zscore.patches import PixelOptions
from zscore.records import Failure, Pixels, Status

OPTIONS = PixelOptions()
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "odd-shard"


pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER.name} isn't beside the checkout")


def rows() -> list[dict[str, str]]:
    manifest = FOLDER / "manifest.csv"
    if not manifest.exists():
        return []
    with manifest.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    found = {}
    with tarfile.open(FOLDER / "odd-000000.tar") as shard:
        for member in shard:
            key, _, suffix = member.name.partition(".")
            file = shard.extractfile(member)
            if file is not None and suffix not in ("txt", "json"):
                found[key] = file.read()
    return found


def with_pillow_alone(data: bytes) -> np.ndarray:
    """The rules of the module under test, said again with Pillow's own tools and nothing of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        try:
            image.load()
        except (OSError, SyntaxError):
            image.load()  # a PNG that is damaged behind its pixels gives them at the second call
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "I;16":
        bits = image.tag_v2[258][0] if image.format == "TIFF" else 16
        grey = np.rint(np.asarray(upright) / (2.0**bits - 1) * 255)
        if "transparency" in image.info:
            grey[np.asarray(upright) == image.info["transparency"]] = 255
        return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, upright.convert("RGBA")))[:, :, :3]
    return np.asarray(upright.convert("RGB"))


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row['key']}-{row['file']}") for row in rows()])
def test_each_picture_is_what_the_manifest_and_pillow_say(row, pictures):
    data = pictures[row["key"]]
    rgb = decode(data, OPTIONS)
    assert (row["pillow"] == "ok") is not isinstance(rgb, Failure), rgb
    if isinstance(rgb, Failure):
        assert rgb.status in (Status.BAD_IMAGE, Status.IMAGE_TOO_LARGE)
        assert rgb.error.isprintable()
        assert load(data, OPTIONS) == rgb
        return
    assert np.array_equal(rgb, with_pillow_alone(data))
    assert sorted(rgb.shape[:2]) == sorted((int(row["height"]), int(row["width"])))
    pixels = load(data, OPTIONS)
    assert isinstance(pixels, Pixels)
    assert (pixels.height, pixels.width) == rgb.shape[:2]


def test_bombs_are_too_large_rather_than_bad(pictures):
    named = {row["file"]: row["key"] for row in rows()}
    for file in ("decompression_bomb.gif", "reallybig.bmp", "badwidth.bmp"):
        failure = decode(pictures[named[file]], OPTIONS)
        assert isinstance(failure, Failure)
        assert failure.status is Status.IMAGE_TOO_LARGE


def test_the_manifest_is_whole(pictures):
    assert {row["key"] for row in rows()} == set(pictures)
    assert len(pictures) == 152
