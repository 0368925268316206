"""The paper's comparison in the rubric world: same labels, same number of steps, several seeds, unseen prompts.

    base ─┬─ sft, rewarddance, grpo (text), grpo, gdso           from labels (rewarddance: and reasonings)
          └─ opd, risd                                           from the gdso model of the same seed, the teacher
    each ── zscore score test/ ──► PLCC, SRCC, HPA, margin HPA against the truth, means of the four dimensions

Every stage is a command that a user would type; one whose result lies in WORK is not run again, and one that was cut
off goes on. The base has learned from drawn scenes and their true scores, more of them than there are labels: what is
compared is what a method makes of a model that can see, say and score a little. Labels are raters', with their noise;
RewardDance's reasonings name what the scene was drawn with.

    python benchmarks/world_study.py [build/world-study] [--seeds 0 1 2]    two hours; --only-run for one seed by itself

Intervals draw test prompts, the same ones for all methods, and hold the seeds fixed. The configuration was frozen
before any test prompt was scored.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from _common import report

from zscore.agreement import Bootstrap, correlations, count_pairs
from zscore.checkpoint import weights_hash
from zscore.cli.app import build_app
from zscore_trainers.world.base import make_base
from zscore_trainers.world.gates import gates, read_truth
from zscore_trainers.world.shards import WorldOptions, write_world

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Metrics = dict[str, dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]]

LABELS, REASONINGS = "annotated/annotations.parquet", "reasoning.jsonl"
DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")
METRICS = ("plcc", "srcc", "hpa", "margin_hpa")


@dataclass(frozen=True, slots=True)
class Study:
    """Frozen before the test prompts were scored."""

    base_steps: int = 3000
    base_until: int = 2000
    """Everything starts from a base model that was stopped early: a finished one has little left to learn.

    Not so early that it can't reason: on validation prompts its scores behind a reasoning correlate with the truth by
    0.5 or more on every dimension.
    """
    labelled_prompts: int = 96
    """Four pictures each, with five raters."""
    more_prompts: int = 192
    """Pictures without labels, for RISD."""
    test_prompts: int = 75
    candidates: int = 9
    """Pictures of a test prompt: 2,700 pairs, of which on every dimension more than 2,000 have unequal truths."""
    steps: int = 40
    """Of every algorithm."""
    learning_rate: float = 3e-4
    warmup: int = 5
    margin: float = 0.5


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    name: str
    title: str
    algorithm: str | None
    reasons: bool
    data: str = LABELS
    shards: str = "labelled"
    settings: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


ON_PAIRS = ("batch_size=4", "group=8")
"""64 outputs a step, as many as the others have pictures or outputs."""
METHODS = (
    Method("zero", "zero-shot", None, reasons=False),
    Method("zero_told", "zero-shot, with reasoning", None, reasons=True),
    Method("sft", "SFT", "sft", reasons=False),
    Method("rewarddance", "RewardDance", "rewarddance", reasons=True, data=REASONINGS),
    Method("grpo_text", "GRPO, reward from text", "grpo", reasons=True, settings=(*ON_PAIRS, "reward_from=text")),
    Method("grpo", "GRPO", "grpo", reasons=True, settings=ON_PAIRS),
    Method("gdso", "GDSO (the teacher)", "gdso", reasons=True, settings=ON_PAIRS),
    Method("opd", "OPD", "opd", reasons=True, extra=("--teacher", "gdso/model")),
    Method("risd", "RISD, same pictures", "risd", reasons=False, data="teacher-labelled.parquet"),
    Method("risd_more", "RISD, more pictures", "risd", reasons=False, data="teacher-more.parquet", shards="more"),
)
PAIRED = (
    ("gdso", "grpo"),
    ("grpo", "grpo_text"),
    ("gdso", "sft"),
    ("risd", "sft"),
    ("risd_more", "risd"),
    ("risd_more", "opd"),
    ("risd_more", "gdso"),
)


def scores_of(work: Path, seed: int, method: Method) -> Path:
    """Scores of the test pictures; those of a model that isn't trained don't depend on the seed."""
    return (work / f"seed-{seed}" if method.algorithm else work) / f"{method.name}.parquet"


class Runner:
    """Runs the stages of one seed in its folder."""

    def __init__(self, work: Path, base: Path, seed: int, study: Study) -> None:
        self._work = work
        self._folder = work / f"seed-{seed}"
        self._test = work / "test"
        self._base = base
        self._seed = seed
        self._study = study
        self._folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Everything of this seed."""
        study, folder = self._study, self._folder
        for name, prompts, seed in (("labelled", study.labelled_prompts, 100), ("more", study.more_prompts, 200)):
            draw(folder / name, WorldOptions(split="train", prompts=prompts, seed=seed + self._seed))
        ratings = ("labelled/ratings.csv", "labelled", "--test-share", "0")
        self._stage(LABELS, "annotations", "build", *ratings, "--out", "annotated")
        relabel(folder / "labelled" / "reasoning.jsonl", folder / LABELS, folder / REASONINGS)
        for method in METHODS:
            if method.name == "opd":  # the teacher is there now
                for name in ("labelled", "more"):
                    self._score(name, "gdso/model", f"teacher-{name}.parquet", reasons=True)
            if method.algorithm:
                self._train(method)
            model = f"{method.name}/model" if method.algorithm else str(self._base)
            self._score(str(self._test), model, scores_of(self._work, self._seed, method), reasons=method.reasons)

    def _train(self, method: Method) -> None:
        study = self._study
        settings = [f"steps={study.steps}", f"learning_rate={study.learning_rate}", f"warmup={study.warmup}"]
        settings += [f"seed={self._seed}", "held_out=0", "evaluate_every=0", *method.settings]
        flags = [part for setting in settings for part in ("--set", setting)]
        data = ("--data", method.data, "--model", str(self._base), "--out", method.name, *method.extra)
        assert method.algorithm is not None
        asked = ("train", method.algorithm, method.shards, "--recipe", "tiny", "--resume")
        self._stage(f"{method.name}/model/zscore.json", *asked, *data, *flags)

    def _score(self, shards: str, model: str, out: Path | str, *, reasons: bool) -> None:
        told = ("--reasoning", "--max-output-tokens", "80", "--batch-size", "64") if reasons else ("--layout", "joint")
        where = ("--model", model, "--out", str(out), "--engine", "transformers", "--dtype", "float32", "--quiet")
        self._stage(str(out), "score", shards, *where, *told)

    def _stage(self, result: str, *arguments: str) -> None:
        """One command of zscore, unless its result is there; its time is kept beside it."""
        if (self._folder / result).exists():
            return
        began = time.perf_counter()
        with (self._folder / "log.txt").open("a") as log, contextlib.chdir(self._folder):
            log.write(f"\nzscore {' '.join(arguments)}\n")
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                build_app()(list(arguments), standalone_mode=False)
        kept = self._folder / "seconds.json"
        seconds = json.loads(kept.read_text()) if kept.exists() else {}
        kept.write_text(json.dumps({**seconds, result: time.perf_counter() - began}))


def draw(folder: Path, options: WorldOptions) -> None:
    """A set of the world, unless it is there."""
    if (folder / "truth.csv").exists():
        return
    draft = folder.with_name(f"{folder.name}.draft-{os.getpid()}")
    write_world(draft, options)
    draft.rename(folder)


def relabel(reasonings: Path, labels: Path, out: Path) -> None:
    """Reasonings with the scores that raters gave, which are what everyone else learns from, instead of the truth's."""
    label = pl.read_parquet(labels).unpivot(DIMENSIONS, index="key", variable_name="dimension", value_name="score")
    said = pl.read_ndjson(reasonings).drop("score").join(label, on=["key", "dimension"], maintain_order="left")
    said.write_ndjson(out)


def same_study(work: Path, now: dict[str, Any]) -> None:
    """Refuse a folder whose results are of another configuration or base."""
    file = work / "study.json"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now))
    before = json.loads(file.read_text())
    if before != now:
        other = ", ".join(sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)))
        sys.exit(f"{work} holds results with another {other}: give an empty folder")


def base_model(work: Path, study: Study) -> Path:
    """What everything starts from, made if it isn't there."""
    made = work / "base" / "model"
    if not (made / "zscore.json").exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        make_base(made.parent, steps=study.base_steps, until=study.base_until)
    return made


@dataclass(frozen=True, slots=True)
class Found:
    """Scores of one method and seed, with the truth; N pictures, D dimensions."""

    score_ND: NDArray[np.float64]
    truth_ND: NDArray[np.float64]
    group_N: NDArray[np.int64]
    tokens: float
    """Generated for a picture and dimension; 0 where the score is read from the prompt's last position."""
    valid: float


def read(scores: Path, truth: pl.DataFrame) -> Found:
    """Expected scores beside the true ones.

    A picture of which one output came to no score has failed, and counts as the middle of the scale on all dimensions.
    """
    rows = pl.read_parquet(scores).join(truth, on="key", suffix="_true").sort("shard", "index")
    assert rows.height == truth.height
    score_ND = rows.select(pl.col(DIMENSIONS).fill_null(3.0)).to_numpy().astype(np.float64).round(9)
    prompts = {name: at for at, name in enumerate(sorted(rows["group"].unique()))}
    tokens = rows["output_tokens"].mean() if "output_tokens" in rows.columns else None
    return Found(
        score_ND,
        rows.select([f"{name}_true" for name in DIMENSIONS]).to_numpy(),
        np.array([prompts[name] for name in rows["group"]]),
        float(tokens) / len(DIMENSIONS) if tokens is not None else 0.0,
        float((rows["status"] == "ok").mean()),
    )


def functions(found: Found, margin: float) -> dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]:
    """Each metric, averaged over the dimensions, as a function of how often each prompt is drawn."""
    groups = int(found.group_N.max()) + 1
    parts: dict[str, list[Any]] = {name: [] for name in METRICS}
    for at in range(len(DIMENSIONS)):
        score_N, truth_N = found.score_ND[:, at], found.truth_ND[:, at]
        found_functions = correlations(score_N, truth_N, found.group_N, groups)[1]
        parts["plcc"].append(found_functions["plcc"])
        parts["srcc"].append(found_functions["srcc"])
        for name, gap in (("hpa", 0.0), ("margin_hpa", margin)):
            counts = count_pairs(score_N, truth_N, found.group_N, groups, gap)
            parts[name].append(share(counts.right_G, counts.pairs_G))
    return {name: mean_of(some) for name, some in parts.items()}


def share(right_G: NDArray[np.float64], all_G: NDArray[np.float64]) -> Callable[..., NDArray[np.float64]]:
    """Of right pairs."""
    return lambda W_BG: (W_BG @ right_G) / (W_BG @ all_G)


def mean_of(some: Sequence[Callable[..., NDArray[np.float64]]]) -> Callable[..., NDArray[np.float64]]:
    """Of several functions."""
    return lambda W_BG: np.mean([one(W_BG) for one in some], axis=0)


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


def train_seconds(work: Path, seeds: Sequence[int]) -> dict[str, float]:
    """Mean over the seeds, of training alone."""
    kept = [json.loads((work / f"seed-{seed}" / "seconds.json").read_text()) for seed in seeds]
    return {
        method.name: float(np.mean([one.get(f"{method.name}/model/zscore.json", 0.0) for one in kept]))
        for method in METHODS
        if method.algorithm
    }


def show(found: dict[str, Any], seconds: dict[str, float]) -> None:
    """Tables for trainers/README.md."""
    print("\n| method | PLCC | SRCC | HPA | margin HPA | seen rightly | compared | output tokens | training, s |")
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
    options = WorldOptions(split="test", prompts=study.test_prompts, candidates=study.candidates, seed=1000)
    same_study(work, {**asdict(study), "base": weights_hash(base)})
    draw(work / "test", options)
    for seed in given.seeds:
        Runner(work, base, seed, study).run()
    if given.only_run:
        return
    compared = compare(work, given.seeds, study)
    seconds = train_seconds(work, given.seeds)
    show(compared, seconds)
    about = json.loads((base / "zscore.json").read_text())["trained"]
    report(
        "world_study",
        {
            "study": asdict(study),
            "base": about,
            "base_weights": weights_hash(base),
            "seeds": given.seeds,
            "train_seconds": seconds,
            **compared,
        },
    )


if __name__ == "__main__":
    main()
