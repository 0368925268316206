"""Modes, alpha, depth and orientation: every way to store a picture ends in the same upright RGB."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.test_images import NOISE, OPTIONS, decoded, encode, png, scene
from zscore.images import load, load_array
from zscore.records import Failure, Pixels, Status

RNG = np.random.default_rng(6)


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    data = encode(scene(), kind, exif=exif, **lossless)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    rgb = decoded(data)
    assert np.array_equal(rgb, upright)
    assert rgb.shape == ((128, 96, 3) if orientation >= 5 else (96, 128, 3))
    # And by hand: where the red corner, stored at the top left, belongs.
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    red = rgb[corner[orientation]].astype(int)
    assert red[0] > 200
    assert red[1] < 80


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_means_nothing_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encode(scene(), "PNG", exif=exif)), np.asarray(scene()))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" * 3]
)
def test_a_damaged_exif_block_does_not_spoil_a_picture(exif):
    plain = encode(scene(), "JPEG")
    assert np.array_equal(
        decoded(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]), decoded(plain)
    )


def test_a_pillow_image_is_turned_as_its_file_is():
    exif = Image.Exif()
    exif[0x0112] = 8
    for kind in ("JPEG", "TIFF", "PNG"):
        data = encode(scene(), kind, exif=exif)
        from_file, from_image = load(data, OPTIONS), load_array(Image.open(io.BytesIO(data)), OPTIONS)
        assert isinstance(from_file, Pixels)
        assert isinstance(from_image, Pixels)
        assert np.array_equal(from_file.patches_NCPP, from_image.patches_NCPP)
        turned = load_array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), OPTIONS)
        assert isinstance(turned, Pixels)
        assert np.array_equal(turned.patches_NCPP, from_image.patches_NCPP)


# Alpha


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_over_white(kind):
    rgba = RNG.integers(0, 256, (64, 64, 4), np.uint8)
    rgba[0, 0] = (0, 0, 0, 0)
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    rgb = decoded(encode(Image.fromarray(rgba), kind, **options))
    assert np.array_equal(rgb, over_white(rgba))
    assert rgb[0, 0].tolist() == [255, 255, 255]


def test_every_value_under_every_alpha():
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([value, value, value, alpha], 2).astype(np.uint8)
    assert np.array_equal(decoded(encode(Image.fromarray(rgba), "PNG")), over_white(rgba))


def test_grey_with_alpha():
    la = RNG.integers(0, 256, (20, 30, 2), np.uint8)
    rgba = la[:, :, [0, 0, 0, 1]]
    assert np.array_equal(decoded(encode(Image.fromarray(la), "PNG")), over_white(rgba))


def test_a_palette_with_alpha():
    palette = RNG.integers(0, 256, (256, 3), np.uint8)
    alphas = RNG.integers(0, 256, 256, np.uint8)
    index = RNG.integers(0, 256, (40, 50), np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    assert np.array_equal(decoded(encode(image, "PNG")), palette[index])
    rgba = np.dstack([palette[index], alphas[index]])
    assert np.array_equal(decoded(encode(image, "PNG", transparency=alphas.tobytes())), over_white(rgba))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_one_transparent_entry(kind):
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    image.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    rgb = decoded(encode(image, kind, transparency=2))
    assert rgb.tolist() == [[[1, 2, 3], [40, 50, 60]], [[255, 255, 255], [100, 110, 120]]]


def test_a_transparent_colour_without_a_palette():
    grey = Image.fromarray(np.array([[0, 90], [91, 255]], np.uint8))
    assert decoded(encode(grey, "PNG", transparency=90))[..., 0].tolist() == [[0, 255], [91, 255]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decoded(encode(rgb, "PNG", transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    ink = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert decoded(encode(ink, "PNG", transparency=0))[..., 0].tolist() == [[255, 255]]


# Depth


def test_one_bit():
    bits = RNG.integers(0, 2, (9, 17)).astype(bool)
    for kind in ("PNG", "TIFF", "BMP"):
        rgb = decoded(encode(Image.fromarray(bits), kind))
        assert np.array_equal(rgb, np.repeat(bits[:, :, None] * np.uint8(255), 3, axis=2))


def test_grey():
    grey = RNG.integers(0, 256, (9, 17), np.uint8)
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert np.array_equal(decoded(encode(Image.fromarray(grey), kind)), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    rgb = decoded(encode(Image.fromarray(values), kind))
    assert np.array_equal(rgb[..., 0], np.rint(values / 257).astype(np.uint8))
    assert (rgb[..., 0] == rgb[..., 1]).all()


def test_16_bit_grey_in_the_other_byte_order():
    values = np.arange(65536, dtype=">u2").reshape(256, 256)
    image = Image.frombytes("I;16B", (256, 256), values.tobytes())
    assert np.array_equal(decoded(encode(image, "TIFF"))[..., 0], np.rint(values / 257).astype(np.uint8))


def test_16_bit_grey_with_a_transparent_value():
    rows = b"".join(b"\0" + struct.pack(">3H", 0, 1000, 65535) for _ in range(2))
    rgb = decoded(png(3, 2, 0, 16, {b"tRNS": struct.pack(">H", 1000)}, rows))
    assert rgb[..., 0].tolist() == [[0, 255, 255]] * 2


def test_16_bit_colour():
    rows = b"\0" + struct.pack(">6H", 0, 257, 65535, 0x8000, 0x1234, 0xFFFF)
    assert decoded(png(2, 1, 2, 16, {}, rows)).tolist() == [[[0, 1, 255], [128, 18, 255]]]


def test_16_bit_colour_with_alpha():
    rows = b"\0" + struct.pack(">8H", 0, 0, 0, 0, 65535, 0, 0, 65535)
    assert decoded(png(2, 1, 6, 16, {}, rows)).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_a_tiff_of_12_bits_is_scaled_by_its_own_white():
    """Pillow unpacks the 12 bits and leaves them where they are."""
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x0F, 0xFF])  # 0, 4095, 2048, 4095
    tags = [(256, 3, 2), (257, 3, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1)]
    tags += [(278, 3, 2), (279, 4, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4).ljust(200, b"\0") + packed
    assert decoded(data)[..., 0].tolist() == [[0, 255], [128, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0, 0.25], [0, 128, 255, 64]),
        ([0.0, 51.0, 255.0, 300.0 - 45.5], [0, 51, 255, 254]),
        ([0.0, 257.0, 65535.0, 32896.0], [0, 1, 255, 128]),
        ([0.0, 1e6, 5e5, -3.0], [0, 255, 128, 0]),
        ([np.nan, np.inf, -np.inf, 1.0], [0, 255, 0, 255]),
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
        ([np.nan] * 4, [0] * 4),
    ],
)
def test_floats(values, expected):
    data = encode(Image.fromarray(np.array(values, np.float32).reshape(2, 2)), "TIFF")
    assert decoded(data)[..., 0].ravel().tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 200, 255], [0, 1, 200, 255]),
        ([0, 257, 65535, -7], [0, 1, 255, 0]),
        ([0, 2**30, 1, 2**29], [0, 255, 0, 128]),
    ],
)
def test_32_bit_integers(values, expected):
    data = encode(Image.fromarray(np.array(values, np.int32).reshape(2, 2)), "TIFF")
    assert decoded(data)[..., 0].ravel().tolist() == expected


def test_lab():
    rgb = decoded(encode(Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"))
    assert rgb.min() > 250
    assert decoded(encode(Image.new("LAB", (8, 8), (0, 128, 128)), "TIFF")).max() < 5


def test_an_icc_profile_changes_nothing():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert np.array_equal(decoded(encode(scene(), "PNG", icc_profile=profile)), np.asarray(scene()))
    assert np.array_equal(decoded(encode(scene(), "JPEG", icc_profile=profile)), decoded(encode(scene(), "JPEG")))


# Animation


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    rgb = decoded(data)
    assert rgb.shape == (30, 40, 3)
    assert np.abs(rgb.astype(int) - (255, 0, 0)).max() < 16


# Pictures that are decoded already


def test_arrays():
    expected = load(encode(Image.fromarray(NOISE), "PNG"), OPTIONS)
    assert isinstance(expected, Pixels)
    opaque = np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])
    for picture in (NOISE, NOISE.copy(order="F"), opaque, Image.fromarray(NOISE), Image.fromarray(opaque)):
        pixels = load_array(picture, OPTIONS)
        assert isinstance(pixels, Pixels)
        assert np.array_equal(pixels.patches_NCPP, expected.patches_NCPP)
        assert (pixels.width, pixels.height) == (53, 37)


def test_grey_arrays():
    grey = NOISE[:, :, 0]
    flat, deep = load_array(grey, OPTIONS), load_array(grey[:, :, None], OPTIONS)
    assert isinstance(flat, Pixels)
    assert isinstance(deep, Pixels)
    assert np.array_equal(flat.patches_NCPP, deep.patches_NCPP)
    assert (flat.patches_NCPP[:, 0] == flat.patches_NCPP[:, 2]).all()


@pytest.mark.parametrize(
    "array",
    [
        NOISE.astype(np.float32) / 255,
        NOISE.astype(np.int64),
        NOISE.transpose(2, 0, 1),
        NOISE[None],
        NOISE[0, 0],
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_arrays_that_are_no_pictures(array):
    failure = load_array(array, OPTIONS)
    assert isinstance(failure, Failure)
    assert failure.status is Status.BAD_IMAGE


def test_what_an_array_must_be_is_said():
    failure = load_array(np.zeros((3, 8, 8), np.float32), OPTIONS)
    assert failure == Failure(
        Status.BAD_IMAGE,
        "an array of dtype float32 and shape (3, 8, 8) is not a picture: "
        "pass uint8 of shape (H, W), (H, W, 3) or (H, W, 4)",
    )


def test_a_pillow_image_is_left_as_it_was():
    image = Image.fromarray(RNG.integers(0, 256, (8, 8, 4), np.uint8))
    before = image.tobytes()
    load_array(image, OPTIONS)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


def test_a_pillow_image_whose_file_is_cut_fails():
    data = encode(Image.fromarray(NOISE), "PNG")
    failure = load_array(Image.open(io.BytesIO(data[: len(data) // 2])), OPTIONS)
    assert isinstance(failure, Failure)
    assert failure.status is Status.BAD_IMAGE
