"""Bytes → an upright RGB picture → patches, or a Failure with its reason.

- What a file is, its bytes say; suffixes are not looked at. Formats: `FORMATS`, and no others, since some of
  Pillow's plugins start programs (EPS) or decode in pure Python for minutes.
- JPEG goes through simplejpeg where its pixels equal Pillow's (Y'CbCr and grey, no complaint from libjpeg);
  everything else, and every JPEG that simplejpeg refuses, goes through Pillow, which has the last word.
- The EXIF orientation is applied; ICC profiles are ignored; alpha and transparent palette entries lie over
  white; of an animation, the first frame counts; 16-bit, integer and float samples are scaled to 8 bits.
- The picture's size is read from its header and held against `PixelOptions.max_decoded_pixels` first.

Array legend: H, W picture height and width, C channels (red, green, blue).
"""

from __future__ import annotations

import io
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from zscore.patches import PixelOptions, cut
from zscore.records import Failure, Pixels, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["FORMATS", "PixelOptions", "decode", "load", "load_array"]

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""Pillow's names of the formats that are read. A multi-picture JPEG (MPO) counts as JPEG."""

_EXACT_COLORSPACES = ("YCbCr", "Gray")
"""Of simplejpeg: on CMYK and YCCK it differs from Pillow, on RGB (Adobe) it saves nothing."""

_MAX_ERROR = 240
"""Characters of an error text; Pillow quotes bytes of the file in some."""

_QUIET = threading.Lock()
"""`warnings.catch_warnings` swaps a global: two threads inside at once could leave the wrong filters behind."""


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Pillow's warnings from the terminal, and from becoming errors under `-W error`."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(data: bytes, options: PixelOptions) -> NDArray[np.uint8] | Failure:
    """Decode a picture file into an upright uint8 RGB array (H, W, 3), or say why not."""
    if not data:
        return Failure(Status.BAD_IMAGE, "the file is empty (0 bytes)")
    with _quietly():
        image = _open(data)
        if isinstance(image, Failure):
            return image
        refusal = _check_size(*image.size, options)
        if refusal is not None:
            return refusal
        if image.format in ("JPEG", "MPO"):
            rgb_HWC = _decode_jpeg(data, image.size)
            if rgb_HWC is not None:
                return _upright(rgb_HWC, _orientation(image))
        return _decode_with_pillow(image)


def load(data: bytes, options: PixelOptions) -> Pixels | Failure:
    """Decode, resize and patch a picture file."""
    rgb_HWC = decode(data, options)
    return rgb_HWC if isinstance(rgb_HWC, Failure) else cut(rgb_HWC, options)


def load_array(picture: Image.Image | NDArray[Any], options: PixelOptions) -> Pixels | Failure:
    """Resize and patch a picture that is already decoded.

    Args:
        picture: a Pillow image of any mode (treated as its file would be, orientation included), or a uint8
            array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the fourth channel being alpha.
        options: the budget and the patch size.
    """
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2:] if picture.ndim in (2, 3) else (0,)
        if picture.dtype != np.uint8 or channels not in ((), (1,), (3,), (4,)):
            return Failure(
                Status.BAD_IMAGE,
                f"an array of dtype {picture.dtype} and shape {picture.shape} is not a picture: "
                "pass uint8 of shape (H, W), (H, W, 3) or (H, W, 4)",
            )
        if picture.size == 0:
            return _no_pixels(picture.shape[1], picture.shape[0])
        picture = Image.fromarray(picture[:, :, 0] if channels == (1,) else picture)
    refusal = _check_size(*picture.size, options)
    if refusal is not None:
        return refusal
    with _quietly():
        rgb_HWC = _decode_with_pillow(picture)
    return rgb_HWC if isinstance(rgb_HWC, Failure) else cut(rgb_HWC, options)


def _open(data: bytes) -> ImageFile.ImageFile | Failure:
    """Read the header; the pixels stay undecoded."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address, which would differ from run to run.
        names = ", ".join(FORMATS)
        return Failure(Status.BAD_IMAGE, f"no readable header of {names}; the file starts with {data[:12]!r}")
    except Image.DecompressionBombError as error:
        # Pillow's text ends in a suspicion; what helps is the fix.
        return Failure(Status.IMAGE_TOO_LARGE, f"{_one_line(error).partition(', could be')[0]}: shrink it")
    except Exception as error:  # noqa: BLE001  its parsers raise whatever a damaged header runs them into
        return Failure(Status.BAD_IMAGE, f"can't be opened: {_one_line(error)}")


def _check_size(width: int, height: int, options: PixelOptions) -> Failure | None:
    if width < 1 or height < 1:
        return _no_pixels(width, height)
    if width * height > options.max_decoded_pixels:
        return Failure(
            Status.IMAGE_TOO_LARGE,
            f"{width}x{height} is {width * height} pixels, over the limit of {options.max_decoded_pixels} "
            "to decode: shrink it",
        )
    return None


def _no_pixels(width: int, height: int) -> Failure:
    return Failure(Status.BAD_IMAGE, f"the picture is {width}x{height}: it has no pixels")


def _decode_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Decode where simplejpeg gives Pillow's pixels (in a third of the time); None leaves the file to Pillow.

    simplejpeg is strict by default: whatever libjpeg would only warn of (a cut, stray bytes) is a ValueError.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in _EXACT_COLORSPACES or (width, height) != size:
            return None
        rgb_HWC: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return rgb_HWC


def _decode_with_pillow(image: Image.Image) -> NDArray[np.uint8] | Failure:
    width, height = image.size
    try:
        _load(image)
        rgb_HWC = np.asarray(_to_rgb(image))
    except Exception as error:  # noqa: BLE001  its decoders raise whatever damaged data runs them into
        return Failure(
            Status.BAD_IMAGE, f"{image.format or 'picture'} of {width}x{height} can't be decoded: {_one_line(error)}"
        )
    # After loading: TIFF turns itself then, and PNG may carry its EXIF behind the pixels.
    return _upright(rgb_HWC, _orientation(image))


def _load(image: Image.Image) -> None:
    """Decode the pixels.

    A PNG is read on to its end, and what is wrong behind the pixels raises once they are all there (`tile` is
    empty then, and a second `load` gives them). Such a picture counts. One whose compressed data breaks off or
    fails zlib's checks doesn't.
    """
    try:
        image.load()
    except Exception as error:
        read_to_the_end = image.format == "PNG" and not getattr(image, "tile", None)
        if not read_to_the_end or str(error).startswith("broken data stream"):
            raise
        image.load()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Bring any mode to RGB, alpha over white."""
    if image.mode.startswith(("I", "F")):
        return _narrow(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba.getchannel("A"))  # rounds as float arithmetic would, on all 256 x 256 values
        return canvas
    return image.convert("RGB")


def _narrow(image: Image.Image) -> Image.Image:
    """Scale integer and float samples to 8 bits; Pillow's own `convert` would clip them at 255."""
    values_HW = np.asarray(image)
    scaled_HW = np.nan_to_num(values_HW.astype(np.float32), nan=0.0) / np.float32(_full_scale(image, values_HW))
    grey_HW = np.rint(np.clip(scaled_HW, 0, 1) * 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey_HW[values_HW == transparent] = 255
    return Image.fromarray(grey_HW).convert("RGB")


def _full_scale(image: Image.Image, values_HW: NDArray[Any]) -> float:
    """Return the sample value that stands for white.

    16-bit grey says it itself (a TIFF of 12 bits has 12 in its header), and Pillow spreads a PGM over 16 bits. For
    32-bit integers and floats there is no rule: the least of 1 (floats only), 255, 65535 and the largest value.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))  # 258: BitsPerSample
        return float(2 ** bits[0] - 1)
    if image.format == "PPM" and image.mode == "I":
        return 65535.0
    finite = values_HW[np.isfinite(values_HW)]
    largest = float(finite.max()) if finite.size else 0.0
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((scale for scale in usual if largest <= scale), largest)


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation (or XMP's, where EXIF has none); 1 where the block is missing or damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  a damaged EXIF block, of which Pillow raises anything, doesn't spoil a picture
        return 1
    return value if isinstance(value, int) else 1


def _upright(rgb_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply an EXIF orientation: 5 to 8 swap the axes, then rows or columns or both are reversed."""
    if orientation not in range(2, 9):
        return rgb_HWC
    if orientation >= 5:
        rgb_HWC = rgb_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb_HWC = rgb_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        rgb_HWC = rgb_HWC[:, ::-1]
    return np.ascontiguousarray(rgb_HWC)


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_ERROR]
    return "".join(char if char.isprintable() else "?" for char in text)
