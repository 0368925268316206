"""A learning rate for each method of world_study.py, chosen on prompts that the study never tests.

    each method × each rate ── zscore train ──► zscore score validation/ ──► HPA against the truth, mean of dimensions

Labelled prompts and seed are the choice's own, too. What learns from a teacher learns from the GDSO model of the rate
that was chosen for GDSO. Stages whose results lie in WORK are not run again.

    python benchmarks/world_rates.py [build/world-rates]      an hour; --methods a part of it, alone: compares nothing
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _common import report
from _world_runs import METHODS, Method, Runner, Study, base_model, draw, same_study
from _world_scores import METRICS, functions, read

from zscore.checkpoint import weights_hash
from zscore_trainers.world.gates import read_truth
from zscore_trainers.world.shards import WorldOptions

SEED = 50
VALIDATION = WorldOptions(split="validation", prompts=96, candidates=4, seed=1050)


def folder_of(method: Method, rate: float, teacher: str = "") -> str:
    """A run's, within the seed's."""
    return f"{method.name}-{rate:g}{teacher and f'-of-{teacher}'}"


def reached(work: Path, scores: Path, study: Study) -> dict[str, float]:
    """Agreement with the truth on the validation prompts, mean of the dimensions."""
    found = read(scores, read_truth(work / "validation"))
    once_BG = np.ones((1, int(found.group_N.max()) + 1))
    of = functions(found, study.margin)
    return {metric: float(of[metric](once_BG)[0]) for metric in METRICS}


def best(of_rates: dict[str, dict[str, float]]) -> float:
    """The rate of the highest HPA; of equal ones the lowest."""
    return max(map(float, of_rates), key=lambda rate: (of_rates[f"{rate:g}"]["hpa"], -rate))


def sweep(work: Path, runner: Runner, method: Method, study: Study) -> dict[str, dict[str, float]]:
    """Train and score it at all of its rates."""
    teacher, found = "", {}
    if method.teacher is not None:
        (taught_by,) = (one for one in METHODS if one.name == method.teacher)
        teacher = folder_of(taught_by, best(sweep(work, runner, taught_by, study)))
        runner.teach(teacher, method.shards)
    for rate in method.rates:
        out = folder_of(method, rate, teacher)
        runner.train(method, rate, out, teacher)
        runner.score(work / "validation", f"{out}/model", f"{out}.parquet", reasons=method.reasons)
        found[f"{rate:g}"] = reached(work, runner.folder / f"{out}.parquet", study)
    return found


def untrained(work: Path, runner: Runner, base: Path, study: Study) -> dict[str, dict[str, float]]:
    """What the base reaches, at once and reasoning, on the same prompts."""
    found = {}
    for method in (one for one in METHODS if one.algorithm is None):
        runner.score(work / "validation", base, f"{method.name}.parquet", reasons=method.reasons)
        found[method.name] = reached(work, runner.folder / f"{method.name}.parquet", study)
    return found


def show(found: dict[str, dict[str, dict[str, float]]], chosen: dict[str, float]) -> None:
    """HPA by method and rate; the chosen rate's in bold."""
    rates = sorted({float(rate) for of in found.values() for rate in of})
    print(f"\n| HPA | {' | '.join(f'{rate:g}' for rate in rates)} |\n|{'---|' * (len(rates) + 1)}")
    for method in METHODS:
        if method.name in found:
            of, best_one = found[method.name], chosen[method.name]
            cells = [f"{of[f'{rate:g}']['hpa']:.3f}" if f"{rate:g}" in of else "" for rate in rates]
            cells[rates.index(best_one)] = f"**{cells[rates.index(best_one)]}**"
            print(f"| {method.title} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, then choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("build/world-rates"))
    parser.add_argument("--base", type=Path, help="checkpoint that everything starts from (else it is trained)")
    swept = [one for one in METHODS if one.rates]
    parser.add_argument("--methods", nargs="+", choices=[one.name for one in swept], help="run these, choose nothing")
    given = parser.parse_args()
    work, study = given.work.resolve(), Study()
    base = (given.base or base_model(work, study)).resolve()
    kept: dict[str, Any] = {
        "study": asdict(study),
        "validation": asdict(VALIDATION),
        "base_weights": weights_hash(base),
    }
    same_study(work, kept)
    draw(work / "validation", VALIDATION)
    runner = Runner(work, base, SEED, study)
    runner.draw()
    found = {one.name: sweep(work, runner, one, study) for one in swept if one.name in (given.methods or [one.name])}
    if given.methods:
        return
    chosen = {name: best(of) for name, of in found.items()}
    for method in swept:
        if chosen[method.name] in (min(method.rates), max(method.rates)):
            print(f"{method.title}: the outermost of its rates is best; try more")
    show(found, chosen)
    report(
        "world_rates",
        {**kept, "seed": SEED, "untrained": untrained(work, runner, base, study), **found, "chosen": chosen},
    )


if __name__ == "__main__":
    main()
