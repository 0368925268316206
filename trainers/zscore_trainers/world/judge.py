"""The true scores of a canvas, from the parameters that draw it; no picture, no model.

What is drawn from a scene has the scene's own scores. Parameters that were moved are read back: the kinds of a fault
add up, in points of severity, and shapes are what they are nearest to.

Shape suffixes: B pictures, M objects, C = 3 colour channels, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zscore_trainers.world.render import BLUR, CALM, CELL, GAP, GARISH, NOISE, PIERCED, RADIUS, RGB, STRIPES
from zscore_trainers.world.scenes import BEST, FORMS, WORST, Scene, Thing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zscore_trainers.world.render import Canvas

VISIBLE = 0.5
"""Opacity from which a shape is there."""


def truth(canvas: Canvas, asked: Sequence[tuple[Thing, ...]]) -> Tensor:
    """True scores from 1 to 5 in the order of `scenes.DIMENSIONS`, (B, D).

    Args:
        canvas: the parameters.
        asked: what each picture's prompt names; its first objects are those.
    """
    ground_BC = canvas.ground_BC.detach()
    brightest_B = ground_BC.amax(-1).clamp(min=1e-6)
    saturation_B = 1 - ground_BC.amin(-1) / brightest_B
    faults = [
        canvas.noise_B.detach().abs() / NOISE + canvas.blur_B.detach().abs() / BLUR,
        ((saturation_B - CALM) / GARISH).clamp(min=0) + canvas.stripes_B.detach().abs() / STRIPES,
        canvas.gap_B.detach().abs() / GAP + canvas.pierced_B.detach().abs() / PIERCED,
    ]
    scenes = [Scene(things, _shown(canvas, row, len(things))) for row, things in enumerate(asked)]
    alignment_B = torch.tensor([scene.truth["alignment"] for scene in scenes])
    return torch.stack([alignment_B, *((BEST - fault_B).clamp(min=WORST).cpu() for fault_B in faults)], -1)


def _shown(canvas: Canvas, row: int, count: int) -> tuple[Thing | None, ...]:
    return tuple(
        _thing(canvas, row, number) if float(canvas.present_BM[row, number]) >= VISIBLE else None
        for number in range(count)
    )


def _thing(canvas: Canvas, row: int, number: int) -> Thing:
    """What a shape is nearest to."""
    column, line = (
        min(2, max(0, int(float(at) // CELL)))
        for at in canvas.centre_BM2[row, number] + torch.tensor([0.0, 3.0]).to(canvas.centre_BM2)
    )
    colour_C = canvas.colour_BMC[row, number]
    radius = float(canvas.radius_BM[row, number])
    return Thing(
        FORMS[int(canvas.form_BMF[row, number].argmax())],
        min(RGB, key=lambda name: float((colour_C - colour_C.new_tensor(RGB[name])).norm())),
        min(RADIUS, key=lambda name: abs(radius - RADIUS[name])),
        3 * line + column,
    )
