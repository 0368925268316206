"""Runs the main job inside a test: the real engine, loaded once and lent to many runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.parquet as pq

from tests.tiny import write_rubric
from zscore.demo.student import untrained_student
from zscore.judge import JudgeOptions, plan_judge
from zscore.progress import QuietReporter
from zscore.score import ScoreOptions, score


@contextmanager
def shared_judge(folder, engine="transformers", **options) -> Iterator[Shared]:
    """The demo student on the tiny rubric."""
    chosen = {"model": str(untrained_student()), "rubric": str(write_rubric(folder)), "max_pixels": 4096, **options}
    shared = Shared(plan_judge(JudgeOptions(engine=engine, **chosen)))
    yield shared
    shared.loaded.close()


class Shared:
    def __init__(self, planned):
        self._planned = planned
        self.loaded = planned.engine()
        self.loads = 0

    def __getattr__(self, name):
        return getattr(self._planned, name)

    def reload(self):
        self.loaded.close()
        self.loaded = self._planned.engine()

    def engine(self):
        self.loads += 1
        return KeptOpen(self.loaded)


class KeptOpen:
    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def close(self):
        pass


class Watching(QuietReporter):
    """Calls back on every row; a test raises there what a user or a machine would."""

    def __init__(self, on_row=lambda _: None):
        self._on_row = on_row
        self.rows = 0

    def row(self, row):
        self.rows += 1
        self._on_row(self)


def run(judge, inputs, out, reporter=None, **options):
    inputs = (str(inputs),) if isinstance(inputs, str | os.PathLike) else tuple(map(str, inputs))
    options.setdefault("workers", 1)
    return score(ScoreOptions(inputs=inputs, out=str(out), **options), judge, reporter or Watching())


def rows(path):
    return pq.read_table(path).to_pylist()
