"""The base model's sight: a vision tower that learns what lies in every cell, before any words.

Real vision-language models begin with a tower that sees, too. One that learns to see by way of words alone takes some
ten times as many steps, and while it is blind its language model learns to repeat the prompt.

    filters   the patch embedding begins as cosines, each as strong as scenes make the others
    teach     form, colour, size and place of every cell's thing, and how severe each fault is, from a head that is
              thrown away
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.fft import dct
from torch.nn import functional

from zscore.patches import PixelOptions, patchify
from zscore.records import Pixels
from zscore_trainers.optimizers import make_optimizers, set_rate
from zscore_trainers.world.render import CELL, EDGE, Canvas, render, to_uint8
from zscore_trainers.world.scenes import COLOURS, FORMS, KINDS, SIZES
from zscore_trainers.world.shards import train_scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from zscore_trainers.world.scenes import Scene

CELLS = (EDGE // CELL) ** 2
CUES = (len(FORMS) + 1, len(COLOURS) + 1, len(SIZES) + 1)
"""Classes of a cell; 0 is an empty one."""
FAULTS = tuple((dimension, kind) for dimension, kinds in KINDS.items() for kind in kinds)
WIDTHS = (*CUES, CELLS, len(FAULTS))
"""Of the head's outputs: what a cell shows, which one it is, and how severe each fault of the picture is."""
EMPTY_WEIGHT, PLACE_WEIGHT, FAULT_WEIGHT = 0.25, 0.3, 0.5
OPPONENTS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Brightness, red against blue, green against both."""
BRIGHT, COLOURED, FINE_FROM = 28, 10, 8
"""Coarse filters for brightness and for each contrast of colours; the rest are fine ones for brightness."""
SCENES, LEARNING_RATE, WARMUP, FINAL_SHARE = 64, 2e-3, 20, 0.05


def filters(weight_HCTPP: Tensor, bias_H: Tensor, patches_NCPP: NDArray[np.uint8], seed: int = 0) -> None:
    """Make the filters of a patch embedding cosines that answer to these patches with mean 0 and variance 1; in place.

    Drawn at random, they answer to the ground a hundred times as strongly as to the grain on it.
    """
    count, _, frames, edge, _ = weight_HCTPP.shape
    waves_PP = torch.from_numpy(dct(np.eye(edge), norm="ortho", axis=0))
    rgb = functional.normalize(torch.tensor(OPPONENTS, dtype=torch.float64), dim=1)
    rising = sorted(itertools.product(range(edge), repeat=2), key=lambda pair: (sum(pair), pair))
    chosen = [(0, pair) for pair in rising[:BRIGHT]]
    chosen += [(contrast, pair) for contrast in (1, 2) for pair in rising[:COLOURED]]
    fine = [pair for pair in rising[BRIGHT:] if sum(pair) >= FINE_FROM]
    chosen += [(0, pair) for pair in random.Random(seed).sample(fine, count - len(chosen))]  # noqa: S311
    found_HCPP = torch.stack(
        [
            rgb[colours][:, None, None] * torch.outer(waves_PP[down], waves_PP[across])
            for colours, (down, across) in chosen
        ]
    )
    answers_NH = torch.from_numpy(patches_NCPP / 127.5 - 1).flatten(1) @ found_HCPP.flatten(1).T
    spread_H, mean_H = torch.std_mean(answers_NH, dim=0)
    weight_HCTPP.copy_((found_HCPP / spread_H[:, None, None, None])[:, :, None] / frames)  # frames show one picture
    bias_H.copy_(-mean_H / spread_H)


def teach(
    tower: Any,
    options: PixelOptions,
    *,
    steps: int,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Train a vision tower to tell what lies where; in place.

    Args:
        tower: of a Qwen3.5 model; gives one feature a cell.
        options: how pictures are cut into its patches.
        steps: each on new scenes of the train split.
        seed: of the head and the scenes.
        log: told how it goes.
    """
    device = next(tower.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(tower.config.out_hidden_size, sum(WIDTHS))
    with torch.no_grad():
        head.weight.normal_(0, head.in_features**-0.5, generator=generator)
        head.bias.zero_()
    both = torch.nn.ModuleDict({"tower": tower, "head": head}).to(device)
    optimizers = make_optimizers(both, "muon", betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        rng = random.Random(f"sight {seed} {step}")  # noqa: S311 - drawings, not secrets
        scenes = train_scenes(SCENES, rng)
        patches_NCPP = torch.from_numpy(patches(cut(scenes, options))).to(device)
        losses = told_apart(head(look(tower, patches_NCPP, len(scenes))), scenes)
        torch.autograd.backward([*losses.values()])
        set_rate(optimizers, LEARNING_RATE * min(1, (step + 1) / WARMUP) * max(FINAL_SHARE, 1 - step / steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            log(f"sight {step + 1} { ({name: round(float(loss.detach()), 3) for name, loss in losses.items()}) }")


def cut(scenes: Sequence[Scene], options: PixelOptions) -> list[Pixels]:
    """Drawn and cut into patches."""
    grid = (EDGE // options.patch, EDGE // options.patch)
    drawn = to_uint8(render(Canvas.of(list(scenes))))
    return [Pixels(patchify(picture, options), grid, EDGE, EDGE) for picture in drawn]


def patches(pictures: Sequence[Pixels]) -> NDArray[np.uint8]:
    """Those of all pictures, (N, 3, P, P)."""
    return np.concatenate([picture.patches_NCPP for picture in pictures])


def look(tower: Any, patches_NCPP: Tensor, pictures: int) -> Tensor:
    """Features of every cell, normalised: (B, cells, out_hidden_size)."""
    frames = tower.config.temporal_patch_size
    pixels_NF = (patches_NCPP.float() / 127.5 - 1)[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
    edge = EDGE // tower.config.patch_size
    grid_B3 = torch.tensor([[1, edge, edge]] * pictures, device=pixels_NF.device)
    seen_BCH = tower(pixels_NF, grid_thw=grid_B3).pooler_output.unflatten(0, (pictures, CELLS))
    return functional.layer_norm(seen_BCH, seen_BCH.shape[-1:])


def told_apart(answers_BCO: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Weighted losses of the head's outputs: cross-entropies of what cells show, squared errors of severities."""
    parts = torch.tensor_split(answers_BCO, list(itertools.accumulate(WIDTHS))[:-1], dim=-1)
    answers = dict(zip(("form", "colour", "size", "place", "faults"), parts, strict=True))
    device = answers_BCO.device
    cells_BC3 = torch.tensor([list(_cells(scene)) for scene in scenes], device=device)
    severities_BF = torch.tensor([_severities(scene) for scene in scenes], device=device)
    weight_BC = torch.where(cells_BC3[..., 0] > 0, 1.0, EMPTY_WEIGHT)
    weight_BC = weight_BC / weight_BC.sum()
    losses = {
        name: (functional.cross_entropy(answers[name].mT, cells_BC3[..., cue], reduction="none") * weight_BC).sum()
        for cue, name in enumerate(("form", "colour", "size"))
    }
    places_BC = torch.arange(CELLS, device=device).expand(len(scenes), -1)
    losses["place"] = PLACE_WEIGHT * functional.cross_entropy(answers["place"].mT, places_BC)
    losses["faults"] = FAULT_WEIGHT * functional.mse_loss(answers["faults"].mean(1), severities_BF)
    return losses


def _cells(scene: Scene) -> Iterator[tuple[int, int, int]]:
    """Classes of every cell's form, colour and size, row by row; zeros where there is nothing."""
    things = {thing.place: thing for thing in scene.shown if thing}
    for place in range(CELLS):
        thing = things.get(place)
        if thing is None:
            yield 0, 0, 0
        else:
            yield 1 + FORMS.index(thing.form), 1 + COLOURS.index(thing.colour), 1 + SIZES.index(thing.size)


def _severities(scene: Scene) -> list[float]:
    """Of every kind of fault; a dimension has one kind at most."""
    found = {dimension: getattr(scene, dimension) for dimension in KINDS}
    return [found[dimension][1] * (found[dimension][0] == kind) for dimension, kind in FAULTS]
