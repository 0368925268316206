"""Sizes and patches against transformers' own image processor, which is the definition."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from zscore.errors import UsageError
from zscore.patches import PixelOptions, cut, patchify, target_size
from zscore.records import Failure, Pixels, Status

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def processor_arguments(options: PixelOptions) -> dict[str, Any]:
    return {
        "patch_size": options.patch,
        "merge_size": options.merge,
        "min_pixels": options.min_pixels,
        "max_pixels": options.max_pixels,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


@functools.cache
def pil_processor(options: PixelOptions) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**processor_arguments(options))


@functools.cache
def torchvision_processor(options: PixelOptions) -> Any:
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(**processor_arguments(options))


def reference(rgb: np.ndarray, processor: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """`pixel_values` and the grid, as transformers has them."""
    out = processor(images=[Image.fromarray(rgb)], return_tensors="np")
    (frames, rows, columns) = (int(edge) for edge in out["image_grid_thw"][0])
    assert frames == 1
    return np.asarray(out["pixel_values"]), (rows, columns)


def as_pixel_values(pixels: Pixels) -> np.ndarray:
    """Scale to [-1, 1] and double the temporal slice, as an engine does on its device."""
    scaled = (pixels.patches_NCPP.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.repeat(scaled[:, :, None], 2, axis=2).reshape(len(scaled), -1)


def as_levels(pixel_values: np.ndarray) -> np.ndarray:
    """Undo the scaling: 0 to 255."""
    return (pixel_values.astype(np.float64) * 0.5 + 0.5) * 255


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def photo_like(height: int, width: int) -> np.ndarray:
    """Smooth gradients with hard edges: what resizing filters disagree on."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), ((x // 7 + y // 5) % 2) * 255], 2)
    return picture.astype(np.uint8)


def cut_ok(rgb: np.ndarray, options: PixelOptions) -> Pixels:
    pixels = cut(rgb, options)
    assert isinstance(pixels, Pixels), pixels
    return pixels


@QUICK
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    cutting=st.sampled_from([(16, 2), (14, 2), (8, 1), (16, 1), (4, 3)]),
    seed=st.integers(0, 9),
)
def test_without_resizing_pixel_values_are_bit_for_bit_those_of_transformers(rows, columns, cutting, seed):
    patch, merge = cutting
    factor = patch * merge
    options = PixelOptions(patch=patch, merge=merge, min_pixels=1)
    rgb = noise(rows * factor, columns * factor, seed)
    pixels = cut_ok(rgb, options)
    expected, grid = reference(rgb, pil_processor(options))
    assert pixels.grid == grid
    assert (pixels.width, pixels.height) == (columns * factor, rows * factor)
    assert pixels.patches_NCPP.shape == (grid[0] * grid[1], 3, patch, patch)
    assert pixels.patches_NCPP.flags.c_contiguous
    assert as_pixel_values(pixels).tobytes() == expected.tobytes()


@QUICK
@given(height=st.integers(1, 700), width=st.integers(1, 700), budget=st.sampled_from([65_536, 100_000, 1_048_576]))
def test_resized_pixels_equal_those_of_the_pil_back_end(height, width, budget):
    options = PixelOptions(max_pixels=budget)
    rgb = noise(height, width)
    pixels = cut(rgb, options)
    if max(height, width) > 200 * min(height, width):
        assert isinstance(pixels, Failure)
        return
    assert isinstance(pixels, Pixels)
    expected, grid = reference(rgb, pil_processor(options))
    assert pixels.grid == grid
    assert as_pixel_values(pixels).tobytes() == expected.tobytes()


SIZES = [(333, 517), (1024, 1024), (100, 100), (1500, 1100), (1, 150), (31, 33), (768, 1344), (2000, 37)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("draw", [photo_like, noise])
def test_resized_pixels_are_those_of_the_torchvision_back_end_but_for_the_order_of_the_passes(draw, height, width):
    """Torch resizes across, then down. Pillow 13 goes down first where that costs less.

    The values between the passes are clipped to 0..255, so the order shows beside hard edges. Apart from it, torch
    is within one level (two in fewer than one value of 10,000: its weights have 16 bits). Where both go across first,
    our pixels are held to that; elsewhere Pillow's two passes, one by one, are.
    """
    options = PixelOptions()
    rgb = draw(height, width)
    pixels = cut_ok(rgb, options)
    expected, grid = reference(rgb, torchvision_processor(options))
    assert pixels.grid == grid
    size = (grid[1] * 16, grid[0] * 16)
    across = Image.fromarray(rgb).resize((size[0], height), Image.Resampling.BICUBIC)
    across_then_down = cut_ok(np.asarray(across.resize(size, Image.Resampling.BICUBIC)), options)

    def beyond_one(ours: Pixels) -> float:
        difference = np.abs(as_levels(expected) - as_levels(as_pixel_values(ours)))
        return float((difference > 1.001).mean())

    assert beyond_one(across_then_down) < 1e-4
    if np.array_equal(pixels.patches_NCPP, across_then_down.patches_NCPP):
        assert beyond_one(pixels) < 1e-4
    else:
        assert beyond_one(pixels) < 0.05
    if (width, height) == size:
        assert np.abs(as_levels(expected) - as_levels(as_pixel_values(pixels))).max() < 1e-4


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    factor=st.sampled_from([(16, 2), (14, 2), (16, 1)]),
    least=st.sampled_from([1, 3136, 65_536]),
    most=st.sampled_from([65_536, 262_144, 1_048_576, 16_777_216]),
)
def test_the_size_rule_is_that_of_transformers(height, width, factor, least, most):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    options = PixelOptions(patch=factor[0], merge=factor[1], min_pixels=least, max_pixels=most)
    size = target_size(height, width, options)
    try:
        expected = smart_resize(height, width, options.factor, least, most)
    except ValueError:
        assert isinstance(size, Failure)
        assert size.status is Status.BAD_IMAGE
    else:
        assert size == expected


@pytest.mark.parametrize("factor", [16, 32])
def test_halves_round_to_even_as_in_transformers(factor):
    options = PixelOptions(patch=factor, merge=1, min_pixels=1)
    for halves in range(3, 20):
        edge = factor * halves // 2
        assert target_size(edge, edge, options) == (round(halves / 2) * factor,) * 2


def test_a_strip_over_the_aspect_limit_is_refused_with_the_ratio_and_the_limit():
    assert isinstance(cut(noise(1, 200), PixelOptions()), Pixels)
    failure = cut(noise(5000, 1), PixelOptions())
    assert failure == Failure(Status.BAD_IMAGE, "1x5000 has an aspect ratio of 5000.0, over the limit of 200: crop it")


def test_one_pixel_becomes_a_flat_picture():
    pixels = cut_ok(np.array([[[7, 80, 200]]], np.uint8), PixelOptions())
    assert pixels.grid == (16, 16)
    assert (pixels.width, pixels.height) == (1, 1)
    assert np.array_equal(np.unique(pixels.patches_NCPP.transpose(0, 2, 3, 1).reshape(-1, 3), axis=0), [[7, 80, 200]])


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (3000, 2000), (8000, 41), (4000, 4000)])
def test_the_budget_holds(height, width):
    rows, columns = target_size(height, width, PixelOptions(max_pixels=262_144))
    assert rows * columns <= 262_144


def test_the_order_is_rows_of_blocks_and_channels_first():
    """Written out by hand once, should the two of us ever be wrong together."""
    options = PixelOptions(patch=2, merge=2, min_pixels=1)
    rgb = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    patches = patchify(rgb, options)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]
    for patch, (y, x) in zip(patches, corners, strict=True):
        assert np.array_equal(patch, rgb[y : y + 2, x : x + 2].transpose(2, 0, 1))


def test_patches_are_the_callers_own():
    rgb = noise(64, 64)
    patches = patchify(rgb, PixelOptions())
    assert patches.flags.writeable
    assert not np.shares_memory(patches, rgb)


def test_a_picture_that_is_a_view_is_patched_as_its_copy():
    rgb = noise(128, 256)
    for view in (rgb[::-1], rgb[:, ::-1], rgb.transpose(1, 0, 2), rgb[:64, 32:96], np.asarray(rgb, order="F")):
        assert np.array_equal(patchify(view, PixelOptions()), patchify(view.copy(), PixelOptions()))


@pytest.mark.parametrize("name", ["patch", "merge", "min_pixels", "max_pixels", "max_decoded_pixels"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(UsageError, match=rf"{name} is {value}, must be at least 1"):
        PixelOptions(**{name: value})


def test_options_that_contradict_each_other_are_named():
    with pytest.raises(UsageError, match=r"min_pixels is 65536, over max_pixels \(1000\)"):
        PixelOptions(max_pixels=1000)


def test_defaults_are_those_of_the_issue():
    options = PixelOptions()
    assert (options.patch, options.merge, options.factor) == (16, 2, 32)
    assert (options.max_pixels, options.max_decoded_pixels) == (1024**2, 8192**2)
