"""Trains the demo student that ships with the package, from nothing: base, teacher, cached distributions, student.

    python scripts/demo_student.py WORK              about an hour and a half; goes on where it was cut off
    python scripts/demo_student.py WORK --install    and copies the result to zscore/demo/checkpoint

Every stage is a command that a user would type. Scenes of all of them are drawn for prompts of the `train` split; the
figures in recipe.json are from prompts of the `test` split that were drawn when the recipe was settled: none was seen
in training, and none when anything was chosen.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from zscore.checkpoint import weights_hash

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "zscore" / "demo" / "checkpoint"
SEED = 0
ZSCORE = "-m zscore"
SET = f"--set seed={SEED}"
# What a stage leaves when it is done, and its command.
TRAIN_TEACHER = f"""{ZSCORE} train gdso labelled --recipe tiny --data annotated/annotations.parquet --model base/model
    --out teacher --resume {SET} --set steps=60 --set learning_rate=1e-4 --set warmup=5 --set batch_size=4
    --set group=8 --set evaluate_every=0 --set save_every=20"""
SCORE_BY_TEACHER = f"""{ZSCORE} score unlabelled --model teacher/model --reasoning --samples 2 --max-output-tokens 80
    --engine transformers --dtype float32 --batch-size 64 --out teacher.parquet"""
SCORE_TEST_BY_TEACHER = f"""{ZSCORE} score test --model teacher/model --reasoning --max-output-tokens 80
    --engine transformers --dtype float32 --batch-size 64 --limit 512 --out test-teacher.parquet"""
TRAIN_STUDENT = f"""{ZSCORE} train risd unlabelled --recipe tiny --data teacher.parquet --model base/model --out student
    --resume {SET} --set steps=250 --set learning_rate=3e-4 --set warmup=10 --set evaluate_every=50
    --set save_every=50"""
STAGES = (
    ("base/model/zscore.json", f"-m zscore_trainers.world.base base --steps 3000 --seed {SEED}"),
    ("labelled/truth.csv", f"-m zscore_trainers.world labelled --prompts 256 --seed {SEED + 1}"),
    ("annotated/annotations.parquet", f"{ZSCORE} annotations build labelled/ratings.csv labelled --out annotated"),
    ("teacher/model/zscore.json", TRAIN_TEACHER),
    ("unlabelled/truth.csv", f"-m zscore_trainers.world unlabelled --prompts 448 --seed {SEED + 2}"),
    ("teacher.parquet", SCORE_BY_TEACHER),
    ("student/model/zscore.json", TRAIN_STUDENT),
    ("test/truth.csv", f"-m zscore_trainers.world test --split test --prompts 512 --seed {SEED + 1000}"),
    ("test.parquet", f"{ZSCORE} score test --model student/model --engine transformers --out test.parquet"),
    ("test-base.parquet", f"{ZSCORE} score test --model base/model --engine transformers --out test-base.parquet"),
    ("test-teacher.parquet", SCORE_TEST_BY_TEACHER),
)


def python(command: str, folder: Path) -> str:
    """Run a stage; returns what it printed."""
    print(f"python {command}", flush=True)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=folder, check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"python {command}: exit code {done.returncode}")
    return done.stdout


def compared(scores: str, folder: Path) -> dict[str, dict[str, float]]:
    """Agreement of a table of scores with the truth of the test prompts, by dimension."""
    found = json.loads(python(f"{ZSCORE} eval {scores}.parquet test/truth.csv --allow-missing --json", folder))[
        "scores"
    ]
    return {
        one["dimension"]: {
            "pairs": one["pairs"],
            **{name: round(one["metrics"][name]["value"], 4) for name in ("plcc", "srcc", "hpa", "margin_hpa")},
        }
        for one in found["dimensions"]
    }


def main() -> None:
    """Run what is missing; install on demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--install", action="store_true", help="copy the student into the package")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for result, command in STAGES:
        if not (given.work / result).exists():
            python(command, given.work)
    reached = compared("test", given.work)
    recipe = {
        "seed": SEED,
        "commands": [" ".join(["python", *shlex.split(command)]) for _, command in STAGES],
        "versions": {name: version(name) for name in ("torch", "transformers", "zscore-reward")},
        "weights": weights_hash(given.work / "student" / "model"),
        "reached": reached,
        "before": {name: compared(f"test-{name}", given.work) for name in ("base", "teacher")},
    }
    (given.work / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(reached, indent=2))
    if given.install:
        shutil.rmtree(SHIPPED, ignore_errors=True)
        shutil.copytree(given.work / "student" / "model", SHIPPED)
        shutil.copy(given.work / "recipe.json", SHIPPED)


if __name__ == "__main__":
    main()
