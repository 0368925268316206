"""Samples → engine prompts, in order: pictures decoded in worker processes, text put together beside them.

    samples (one thread) → DecodePool (processes) → PromptBuilder → a bounded queue → the engine's loop

Everything before the queue runs in one background thread, which mostly waits for pipes; so the engine's thread only
ever takes finished prompts. All queues are bounded: memory doesn't depend on the number of samples.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from zscore.records import EnginePrompt, Failure, Pixels, Sample, ShardRef

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zscore.templates import PromptBuilder
    from zscore.workers import Decoded, DecodePool

T = TypeVar("T")

# Pictures that may wait, decoded, for one that came before them and takes longer.
REORDER_SLACK = 8
# A read that hangs must not hold up Ctrl-C; the thread is a daemon and ends with the process.
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """Marks that a shard's last sample has passed."""

    shard: ShardRef


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample ready for the engine, or already failed."""

    sample: Sample
    """Without the picture's bytes."""
    prompts: tuple[EnginePrompt, ...]
    failure: Failure | None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None


def prepare(
    items: Iterator[Sample | ShardEnd], pool: DecodePool, builder: PromptBuilder
) -> Iterator[Prepared | ShardEnd]:
    """Decode and tokenize samples; order is kept, shard ends included."""
    waiting: deque[_Slot] = deque()
    slots: dict[int, _Slot] = {}

    def collect(timeout: float | None) -> None:
        for decoded in pool.results(timeout):
            slots.pop(decoded.tag).fill(decoded, builder)

    for tag, item in enumerate(items):
        slot = _Slot(item)
        if slot.result is None:
            assert isinstance(item, Sample)
            while len(slots) >= pool.capacity:
                collect(None)
                yield from _finished(waiting)
            pool.submit(tag, item.image)
            slots[tag] = slot
        waiting.append(slot)
        collect(0)
        yield from _finished(waiting)
        while slots and len(waiting) >= pool.capacity + REORDER_SLACK:
            collect(None)
            yield from _finished(waiting)
    while waiting:
        yield from _finished(waiting)
        if slots:
            collect(None)


def _finished(waiting: deque[_Slot]) -> Iterator[Prepared | ShardEnd]:
    while waiting and (result := waiting[0].result) is not None:
        waiting.popleft()
        yield result


class _Slot:
    """A place in the order, empty while its picture is being decoded."""

    __slots__ = ("result", "sample")

    def __init__(self, item: Sample | ShardEnd) -> None:
        self.result: Prepared | ShardEnd | None = None
        if isinstance(item, ShardEnd):
            self.result = item
        else:
            self.sample = _without_picture(item)
            if item.failure is not None:
                self.result = Prepared(self.sample, (), item.failure)

    def fill(self, decoded: Decoded, builder: PromptBuilder) -> None:
        pixels = decoded.outcome
        if not isinstance(pixels, Pixels):
            self.result = Prepared(self.sample, (), pixels, sha256=decoded.sha256)
            return
        prompts = builder.build(self.sample.prompt, pixels)
        failure = prompts if isinstance(prompts, Failure) else None
        self.result = Prepared(
            self.sample,
            () if isinstance(prompts, Failure) else tuple(prompts),
            failure,
            pixels.width,
            pixels.height,
            decoded.sha256,
        )


def _without_picture(sample: Sample) -> Sample:
    return Sample(sample.shard, sample.index, sample.key, sample.prompt, sample.group, b"", sample.failure)


class Prefetch(Generic[T]):
    """Runs an iterator in a thread of its own, a bounded number of items ahead.

    Use as a context manager: leaving it stops the thread and closes the iterator.
    """

    def __init__(self, iterator: Iterator[T], size: int) -> None:
        self._iterator = iterator
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zscore-prepare", daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self._thread.is_alive() and time.monotonic() < give_up:
            try:
                self._queue.get(timeout=0.05)  # a thread that waits for room has to get it to see the stop
            except queue.Empty:
                continue

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # for whoever asks again
            raise error
        return cast("T", item)

    def _run(self) -> None:
        error: BaseException = StopIteration()
        try:
            for item in self._iterator:
                self._put((item, None))
                if self._stop.is_set():
                    break
        except BaseException as caught:  # noqa: BLE001 - raised again in the thread that asks
            error = caught
        finally:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                close()
        self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
            except queue.Full:
                continue
            return
