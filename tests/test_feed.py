from __future__ import annotations

import random
import threading
import time

import pytest

from tests.tiny import level_scores, pixels
from zscore.feed import feed
from zscore.prepare import Prefetch, Prepared, ShardEnd
from zscore.records import EnginePrompt, Failure, Sample, ScoreRow, ShardRef, Status

END = ShardEnd(ShardRef("a.tar", "a.tar", 1, "1"))


class FakeEngine:
    """Answers in random order, a random number a step; what a prompt gets depends on its first token alone."""

    name, version, dtype, max_tokens = "fake", "0", "float32", 100

    def __init__(self, *, lockstep=False, max_in_flight=4, seed=0):
        self.lockstep, self.max_in_flight = lockstep, max_in_flight
        self.inside, self.most, self.batches = [], 0, []
        self._rng = random.Random(seed)

    def submit(self, tag, prompt):
        self.inside.append((tag, prompt))
        self.most = max(self.most, len(self.inside))

    def step(self):
        assert self.inside, "stepped while empty"
        self.batches.append([prompt.token_ids[0] for _, prompt in self.inside])
        if self.lockstep:
            done, self.inside = self.inside, []
        else:
            self._rng.shuffle(self.inside)
            cut = self._rng.randint(0, len(self.inside))
            done, self.inside = self.inside[:cut], self.inside[cut:]
        return [(tag, self.answer(prompt)) for tag, prompt in done]

    def answer(self, prompt):
        if prompt.token_ids[0] == 13:
            return Failure(Status.NONFINITE_SCORE, "nan")
        return level_scores(prompt.token_ids[0], len(prompt.probes), 3)

    def close(self):
        pass


def prepared(index, prompts=1):
    sample = Sample("a.tar", index, f"k{index}", "p", "g", b"")
    if index % 5 == 4:
        return Prepared(sample, (), Failure(Status.BAD_IMAGE, "broken"))
    engine_prompts = tuple(EnginePrompt((index * prompts + n, 0), (1,), pixels()) for n in range(prompts))
    return Prepared(sample, engine_prompts, None, 8, 9, "ab")


def run(items, engine):
    with Prefetch(iter(items), 3) as queue:
        return list(feed(queue, engine))


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("prompts", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_rows_come_in_order_each_once_with_their_own_scores(lockstep, prompts, seed):
    items = [prepared(i, prompts) for i in range(40)]
    items.insert(20, END)
    items.append(END)
    engine = FakeEngine(lockstep=lockstep, seed=seed)
    out = run(items, engine)
    assert [row.index if isinstance(row, ScoreRow) else "end" for row in out] == [
        *range(20),
        "end",
        *range(20, 40),
        "end",
    ]
    assert engine.most <= engine.max_in_flight + prompts - 1
    for row in out:
        if not isinstance(row, ScoreRow):
            continue
        if row.index % 5 == 4:
            assert (row.status, row.scores) == (Status.BAD_IMAGE, None)
        elif 13 in range(row.index * prompts, (row.index + 1) * prompts):
            assert (row.status, row.scores) == (Status.NONFINITE_SCORE, None)
        else:
            wanted = level_scores(row.index * prompts, 1, 3)
            assert row.status is Status.OK
            assert row.scores.probs_DK.shape == (prompts, 3)
            assert (row.scores.probs_DK[0] == wanted.probs_DK[0]).all()


def test_lockstep_batches_depend_on_the_shard_alone():
    """A resumed run feeds a shard without the one before it: its batches have to be the same."""

    def slow(items):
        for item in items:
            time.sleep(random.random() * 0.003)
            yield item

    second = [prepared(i) for i in range(100, 111)]
    both, alone = FakeEngine(lockstep=True), FakeEngine(lockstep=True)
    run(slow([*(prepared(i) for i in range(7)), END, *second, END]), both)
    run(slow([*second, END]), alone)
    assert both.batches[-len(alone.batches) :] == alone.batches
    assert all(len(batch) == 4 for batch in alone.batches[:-1])


@pytest.mark.parametrize("lockstep", [True, False])
def test_failures_behind_a_slow_picture_don_t_pile_up(lockstep):
    taken = []

    def items():
        yield prepared(0)
        for _ in range(3000):
            taken.append(1)
            yield prepared(4)
        yield END

    with Prefetch(items(), 3) as queue:
        rows = feed(queue, FakeEngine(lockstep=lockstep, max_in_flight=50))
        assert next(rows).index == 0
        assert len(taken) < 300
        assert sum(1 for _ in rows) == 3001


def test_an_error_of_the_stages_before_reaches_the_caller():
    def broken():
        yield prepared(0)
        raise OSError("gone")

    with Prefetch(broken(), 2) as queue, pytest.raises(OSError, match="gone"):
        list(feed(queue, FakeEngine()))


def test_leaving_early_stops_the_thread_and_closes_the_stages():
    closed = threading.Event()

    def endless():
        try:
            i = 0
            while True:
                yield prepared(i)
                i += 1
        finally:
            closed.set()

    with Prefetch(endless(), 2) as queue:
        rows = feed(queue, FakeEngine())
        next(rows)
    assert closed.wait(5)
    assert not any(thread.name == "zscore-prepare" for thread in threading.enumerate())


def test_prefetch_is_bounded():
    produced = []

    def counting():
        for i in range(100):
            produced.append(i)
            yield i

    with Prefetch(counting(), 3) as queue:
        deadline = time.monotonic() + 5
        while len(produced) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(produced) <= 5
        got = [next(queue) for _ in range(100)]
        assert got == list(range(100))
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(queue)
