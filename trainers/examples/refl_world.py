"""Do pictures get better when a student's reward draws them? Here something else than the reward can tell.

A picture of the drawn world is a differentiable function of how much noise, blur, garish ground, stripes, gap and bars
it has, and of its shapes' colours and places. Adam moves these along the gradient of a student's reward (eq. 20,
through its own preprocessing), starting from scenes with faults. What came of it is judged by the world's true scores,
which are computed from the parameters alone (`zscore_trainers.world.judge`): a reward that rises while they fall was
fooled.

    python trainers/examples/refl_world.py --model run/model [--scenes 8] [--steps 100] [--aggregate weakest]

The student has to have learned the drawn world (rubric `shapes`), with the recipe `tiny` for instance.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from zscore.errors import ZscoreError
from zscore_trainers.refl import Reward, mean_score, weakest
from zscore_trainers.world.judge import truth
from zscore_trainers.world.render import BLUR, EDGE, GAP, GARISH, NOISE, PIERCED, STRIPES, Canvas, render, to_uint8
from zscore_trainers.world.scenes import DIMENSIONS, Scene
from zscore_trainers.world.shards import WorldOptions, draw_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

AGGREGATES = {"mean": mean_score, "weakest": weakest}
WORST_FAULT = 4.0
RANGES = {
    "noise_B": (NOISE, 0.0, WORST_FAULT * NOISE),
    "blur_B": (BLUR, 0.0, WORST_FAULT * BLUR),
    "ground_BC": (GARISH, 0.0, 1.0),
    "stripes_B": (STRIPES, 0.0, WORST_FAULT * STRIPES),
    "gap_B": (GAP, 0.0, WORST_FAULT * GAP),
    "pierced_B": (PIERCED, 0.0, WORST_FAULT * PIERCED),
    "colour_BMC": (0.2, 0.0, 1.0),
    "centre_BM2": (4.0, 0.0, float(EDGE)),
}
"""Of what is moved: what counts as one step's unit (a point of severity, where there is one), least and most."""


@dataclass(frozen=True)
class Moved:
    """What an optimisation did, each (B,) or (B, D)."""

    before: Canvas
    after: Canvas
    truth_BD: tuple[Tensor, Tensor]
    """True scores before and after."""
    mu_BD: tuple[Tensor, Tensor]
    """The student's."""
    reward: tuple[float, float]
    """Mean over the pictures."""


def faulty(count: int, seed: int) -> list[Scene]:
    """Scenes of test prompts that show what was asked for, each with three faults."""
    groups = draw_groups(WorldOptions(split="test", candidates=1, seed=seed))
    return [
        replace(
            scene,
            shown=scene.asked,
            realism=("noise" if number % 2 else "blur", 3.0),
            aesthetics=("garish", 3.0),
            plausibility=("floating", 3.0),
        )
        for number, (scene,) in enumerate(itertools.islice(groups, count))
    ]


def canvas_of(leaves: dict[str, Tensor], start: Canvas) -> Canvas:
    """The canvas of parameters that are counted in their units."""
    return replace(start, **{name: leaf * RANGES[name][0] for name, leaf in leaves.items()})


def improve(
    reward: Callable[[Sequence[str], Tensor], Tensor], scenes: Sequence[Scene], steps: int, rate: float
) -> tuple[Canvas, Canvas]:
    """Adam on minus the reward; after each step parameters are put back into their range.

    Args:
        reward: prompts and pictures (B, 3, H, W) → (B,).
        scenes: where to start.
        steps: of Adam.
        rate: its learning rate, in points of severity.

    Returns:
        The parameters before and after.
    """
    start = Canvas.of(scenes)
    prompts = [scene.prompt for scene in scenes]
    leaves = {name: (getattr(start, name) / RANGES[name][0]).requires_grad_() for name in RANGES}
    optimizer = torch.optim.Adam(leaves.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-reward(prompts, render(canvas_of(leaves, start)))).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, leaf in leaves.items():
                unit, least, most = RANGES[name]
                leaf.clamp_(least / unit, most / unit)
    return start, canvas_of(leaves, start).detached()


@torch.no_grad()
def judged(reward: Reward, scenes: Sequence[Scene], before: Canvas, after: Canvas) -> Moved:
    """Truth and the student's opinion of both."""
    prompts, asked = [scene.prompt for scene in scenes], [scene.asked for scene in scenes]
    mu_BD = tuple(reward.scores(prompts, render(canvas)) for canvas in (before, after))
    return Moved(
        before,
        after,
        (truth(before, asked), truth(after, asked)),
        (mu_BD[0], mu_BD[1]),
        (float(reward.aggregate(mu_BD[0]).mean()), float(reward.aggregate(mu_BD[1]).mean())),
    )


def show(moved: Moved) -> None:
    """A line a dimension, means over the pictures."""
    print(f"{'':<14}{'true before':>12}{'after':>7}   {'student before':>14}{'after':>7}")
    for column, name in enumerate(DIMENSIONS):
        values = [float(one_BD[:, column].mean()) for one_BD in (*moved.truth_BD, *moved.mu_BD)]
        print(f"{name:<14}{values[0]:>12.2f}{values[1]:>7.2f}   {values[2]:>14.2f}{values[3]:>7.2f}")
    print(f"{'reward':<14}{'':>22}{moved.reward[0]:>14.2f}{moved.reward[1]:>7.2f}")


def save(folder: Path, moved: Moved) -> None:
    """A picture a scene, before on the left."""
    folder.mkdir(parents=True, exist_ok=True)
    both = torch.cat([render(moved.before), render(moved.after)], -1)
    for number, pixels_HWC in enumerate(to_uint8(both)):
        Image.fromarray(pixels_HWC).save(folder / f"{number:03d}.png")


def main() -> None:
    """Improve some pictures and show what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a student of the drawn world, joint layout")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.05, help="Adam's, in points of severity")
    parser.add_argument("--aggregate", choices=AGGREGATES, default="mean", help="of the dimensions' scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the pictures, before and after side by side")
    options = parser.parse_args()
    try:
        reward = Reward.open(options.model, aggregate=AGGREGATES[options.aggregate])
    except ZscoreError as error:
        sys.exit(f"refl_world: {error}")
    scenes = faulty(options.scenes, options.seed)
    moved = judged(reward, scenes, *improve(reward, scenes, options.steps, options.rate))
    show(moved)
    if options.out is not None:
        save(options.out, moved)


if __name__ == "__main__":
    main()
