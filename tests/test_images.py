"""Pictures of every kind, and what is none, through `decode`, `load` and `load_array`."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from zscore import images
from zscore.images import decode, load, load_array
from zscore.patches import PixelOptions
from zscore.records import Failure, Pixels, Status

OPTIONS = PixelOptions()
RNG = np.random.default_rng(5)
NOISE = RNG.integers(0, 256, (37, 53, 3), np.uint8)


def scene(height: int = 96, width: int = 128) -> Image.Image:
    """A picture that no flip or turn leaves as it is."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], 2).astype(np.uint8)
    rgb[: height // 4, : width // 8] = (250, 10, 20)
    return Image.fromarray(rgb)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, options: PixelOptions = OPTIONS) -> np.ndarray:
    rgb = decode(data, options)
    assert not isinstance(rgb, Failure), rgb
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    assert rgb.flags.c_contiguous
    return rgb


def refused(data: bytes, options: PixelOptions = OPTIONS) -> Failure:
    failure = decode(data, options)
    assert isinstance(failure, Failure)
    assert failure.error
    assert len(failure.error) < 500
    assert failure.error.isprintable()
    assert load(data, options) == failure
    return failure


def png(width: int, height: int, kind: int, depth: int, chunks: dict[bytes, bytes], rows: bytes) -> bytes:
    """Write a PNG by hand: headers that lie, and kinds that Pillow doesn't write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(name, body) for name, body in chunks.items())]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


# What is no picture


def test_no_bytes():
    assert refused(b"") == Failure(Status.BAD_IMAGE, "the file is empty (0 bytes)")


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'{"prompt": "a cat"}',
        b"\0" * 4096,
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"\n\n\t\x1b[31m",
        bytes(range(256)),
    ],
)
def test_bytes_that_are_no_picture(data):
    failure = refused(data)
    assert failure.status is Status.BAD_IMAGE
    assert decode(data, OPTIONS) == failure  # no address of an object in the text: two runs, one row
    assert " at 0x" not in failure.error


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
        b"%PDF-1.4\n",
        b"/* XPM */\nstatic char *a[] = {\n",
        b"#define im_width 1\n#define im_height 1\nstatic char im_bits[] = {\n0x00 };",
    ],
)
def test_formats_that_run_programs_or_hide_in_text_are_not_opened(data):
    assert "no readable header" in refused(data).error


def test_the_list_of_formats_is_closed():
    assert set(images.FORMATS) == {"JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"}


def test_a_format_outside_the_list_is_refused():
    assert "no readable header" in refused(encode(scene(), "TGA")).error
    assert "no readable header" in refused(encode(scene(), "ICO")).error


# What is too large


def test_a_small_file_that_declares_a_huge_picture_is_refused_by_its_header():
    failure = refused(png(50_000, 50_000, 2, 8, {}, b"\0" * 100))
    assert failure.status is Status.IMAGE_TOO_LARGE
    assert "2500000000" in failure.error


def test_over_our_limit_but_under_pillows():
    failure = refused(png(9000, 9000, 0, 8, {}, b"\0" * 100))
    assert failure == Failure(
        Status.IMAGE_TOO_LARGE,
        "9000x9000 is 81000000 pixels, over the limit of 67108864 to decode: shrink it",
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_limit_is_exact_and_holds_for_every_format(kind):
    data = encode(scene(30, 40), kind)
    assert decoded(data, PixelOptions(max_decoded_pixels=1200)).shape == (30, 40, 3)
    assert refused(data, PixelOptions(max_decoded_pixels=1199)).status is Status.IMAGE_TOO_LARGE


def test_the_limit_holds_for_pictures_that_are_decoded_already():
    small = PixelOptions(max_decoded_pixels=1199)
    for picture in (scene(30, 40), np.asarray(scene(30, 40))):
        failure = load_array(picture, small)
        assert isinstance(failure, Failure)
        assert failure.status is Status.IMAGE_TOO_LARGE


def test_a_compressed_text_that_swells_is_refused():
    text = b"Comment\0\0" + zlib.compress(b"\0" * (8 << 20))
    assert refused(png(1, 1, 0, 8, {b"zTXt": text}, b"\0\0")).status is Status.BAD_IMAGE


# What is damaged


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_a_file_that_is_cut_off_fails_or_has_all_its_pixels(kind):
    """Never grey or black where the rest was."""
    data = encode(scene(64, 64), kind)
    whole = decoded(data)
    for length in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 2, len(data) - 1]:
        outcome = decode(data[:length], OPTIONS)
        assert isinstance(outcome, Failure) or np.array_equal(outcome, whole), length
        if length < len(data) * 0.9:
            assert isinstance(outcome, Failure), length


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_jpeg_that_is_cut_off_is_as_bad_as_pillow_finds_it(progressive, restarts):
    data = encode(Image.fromarray(NOISE), "JPEG", progressive=progressive, restart_marker_blocks=restarts)
    for length in range(0, len(data), 37):
        try:
            Image.open(io.BytesIO(data[:length]), formats=["JPEG"]).load()
        except OSError:
            assert isinstance(decode(data[:length], OPTIONS), Failure)
        else:
            decoded(data[:length])


def test_damaged_bytes_never_raise():
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encode(Image.fromarray(NOISE), kind)
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[RNG.integers(len(data))] = RNG.integers(256)
            outcome = load(bytes(damaged), OPTIONS)
            assert isinstance(outcome, Pixels | Failure)


def test_a_png_whose_data_is_damaged_fails():
    data = bytearray(encode(Image.fromarray(NOISE), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert "broken data stream" in refused(bytes(data)).error


def test_a_png_that_is_damaged_behind_its_pixels_counts():
    data = encode(Image.fromarray(NOISE), "PNG")
    end = data.index(b"IEND") - 4
    cut_chunk = struct.pack(">I", 5000) + b"tEXt" + b"gone"
    assert np.array_equal(decoded(data[:end] + cut_chunk), NOISE)


def test_pillow_is_not_told_to_accept_cut_files():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# JPEG: simplejpeg's pixels are Pillow's, or it isn't used


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (37, 53), (200, 131)])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_jpeg_pixels_are_pillows_bit_for_bit(size, subsampling):
    rgb = RNG.integers(0, 256, (*size, 3), np.uint8)
    if subsampling == "Gray":
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb[:, :, :1]), colorspace="gray", colorsubsampling="Gray")
    else:
        data = simplejpeg.encode_jpeg(rgb, colorsubsampling=subsampling)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"optimize": True},
        {"restart_marker_rows": 1},
        {"quality": 1},
        {"quality": 100, "subsampling": 0},
        {"keep_rgb": True},
        {"comment": b"\xff\xd9 in a comment"},
        {"progressive": True, "subsampling": "4:2:2", "quality": 30},
    ],
)
def test_jpeg_options(options):
    data = encode(scene(), "JPEG", **options)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    cmyk = scene().convert("CMYK")
    data = encode(cmyk, kind)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_bytes_behind_a_jpeg_do_not_matter():
    data = encode(scene(), "JPEG")
    assert np.array_equal(decoded(data + b"trailer" * 50), decoded(data))


def test_simplejpeg_is_used_where_it_can_be(monkeypatch):
    def no_pillow(image):
        raise AssertionError(image)

    monkeypatch.setattr(images, "_decode_with_pillow", no_pillow)
    for options in ({}, {"progressive": True}):
        decoded(encode(scene(), "JPEG", **options))
        decoded(encode(scene().convert("L"), "JPEG", **options))


# Names and warnings


def test_the_type_is_told_by_the_bytes_alone():
    """No suffix reaches this code; a PNG in a member called .jpg is a PNG."""
    assert np.array_equal(decoded(encode(Image.fromarray(NOISE), "PNG")), NOISE)
    assert np.array_equal(decoded(encode(Image.fromarray(NOISE), "WEBP", lossless=True)), NOISE)


def test_warnings_stay_inside_and_do_not_become_failures():
    noisy = png(1, 1, 0, 8, {b"acTL": b"\0" * 8}, b"\0\x80")  # "Invalid APNG, will use default PNG image if possible"
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(noisy))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        before = list(warnings.filters)
        assert decoded(noisy).tolist() == [[[128, 128, 128]]]
        assert warnings.filters == before
    assert caught == []


def test_the_same_bytes_give_the_same_pixels():
    data = encode(scene(), "JPEG")
    first, second = load(data, OPTIONS), load(data, OPTIONS)
    assert isinstance(first, Pixels)
    assert isinstance(second, Pixels)
    assert first.patches_NCPP.tobytes() == second.patches_NCPP.tobytes()


def test_load_gives_the_size_before_resizing_and_after_turning():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = load(encode(scene(96, 128), "JPEG", exif=exif), OPTIONS)
    assert isinstance(pixels, Pixels)
    assert (pixels.width, pixels.height) == (96, 128)
    assert pixels.grid[0] > pixels.grid[1]


def test_extreme_shapes():
    one = load(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), OPTIONS)
    assert isinstance(one, Pixels)
    strip = load(encode(Image.new("RGB", (1, 5000)), "PNG"), OPTIONS)
    assert isinstance(strip, Failure)
    assert strip.status is Status.BAD_IMAGE
    assert "aspect ratio" in strip.error
