"""Draws a set of the rubric world: shards, ratings, true scores and reasonings (`zscore_trainers.world.shards`).

python -m zscore_trainers.world OUT --split train --prompts 256 [--candidates 4] [--raters 5] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zscore_trainers.world.shards import SPLITS, WorldOptions, write_world


def main() -> None:
    """Draw and say what there is."""
    parser = argparse.ArgumentParser(
        prog="python -m zscore_trainers.world",
        description="Draw shards of the rubric world, with what raters would say and what is true.",
    )
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose prompts (default: train)")
    for name, default, text in (
        ("prompts", 256, "prompts"),
        ("candidates", 4, "pictures a prompt"),
        ("raters", 5, "raters a picture"),
        ("seed", 0, "of everything"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    given = parser.parse_args()
    options = WorldOptions(
        split=given.split,
        prompts=given.prompts,
        candidates=given.candidates,
        raters=given.raters,
        seed=given.seed,
    )
    paths = write_world(given.out, options)
    print(f"{given.prompts * given.candidates:,} pictures in {len(paths)} shards under {given.out}")  # noqa: T201


if __name__ == "__main__":
    main()
