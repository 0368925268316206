"""The paper's comparison in the rubric world: same labels, same number of steps, several seeds, unseen prompts.

    base ─┬─ sft, rewarddance, grpo (text), grpo, gdso           from labels (rewarddance: and reasonings)
          └─ opd, risd                                           from the gdso model of the same seed, the teacher
    each ── zscore score test/ ──► PLCC, SRCC, HPA, margin HPA against the truth, means of the four dimensions

Every stage is a command that a user would type; one whose result lies in WORK is not run again, and one that was cut
off goes on. Each method has the learning rate that world_rates.py chose for it on validation prompts. The base has
learned from drawn scenes and their true scores, more of them than there are labels: what is compared is what a method
makes of a model that can see, say and score a little. Labels are raters', with their noise; RewardDance's reasonings
name what the scene was drawn with.

    python benchmarks/world_study.py [build/world-study] [--seeds 0 1 2]    two hours; --only-run for one seed by itself

Intervals draw test prompts, the same ones for all methods, and hold the seeds fixed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import RESULTS, report
from _world_runs import METHODS, Method, Runner, Study, base_model, draw, same_study
from _world_scores import METRICS, functions, mean_of, read

from zscore.agreement import Bootstrap
from zscore.checkpoint import weights_hash
from zscore_trainers.world.gates import gates, read_truth
from zscore_trainers.world.shards import WorldOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Metrics = dict[str, dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]]

PAIRED = (
    ("gdso", "zero_told"),
    ("grpo", "zero_told"),
    ("gdso", "rewarddance"),
    ("gdso", "grpo"),
    ("grpo", "grpo_text"),
    ("gdso", "sft"),
    ("sft", "zero"),
    ("risd", "zero"),
    ("risd", "sft"),
    ("risd_more", "risd"),
    ("risd_more", "opd"),
    ("risd_more", "gdso"),
)


def scores_of(work: Path, seed: int, method: Method) -> Path:
    """Scores of the test pictures; those of a model that isn't trained don't depend on the seed."""
    return (work / f"seed-{seed}" if method.algorithm else work) / f"{method.name}.parquet"


def chosen_rates(base: str, results: Path = RESULTS) -> dict[str, float]:
    """Of every method that is trained, as world_rates.py chose them on validation prompts for the base of this hash."""
    found = json.loads((results / "world_rates.json").read_text())["result"]
    if found["base_weights"] != base:
        sys.exit(f"learning rates were chosen for base {found['base_weights']}, not {base}: run world_rates.py with it")
    of = found["chosen"]
    by_algorithm = {method.algorithm: of[method.name] for method in METHODS if method.rates}
    return {method.name: of.get(method.name, by_algorithm[method.algorithm]) for method in METHODS if method.algorithm}


def run(work: Path, base: Path, seed: int, study: Study, rates: dict[str, float]) -> None:
    """Everything of one seed."""
    runner = Runner(work, base, seed, study)
    runner.draw()
    for method in METHODS:
        if method.teacher is not None:
            runner.teach(method.teacher, method.shards)
        if method.algorithm:
            runner.train(method, rates[method.name], method.name, method.teacher or "")
        model = f"{method.name}/model" if method.algorithm else base
        runner.score(work / "test", model, scores_of(work, seed, method), reasons=method.reasons)


def compare(work: Path, seeds: Sequence[int], study: Study) -> dict[str, Any]:
    """All figures."""
    truth = read_truth(work / "test")
    found = {method.name: [read(scores_of(work, seed, method), truth) for seed in seeds] for method in METHODS}
    each = {name: [functions(one, study.margin) for one in some] for name, some in found.items()}
    metrics = {
        name: {metric: mean_of([one[metric] for one in some]) for metric in METRICS} for name, some in each.items()
    }
    groups = int(found["zero"][0].group_N.max()) + 1
    once_BG = np.ones((1, groups))
    values = {name: {key: float(one(once_BG)[0]) for key, one in of.items()} for name, of in metrics.items()}
    drawn = replicates(metrics, groups, study.test_prompts * study.candidates)
    return {
        "values": values,
        "spread_over_seeds": {
            name: {metric: float(np.std([one[metric](once_BG)[0] for one in some])) for metric in METRICS}
            for name, some in each.items()
        },
        "intervals": {name: {key: interval(all_B) for key, all_B in of.items()} for name, of in drawn.items()},
        "differences": {
            f"{left} - {right}": {
                key: [values[left][key] - values[right][key], *interval(drawn[left][key] - drawn[right][key])]
                for key in METRICS
            }
            for left, right in PAIRED
        },
        "output_tokens": {name: float(np.mean([one.tokens for one in some])) for name, some in found.items()},
        "valid": {name: float(np.mean([one.valid for one in some])) for name, some in found.items()},
        "gates": {
            method.name: [asdict(gates(scores_of(work, seed, method), work / "test")) for seed in seeds]
            for method in METHODS
            if method.reasons
        },
    }


def replicates(metrics: Metrics, groups: int, width: int) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Every metric of every method on the same draws of prompts."""
    drawn: dict[str, dict[str, list[NDArray[np.float64]]]] = {
        name: {metric: [] for metric in of} for name, of in metrics.items()
    }
    for W_BG in Bootstrap().blocks(groups, width):
        for name, of in metrics.items():
            for metric, function in of.items():
                drawn[name][metric].append(function(W_BG))
    return {name: {metric: np.concatenate(all_B) for metric, all_B in of.items()} for name, of in drawn.items()}


def interval(values_B: NDArray[np.float64]) -> list[float]:
    """95 %."""
    return [float(value) for value in np.quantile(values_B, [0.025, 0.975])]


def train_seconds(work: Path, base: Path, seeds: Sequence[int], study: Study) -> dict[str, float]:
    """Mean over the seeds, of training alone: processor time of one thread."""
    kept = [Runner(work, base, seed, study).seconds() for seed in seeds]
    return {
        method.name: float(np.mean([one[f"{method.name}/model/zscore.json"] for one in kept]))
        for method in METHODS
        if method.algorithm
    }


def show(found: dict[str, Any], seconds: dict[str, float]) -> None:
    """Tables for trainers/README.md."""
    print("\n| method | PLCC | SRCC | HPA | margin HPA | seen rightly | compared | output tokens | training, CPU s |")
    print(f"|{'---|' * 9}")
    for method in METHODS:
        cells = [f"{found['values'][method.name][metric]:.3f}" for metric in METRICS]
        low, high = found["intervals"][method.name]["hpa"]
        cells[2] += f" [{low:.3f}, {high:.3f}]"
        passed = found["gates"].get(method.name, [])
        shares = [[one[gate] for one in passed] for gate in ("things", "comparisons")]
        cells += [f"{np.mean(one):.2f}" if one else "" for one in shares]
        tokens = found["output_tokens"][method.name]
        cells += [f"{tokens:.0f}" if tokens else "1 (read, not written)"]
        cells += [f"{seconds[method.name]:.0f}" if method.name in seconds else ""]
        print(f"| {method.title} | {' | '.join(cells)} |")
    print("\n| difference in HPA | |\n|---|---|")
    for name, metrics in found["differences"].items():
        value, low, high = metrics["hpa"]
        print(f"| {name} | {value:+.3f} [{low:+.3f}, {high:+.3f}] |")


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("build/world-study"))
    parser.add_argument("--base", type=Path, help="checkpoint that everything starts from (else it is trained)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-run", action="store_true", help="run the seeds' stages, compare nothing")
    given = parser.parse_args()
    work, study = given.work.resolve(), Study()
    base = (given.base or base_model(work, study)).resolve()
    options = WorldOptions(split="test", prompts=study.test_prompts, candidates=study.candidates, seed=2000)
    hashed = weights_hash(base)
    rates = chosen_rates(hashed)
    same_study(work, {**asdict(study), "base": hashed, "learning_rates": rates})
    draw(work / "test", options)
    for seed in given.seeds:
        run(work, base, seed, study, rates)
    if given.only_run:
        return
    compared = compare(work, given.seeds, study)
    seconds = train_seconds(work, base, given.seeds, study)
    show(compared, seconds)
    about = json.loads((base / "zscore.json").read_text())["trained"]
    kept = {
        "study": asdict(study),
        "learning_rates": rates,
        "base": about,
        "base_weights": hashed,
        "seeds": given.seeds,
    }
    report("world_study", {**kept, "train_seconds": seconds, **compared})


if __name__ == "__main__":
    main()
