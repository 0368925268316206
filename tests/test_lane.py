"""Calls in a thread: in order, until one fails."""

from __future__ import annotations

import threading
import time

import pytest

from zscore.lane import Lane


@pytest.fixture
def lane():
    made = Lane("test")
    yield made
    made.stop(drop=True)


def test_calls_run_in_order_in_another_thread(lane):
    seen = []
    for number in range(200):
        lane.do(lambda n: seen.append((n, threading.current_thread().name)), number)
    lane.wait()
    assert [number for number, _ in seen] == list(range(200))
    assert {name for _, name in seen} == {"test"}
    lane.check()


def test_the_caller_goes_on_meanwhile(lane):
    gate = threading.Event()
    lane.do(gate.wait)
    started = time.perf_counter()
    lane.do(lambda: None)
    assert time.perf_counter() - started < 1
    gate.set()
    lane.wait()


def test_nothing_runs_after_a_failure(lane):
    seen = []
    lane.do(seen.append, 1)
    lane.do(lambda: 1 / 0)
    lane.do(seen.append, 2)
    lane.wait()
    assert seen == [1]
    for _ in range(2):  # it stays failed
        with pytest.raises(ZeroDivisionError):
            lane.check()
    lane.do(seen.append, 3)
    lane.wait()
    assert seen == [1]


def test_even_an_interrupt_is_handed_over(lane):
    def interrupt():
        raise KeyboardInterrupt

    lane.do(interrupt)
    lane.wait()
    with pytest.raises(KeyboardInterrupt):
        lane.check()


def test_stopping_finishes_what_was_given():
    lane, seen = Lane("test"), []
    for number in range(50):
        lane.do(seen.append, number)
    lane.stop()
    assert seen == list(range(50))


def test_stopping_drops_what_has_not_begun():
    lane, seen, gate, begun = Lane("test"), [], threading.Event(), threading.Event()
    lane.do(begun.set)
    lane.do(gate.wait)
    lane.do(seen.append, 1)
    begun.wait()
    stopper = threading.Thread(target=lane.stop, kwargs={"drop": True})
    stopper.start()
    while not lane._drops:
        time.sleep(0.001)
    gate.set()
    stopper.join()
    assert seen == []
    lane.check()  # dropping is no failure
