"""Pixels → patches: the size that a picture is brought to, and the order that the vision tower reads it in.

The rule for the size and the order of the patches are those of transformers' Qwen2-VL image processor
(`models/qwen2_vl/image_processing_qwen2_vl.py`), so that a checkpoint sees here what it saw in training. What
differs is what leaves this file: uint8 and a single temporal slice (see `zscore.records.Pixels`), an eighth of
the bytes of the processor's `pixel_values`.

Array legend: H, W picture height and width, C channels (red, green, blue), N patches, P patch edge in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from zscore.errors import UsageError
from zscore.records import Failure, Pixels, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_ASPECT_RATIO = 200
"""Longest over shortest edge that transformers' processor still takes; it raises above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelOptions:
    """How large a picture may be, and how it is cut."""

    patch: int = 16
    """Patch edge in pixels (Qwen3.5: 16)."""
    merge: int = 2
    """Patches down and across that the tower merges into one token; both edges become multiples of patch·merge."""
    min_pixels: int = 65_536
    """Smaller pictures are enlarged to at least this many pixels (Qwen3.5: 256²)."""
    max_pixels: int = 1_048_576
    """The image budget: larger pictures are shrunk to at most this many pixels."""
    max_decoded_pixels: int = 67_108_864
    """Pictures whose header says more than this are refused before they are decoded: 64 Mpx is 8192²."""

    def __post_init__(self) -> None:
        for name in ("patch", "merge", "min_pixels", "max_pixels", "max_decoded_pixels"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name} is {value}, must be at least 1")
        if self.min_pixels > self.max_pixels:
            raise UsageError(
                f"min_pixels is {self.min_pixels}, over max_pixels ({self.max_pixels}): lower it or raise max_pixels"
            )

    @property
    def factor(self) -> int:
        """What both edges of a resized picture are multiples of, in pixels."""
        return self.patch * self.merge


def target_size(height: int, width: int, options: PixelOptions) -> tuple[int, int] | Failure:
    """Return the height and width that a picture is resized to, or why it can't be.

    Each edge goes to the nearest multiple of the factor (halves to even, as `round` does); if that misses the
    budget, both edges are scaled by one number and rounded towards the budget. As in transformers, a strip so
    thin that its short edge is the factor itself may end above a very small `max_pixels`.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        return Failure(
            Status.BAD_IMAGE,
            f"{width}x{height} has an aspect ratio of {ratio:.1f}, over the limit of {MAX_ASPECT_RATIO}: crop it",
        )
    factor = options.factor
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor * factor
    if area > options.max_pixels:
        shrink = math.sqrt(height * width / options.max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < options.min_pixels:
        grow = math.sqrt(options.min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def patchify(rgb_HWC: NDArray[np.uint8], options: PixelOptions) -> NDArray[np.uint8]:
    """Cut a picture into patches.

    Args:
        rgb_HWC: uint8 picture whose edges are multiples of the factor.
        options: patch and merge sizes.

    Returns:
        uint8 (N, 3, P, P): blocks of merge x merge patches from left to right, then down; inside a block also.
    """
    patch, merge = options.patch, options.merge
    height, width, channels = rgb_HWC.shape
    assert channels == 3
    assert height % options.factor == 0
    assert width % options.factor == 0
    rows, columns = height // options.factor, width // options.factor
    planes_CHW = np.empty((3, height, width), np.uint8)
    for channel in range(3):
        planes_CHW[channel] = rgb_HWC[:, :, channel]
    # A patch's row moves as one item of P bytes: 1.8 ms for 1024x1024 on one core, against 4.5 ms byte by byte.
    lines = planes_CHW.view(f"V{patch}").reshape(3, rows, merge, patch, columns, merge)
    ordered = np.ascontiguousarray(lines.transpose(1, 4, 2, 5, 0, 3))
    return ordered.view(np.uint8).reshape(-1, 3, patch, patch)


def cut(rgb_HWC: NDArray[np.uint8], options: PixelOptions) -> Pixels | Failure:
    """Resize and patch an upright RGB picture of any size.

    The filter is Pillow's bicubic, so that the pixels are those of transformers' PIL back end. Its torchvision
    back end is within one level of them where Pillow resizes across before down; where it takes the other order
    (from Pillow 13 on, if that is cheaper), 1 value in 10,000 of a photo differs by 2 to 12 levels.
    """
    height, width, _ = rgb_HWC.shape
    size = target_size(height, width, options)
    if isinstance(size, Failure):
        return size
    if size != (height, width):
        resized = Image.fromarray(rgb_HWC).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        rgb_HWC = np.asarray(resized)
    return Pixels(
        patches_NCPP=patchify(rgb_HWC, options),
        grid=(size[0] // options.patch, size[1] // options.patch),
        width=width,
        height=height,
    )
