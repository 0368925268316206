"""The engine's loop: keeps it full, and turns what it returns into rows in input order."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from zscore.distribution import combine
from zscore.prepare import Prefetch, Prepared, ShardEnd
from zscore.records import Failure, LevelScores, ScoreRow, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zscore.engines.base import Engine

    Combine = Callable[[Sequence[LevelScores | Failure]], LevelScores | Failure]


# Rows that wait for one before them; their prompts may be a megabyte each.
MAX_WAITING = 128


def feed(
    prepared: Prefetch[Prepared | ShardEnd], engine: Engine, combine: Combine = combine
) -> Iterator[ScoreRow | ShardEnd]:
    """Score prepared samples; rows come out in the order that the samples went in, each shard's end after its rows.

    The engine holds at most `max_in_flight` prompts (and those of one more sample), and runs when it holds that many:
    on a CPU, decoding has the cores until then, and a small batch would cost more than the wait. With a lockstep
    engine, batches are formed by position in the shard alone.
    """
    loop = _Loop(engine, combine)
    for item in prepared:
        loop.add(item)
        if engine.lockstep and isinstance(item, ShardEnd):
            loop.drain()
        # Failed samples cost the engine nothing, but wait behind those in it for their turn.
        while loop.in_flight >= engine.max_in_flight or (loop.in_flight and loop.waiting > MAX_WAITING):
            loop.step()
            yield from loop.finished()
        yield from loop.finished()
    loop.drain()
    yield from loop.finished()


class _Loop:
    """What is inside the engine, and the order in which it has to come out."""

    def __init__(self, engine: Engine, combine: Combine) -> None:
        self._engine = engine
        self._combine = combine
        self._waiting: deque[_Pending | ShardEnd] = deque()
        self._by_tag: dict[int, tuple[_Pending, int]] = {}
        self._next_tag = 0

    @property
    def in_flight(self) -> int:
        return len(self._by_tag)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, item: Prepared | ShardEnd) -> None:
        if isinstance(item, ShardEnd):
            self._waiting.append(item)
            return
        pending = _Pending(item)
        self._waiting.append(pending)
        for position, prompt in enumerate(item.prompts):
            self._engine.submit(self._next_tag, prompt)
            self._by_tag[self._next_tag] = (pending, position)
            self._next_tag += 1

    def step(self) -> None:
        if self._by_tag:
            for tag, result in self._engine.step():
                pending, position = self._by_tag.pop(tag)
                pending.results[position] = result

    def drain(self) -> None:
        while self._by_tag:
            self.step()

    def finished(self) -> Iterator[ScoreRow | ShardEnd]:
        while self._waiting:
            head = self._waiting[0]
            if isinstance(head, ShardEnd):
                self._waiting.popleft()
                yield head
                continue
            if None in head.results:
                return
            self._waiting.popleft()
            yield head.row(self._combine)


class _Pending:
    """A sample whose prompts are in the engine; its pixels are the engine's alone by now."""

    __slots__ = ("height", "results", "sample", "sha256", "verdict", "width")

    def __init__(self, prepared: Prepared) -> None:
        self.sample = prepared.sample
        self.verdict = prepared.failure
        self.width, self.height, self.sha256 = prepared.width, prepared.height, prepared.sha256
        self.results: list[LevelScores | Failure | None] = [None] * len(prepared.prompts)

    def row(self, combine: Combine) -> ScoreRow:
        found = self.verdict or combine([result for result in self.results if result is not None])
        failure = found if isinstance(found, Failure) else None
        sample = self.sample
        return ScoreRow(
            shard=sample.shard,
            index=sample.index,
            key=sample.key,
            prompt=sample.prompt,
            group=sample.group,
            status=failure.status if failure else Status.OK,
            error=failure.error if failure else None,
            width=self.width,
            height=self.height,
            sha256=self.sha256,
            scores=None if isinstance(found, Failure) else found,
        )
