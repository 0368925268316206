"""What the world's base model can do after so many steps: on prompts of the validation split, at once and reasoning.

    python benchmarks/world_base.py [build/world-base]      an hour; goes on where it was cut off

Behind a reasoning: the shares of right captions, comparisons and valid outputs (`zscore_trainers.world.gates`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import report
from _world_scores import read

from zscore.agreement import correlations, count_pairs
from zscore_trainers.world.base import make_base
from zscore_trainers.world.gates import gates, read_truth
from zscore_trainers.world.scenes import DIMENSIONS
from zscore_trainers.world.shards import WorldOptions, write_world

if TYPE_CHECKING:
    import polars as pl

STEPS = 3000
UNTIL = (1200, 1600, 2000, STEPS)
DRAWN = WorldOptions(split="validation", prompts=48, seed=77)
WAYS = {
    "at once": ("--layout", "joint"),
    "reasoning": ("--reasoning", "--max-output-tokens", "80", "--batch-size", "64"),
}


def base_after(work: Path, steps: int) -> Path:
    """The checkpoint of the one run after so many of its steps."""
    kept = work / f"base-{steps}"
    if not kept.exists():
        draft = kept.with_name(f"{kept.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(make_base(work / "base", steps=STEPS, until=steps), draft)
        draft.rename(kept)
    return kept


def scored(work: Path, model: Path, way: str) -> Path:
    """Scores of the validation pictures."""
    out = work / f"{model.name}-{way.replace(' ', '-')}.parquet"
    if not out.exists():
        where = ["--model", str(model), "--out", str(out), "--engine", "transformers", "--dtype", "float32", "--quiet"]
        command = [sys.executable, "-m", "zscore", "score", str(work / "drawn"), *where, *WAYS[way]]
        subprocess.run(command, check=True)
    return out


def agreement(scores: Path, truth: pl.DataFrame) -> dict[str, dict[str, float]]:
    """PLCC and HPA with the truth, by dimension; a picture without scores counts as the middle."""
    both = read(scores, truth)
    groups = int(both.group_N.max()) + 1
    found = {}
    for at, name in enumerate(DIMENSIONS):
        score_N, truth_N = both.score_ND[:, at], both.truth_ND[:, at]
        counts = count_pairs(score_N, truth_N, both.group_N, groups)
        plcc = correlations(score_N, truth_N, both.group_N, groups)[1]["plcc"](np.ones((1, groups)))
        found[name] = {"plcc": float(plcc[0]), "hpa": float(counts.right_G.sum() / counts.pairs_G.sum())}
    return found


def main() -> None:
    """Measure each, and print a table for trainers/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("build/world-base"))
    work = parser.parse_args().work
    if not (work / "drawn" / "truth.csv").exists():
        write_world(work / "drawn", DRAWN)
    truth = read_truth(work / "drawn")
    result: dict[str, Any] = {"drawn": asdict(DRAWN)}
    rows = []
    for steps in UNTIL:
        model = base_after(work, steps)
        tables = {way: scored(work, model, way) for way in WAYS}
        passed = gates(tables["reasoning"], work / "drawn")
        agreed = {way: agreement(table, truth) for way, table in tables.items()}
        result[f"{steps} steps"] = {"gates": asdict(passed), **agreed}
        cells = [f"{passed.captions:.2f}, {passed.comparisons:.2f}"]
        cells += [", ".join(f"{found[name]['plcc']:.2f}" for name in DIMENSIONS) for found in agreed.values()]
        rows.append(f"| {steps:,} | {' | '.join(cells)} |")
    report("world_base", result)
    print(f"\nPLCC: {', '.join(DIMENSIONS)}")
    print(
        "\n".join(
            [
                "| steps | captions, comparisons right | PLCC at once | PLCC behind a reasoning |",
                "|---|---|---|---|",
                *rows,
            ]
        )
    )


if __name__ == "__main__":
    main()
