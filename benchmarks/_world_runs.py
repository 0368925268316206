"""What world_rates.py and world_study.py run: the methods, what they have in common, and the stages of one seed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from zscore.cli.app import build_app
from zscore_trainers.world.base import make_base
from zscore_trainers.world.scenes import DIMENSIONS
from zscore_trainers.world.shards import WorldOptions, write_world

if TYPE_CHECKING:
    from pathlib import Path

LABELS, REASONINGS = "annotated/annotations.parquet", "reasoning.jsonl"


@dataclass(frozen=True, slots=True)
class Study:
    """What all methods share. Frozen before the test prompts were scored."""

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
    """What it learns from; risd, its teacher's scores of the shards."""
    shards: str = "labelled"
    settings: tuple[str, ...] = ()
    teacher: str | None = None
    """The method whose model it learns from."""
    rates: tuple[float, ...] = ()
    """Learning rates of which validation prompts choose one; none: that of the same algorithm."""


ON_PAIRS = ("batch_size=4", "group=8")
"""64 outputs a step, as many as the others have pictures or outputs."""
RATES = (3e-5, 1e-4, 3e-4)
LOWER = (1e-5, *RATES)
"""Where the lowest was best. Lower still is no learning any more: warmed up for 5 of 40 steps, 1e-5 moves little."""
METHODS = (
    Method("zero", "zero-shot", None, reasons=False),
    Method("zero_told", "zero-shot, with reasoning", None, reasons=True),
    Method("sft", "SFT", "sft", reasons=False, rates=LOWER),
    Method("rewarddance", "RewardDance", "rewarddance", reasons=True, data=REASONINGS, rates=LOWER),
    Method(
        "grpo_text",
        "GRPO, reward from text",
        "grpo",
        reasons=True,
        settings=(*ON_PAIRS, "reward_from=text"),
        rates=RATES,
    ),
    Method("grpo", "GRPO", "grpo", reasons=True, settings=ON_PAIRS, rates=RATES),
    Method("gdso", "GDSO (the teacher)", "gdso", reasons=True, settings=ON_PAIRS, rates=RATES),
    Method("opd", "OPD", "opd", reasons=True, teacher="gdso", rates=RATES),
    Method(
        "risd",
        "RISD, same pictures",
        "risd",
        reasons=False,
        teacher="gdso",
        rates=LOWER,
    ),
    Method(
        "risd_more",
        "RISD, more pictures",
        "risd",
        reasons=False,
        shards="more",
        teacher="gdso",
    ),
)


class Runner:
    """Runs the stages of one seed in its folder, each a command that a user would type.

    One whose result is there is not run again, and one that was cut off goes on.
    """

    def __init__(self, work: Path, base: Path, seed: int, study: Study) -> None:
        self.folder = work / f"seed-{seed}"
        self._base = base
        self._seed = seed
        self._study = study
        self.folder.mkdir(parents=True, exist_ok=True)

    def draw(self) -> None:
        """The pictures, their labels, and reasonings that come to these labels."""
        study, folder = self._study, self.folder
        for name, prompts, seed in (("labelled", study.labelled_prompts, 100), ("more", study.more_prompts, 200)):
            draw(folder / name, WorldOptions(split="train", prompts=prompts, seed=seed + self._seed))
        ratings = ("labelled/ratings.csv", "labelled", "--test-share", "0")
        self._stage(LABELS, "annotations", "build", *ratings, "--out", "annotated")
        relabel(folder / "labelled" / "reasoning.jsonl", folder / LABELS, folder / REASONINGS)

    def train(self, method: Method, rate: float, out: str, teacher: str) -> None:
        """One method, into the seed's folder OUT; TEACHER is the folder of the one it learns from."""
        study = self._study
        settings = [f"steps={study.steps}", f"learning_rate={rate}", f"warmup={study.warmup}"]
        settings += [f"seed={self._seed}", "held_out=0", "evaluate_every=0", *method.settings]
        flags = [part for setting in settings for part in ("--set", setting)]
        table = self._said(teacher, method.shards) if method.algorithm == "risd" else method.data
        data = ["--data", table, "--model", str(self._base), "--out", out]
        if method.algorithm == "opd":
            data += ["--teacher", f"{teacher}/model"]
        assert method.algorithm is not None
        asked = ("train", method.algorithm, method.shards, "--recipe", "tiny", "--resume")
        self._stage(f"{out}/model/zscore.json", *asked, *data, *flags)

    def teach(self, teacher: str, shards: str) -> None:
        """What the teacher says of pictures that its students see."""
        self.score(shards, f"{teacher}/model", self._said(teacher, shards), reasons=True)

    def score(self, shards: Path | str, model: Path | str, out: Path | str, *, reasons: bool) -> None:
        """Expected scores and distributions of all pictures."""
        told = ("--reasoning", "--max-output-tokens", "80", "--batch-size", "64") if reasons else ("--layout", "joint")
        where = ("--model", str(model), "--out", str(out), "--engine", "transformers", "--dtype", "float32", "--quiet")
        self._stage(str(out), "score", str(shards), *where, *told)

    def seconds(self) -> dict[str, float]:
        """Processor time that each stage took, by its result; other processes share the cores."""
        kept = self.folder / "seconds.json"
        return dict(json.loads(kept.read_text())) if kept.exists() else {}

    def _said(self, teacher: str, shards: str) -> str:
        return f"{teacher}-{shards}.parquet"

    def _stage(self, result: str, *arguments: str) -> None:
        if (self.folder / result).exists():
            return
        began = time.process_time()
        with (self.folder / "log.txt").open("a") as log, contextlib.chdir(self.folder):
            log.write(f"\nzscore {' '.join(arguments)}\n")
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                build_app()(list(arguments), standalone_mode=False)
        took = {**self.seconds(), result: time.process_time() - began}
        (self.folder / "seconds.json").write_text(json.dumps(took))


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
    """What everything starts from, made beside WORK if it isn't there."""
    made = work.parent / "world-study-base" / "model"
    if not (made / "zscore.json").exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        make_base(made.parent, steps=study.base_steps, until=study.base_until)
    return made
