"""Scenes to pixels, differentiable in everything that is continuous.

Shapes are signed distances, so their edges are soft by half a pixel and gradients reach positions, sizes and colours;
blur is a Gaussian of given width, noise a fixed grain times an amplitude.

Shape suffixes: B pictures, M objects, F forms, C = 3 colour channels, H and W pixels.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from zscore_trainers.world.scenes import COLOURS, FORMS, MOST_OBJECTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zscore_trainers.world.scenes import Scene, Thing

EDGE, CELL = 96, 32
RADIUS = {"small": 7.0, "large": 12.0}
RGB = {
    "red": (0.80, 0.16, 0.16),
    "green": (0.16, 0.60, 0.24),
    "blue": (0.16, 0.28, 0.80),
    "yellow": (0.88, 0.78, 0.12),
    "purple": (0.52, 0.18, 0.66),
    "orange": (0.92, 0.50, 0.10),
}
# Per point of severity.
NOISE, BLUR, GAP, PIERCED, STRIPES = 0.045, 0.55, 1.25, 0.25, 0.07
CALM, GARISH = 0.08, 0.18
"""Saturation of a faultless ground, and what a point of severity adds to it."""
SHADE, BAR = 0.45, (0.35, 0.35, 0.35)
_TAPS = 13


@dataclass
class Canvas:
    """A batch of pictures as parameters; every tensor may want a gradient."""

    centre_BM2: Tensor
    """Pixels, x and y."""
    radius_BM: Tensor
    form_BMF: Tensor
    """Share of each form."""
    colour_BMC: Tensor
    present_BM: Tensor
    """Opacity, 0 or 1."""
    gap_B: Tensor
    """Pixels between the shapes and their shadows."""
    pierced_B: Tensor
    """How far a bar runs through the shapes, as a share of their width."""
    ground_BC: Tensor
    stripes_B: Tensor
    """Amplitude of the ground's stripes."""
    noise_B: Tensor
    """Standard deviation of the grain."""
    blur_B: Tensor
    """Standard deviation of the blur, pixels."""
    grain_BCHW: Tensor
    """Standard normal."""

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Self:
        """The parameters that draw these scenes."""
        objects = [[_object(thing) for thing in _padded(scene)] for scene in scenes]
        columns = {
            name: torch.tensor([[one[name] for one in row] for row in objects], dtype=torch.float32)
            for name in ("centre", "radius", "form", "colour", "present")
        }
        rest = [_rest(scene) for scene in scenes]
        amounts = [torch.tensor([row[name] for row in rest], dtype=torch.float32) for name in _REST]
        values = [*columns.values(), *amounts, torch.stack([_grain(scene.seed) for scene in scenes])]
        return cls(**{field.name: value for field, value in zip(fields(cls), values, strict=True)})

    def detached(self) -> Self:
        """A copy whose tensors are leaves of no graph."""
        return type(self)(**{field.name: getattr(self, field.name).detach().clone() for field in fields(self)})


_REST = ("gap", "pierced", "ground", "stripes", "noise", "blur")


def _padded(scene: Scene) -> list[Thing | None]:
    return [*scene.shown, *[None] * (MOST_OBJECTS - len(scene.shown))]


def _object(thing: Thing | None) -> dict[str, object]:
    if thing is None:
        return {
            "centre": (EDGE / 2, EDGE / 2),
            "radius": 1.0,
            "form": [0.0] * len(FORMS),
            "colour": (0.0, 0.0, 0.0),
            "present": 0.0,
        }
    row, column = divmod(thing.place, 3)
    assert thing.colour in COLOURS
    return {
        "centre": (column * CELL + CELL / 2, row * CELL + CELL / 2 - 3),
        "radius": RADIUS[thing.size],
        "form": [float(form == thing.form) for form in FORMS],
        "colour": RGB[thing.colour],
        "present": 1.0,
    }


def _rest(scene: Scene) -> dict[str, object]:
    amount = dict((scene.realism, scene.aesthetics, scene.plausibility))
    saturation = CALM + GARISH * amount.get("garish", 0.0)
    return {
        "gap": GAP * amount.get("floating", 0.0),
        "pierced": PIERCED * amount.get("pierced", 0.0),
        "ground": colorsys.hsv_to_rgb(_hue(scene), saturation, 0.92),
        "stripes": STRIPES * amount.get("stripes", 0.0),
        "noise": NOISE * amount.get("noise", 0.0),
        "blur": BLUR * amount.get("blur", 0.0),
    }


def _hue(scene: Scene) -> float:
    """Of the ground: of four drawn ones that on which the shapes are seen best."""
    drawn = [(scene.seed % 997 / 997 + quarter / 4) % 1 for quarter in range(4)]
    shapes = [colorsys.rgb_to_hsv(*RGB[thing.colour])[0] for thing in scene.shown if thing]
    return max(drawn, key=lambda hue: min(min(abs(hue - other), 1 - abs(hue - other)) for other in shapes))


def _grain(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((3, EDGE, EDGE), dtype=np.float32))


def render(canvas: Canvas) -> Tensor:
    """Pictures in [0, 1], (B, C, H, W)."""
    at = torch.arange(EDGE, dtype=canvas.radius_BM.dtype, device=canvas.radius_BM.device) + 0.5
    y_HW, x_HW = torch.meshgrid(at, at, indexing="ij")
    waves_HW = torch.sin((x_HW + y_HW) * (2 * torch.pi / 12))
    picture_BCHW = canvas.ground_BC[:, :, None, None] + canvas.stripes_B[:, None, None, None] * waves_HW
    x_BMHW = x_HW - canvas.centre_BM2[..., 0, None, None]
    y_BMHW = y_HW - canvas.centre_BM2[..., 1, None, None]
    for number in range(canvas.radius_BM.shape[1]):  # shadows lie under all shapes
        shadow_BHW = _shadow(canvas, number, x_BMHW[:, number], y_BMHW[:, number])
        picture_BCHW = picture_BCHW * (1 - SHADE * shadow_BHW.unsqueeze(1))
    for number in range(canvas.radius_BM.shape[1]):
        shape_BHW = _shape(canvas, number, x_BMHW[:, number], y_BMHW[:, number])
        picture_BCHW = _over(picture_BCHW, shape_BHW, canvas.colour_BMC[:, number])
        bar_BHW = _bar(canvas, number, x_BMHW[:, number], y_BMHW[:, number])
        picture_BCHW = _over(picture_BCHW, bar_BHW, picture_BCHW.new_tensor(BAR).expand(len(bar_BHW), 3))
    blurred_BCHW = _blurred(picture_BCHW, canvas.blur_B)
    return (blurred_BCHW + canvas.noise_B[:, None, None, None] * canvas.grain_BCHW).clamp(0, 1)


def _over(below_BCHW: Tensor, cover_BHW: Tensor, colour_BC: Tensor) -> Tensor:
    cover_B1HW = cover_BHW.unsqueeze(1)
    return below_BCHW * (1 - cover_B1HW) + colour_BC[:, :, None, None] * cover_B1HW


def _covers(distance_BHW: Tensor) -> Tensor:
    """Opacity by signed distance from the edge, pixels."""
    return torch.sigmoid(-4 * distance_BHW)


def _shape(canvas: Canvas, number: int, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    radius = canvas.radius_BM[:, number, None, None]
    circle = (x_BHW**2 + y_BHW**2 + 1e-6).sqrt() - radius
    square = torch.maximum(x_BHW.abs(), y_BHW.abs()) - 0.9 * radius
    # Base at the bottom, tip at the top; the two sides rise twice as fast as they run.
    triangle = torch.maximum(y_BHW - radius, (2 * x_BHW.abs() - y_BHW - radius) / 5**0.5)
    distance_BFHW = torch.stack([circle, square, triangle], 1)
    cover_BFHW = _covers(distance_BFHW) * canvas.form_BMF[:, number, :, None, None]
    return cover_BFHW.sum(1) * canvas.present_BM[:, number, None, None]


def _shadow(canvas: Canvas, number: int, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    radius = canvas.radius_BM[:, number, None, None]
    below = y_BHW - radius - canvas.gap_B[:, None, None] - 0.5
    distance = ((x_BHW / radius) ** 2 + (below / 2.2) ** 2 + 1e-6).sqrt() - 1
    return torch.sigmoid(-6 * distance) * canvas.present_BM[:, number, None, None]


def _bar(canvas: Canvas, number: int, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """From left of the shape into it: as deep as the severity says, and not there at all at 0."""
    radius = canvas.radius_BM[:, number, None, None]
    depth = canvas.pierced_B[:, None, None]
    right = -radius + 2 * radius * depth
    distance = torch.maximum(torch.maximum(x_BHW - right, -radius - 3 - x_BHW), y_BHW.abs() - 2)
    return _covers(distance) * (20 * depth).clamp(max=1) * canvas.present_BM[:, number, None, None]


def _blurred(picture_BCHW: Tensor, width_B: Tensor) -> Tensor:
    offsets = torch.arange(_TAPS, dtype=width_B.dtype, device=width_B.device) - _TAPS // 2
    weight_BT = torch.softmax(-(offsets**2) / (2 * (width_B.unsqueeze(-1) ** 2 + 0.01)), -1)
    batch, channels = picture_BCHW.shape[:2]
    kernel = weight_BT.repeat_interleave(channels, 0)
    flat = picture_BCHW.reshape(1, batch * channels, EDGE, EDGE)
    half = _TAPS // 2
    for shape, pad in (((-1, 1, _TAPS, 1), (0, 0, half, half)), ((-1, 1, 1, _TAPS), (half, half, 0, 0))):
        flat = torch.nn.functional.pad(flat, pad, mode="replicate")
        flat = torch.nn.functional.conv2d(flat, kernel.reshape(shape), groups=batch * channels)
    return flat.reshape(picture_BCHW.shape)


def to_uint8(pictures_BCHW: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Pixels as a decoder gives them, (B, H, W, C)."""
    return (pictures_BCHW.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
