"""What a run tells its user while it goes: a live display on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zscore.records import Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zscore.judge import Judge
    from zscore.records import ScoreRow, ShardRef
    from zscore.score import Summary

PLAIN_LINE_SECONDS = 10.0


class Reporter(Protocol):
    """Told what happens during a run."""

    def loading(self, judge: Judge) -> None:
        """The model is about to be loaded."""

    def begin(self, shards: Sequence[ShardRef], finished: Mapping[str, Mapping[str, int]], limit: int | None) -> None:
        """Scoring begins; `finished` gives the counts by status of shards that earlier runs did."""

    def row(self, row: ScoreRow) -> None:
        """A row was scored, or failed."""

    def shard_done(self, shard: ShardRef) -> None:
        """A shard's part was written."""


class Tally:
    """Counts, speed and remaining time of a run."""

    def __init__(self) -> None:
        self.shards = self.shards_done = self.rows_before = self.rows = 0
        self.failures: Counter[str] = Counter()
        self._limit: int | None = None
        self._started = time.monotonic()

    def begin(self, shards: int, finished: Mapping[str, Mapping[str, int]], limit: int | None) -> None:
        """Take in what is there already."""
        self.shards, self.shards_done, self._limit = shards, len(finished), limit
        self.rows_before = sum(sum(counts.values()) for counts in finished.values())
        for counts in finished.values():
            self.failures.update({reason: n for reason, n in counts.items() if reason != Status.OK})
        self._started = time.monotonic()

    def row(self, row: ScoreRow) -> None:
        """Count one row; the clock starts with the first, so that loading the model isn't counted as slowness."""
        if self.rows == 0:
            self._started = time.monotonic()
        self.rows += 1
        if row.status is not Status.OK:
            self.failures[row.status] += 1

    @property
    def per_second(self) -> float:
        """Pictures a second in this run."""
        seconds = time.monotonic() - self._started
        return (self.rows - 1) / seconds if seconds > 0 and self.rows > 1 else 0.0

    @property
    def total(self) -> float | None:
        """Rows to expect: the limit, or the mean of finished shards times their number; None while unknown."""
        estimates = [float(self._limit)] if self._limit is not None else []
        if self.shards_done:
            estimates.append((self.rows_before + self.rows) / self.shards_done * self.shards)
        return min(estimates, default=None)

    @property
    def eta(self) -> str:
        """Remaining time as text."""
        if self.total is None or not self.per_second:
            return "unknown"
        left = max(0.0, self.total - self.rows_before - self.rows) / self.per_second
        hours, rest = divmod(round(left), 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}"

    def line(self) -> str:
        """Everything in one line."""
        failed = ", ".join(f"{n} {reason}" for reason, n in sorted(self.failures.items())) or "none"
        return (
            f"shards {self.shards_done}/{self.shards}  pictures {self.rows_before + self.rows}"
            f"  {self.per_second:.1f}/s  failed: {failed}  ETA {self.eta}"
        )


class QuietReporter:
    """Says nothing."""

    def loading(self, judge: Judge) -> None:
        """See `Reporter`."""

    def begin(self, shards: Sequence[ShardRef], finished: Mapping[str, Mapping[str, int]], limit: int | None) -> None:
        """See `Reporter`."""

    def row(self, row: ScoreRow) -> None:
        """See `Reporter`."""

    def shard_done(self, shard: ShardRef) -> None:
        """See `Reporter`."""


class PlainReporter:
    """A line now and then, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = Tally()
        self._next = 0.0

    def loading(self, judge: Judge) -> None:
        """See `Reporter`."""
        self._say(f"loading {judge.checkpoint.id} with {judge.engine_name}")

    def begin(self, shards: Sequence[ShardRef], finished: Mapping[str, Mapping[str, int]], limit: int | None) -> None:
        """See `Reporter`."""
        self._tally.begin(len(shards), finished, limit)
        if finished:
            self._say(f"resuming: {len(finished)} of {len(shards)} shards are finished")

    def row(self, row: ScoreRow) -> None:
        """See `Reporter`."""
        self._tally.row(row)
        now = time.monotonic()
        if now >= self._next:
            if self._next:
                self._say(self._tally.line())
            self._next = now + PLAIN_LINE_SECONDS

    def shard_done(self, shard: ShardRef) -> None:
        """See `Reporter`."""
        del shard
        self._tally.shards_done += 1

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveReporter:
    """A bar with shards, speed, failures by reason and remaining time. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._tally = Tally()
        self._note = ""
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=5, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def loading(self, judge: Judge) -> None:
        """See `Reporter`."""
        self._note = f"loading {judge.checkpoint.id} with {judge.engine_name} …"

    def begin(self, shards: Sequence[ShardRef], finished: Mapping[str, Mapping[str, int]], limit: int | None) -> None:
        """See `Reporter`."""
        self._tally.begin(len(shards), finished, limit)

    def row(self, row: ScoreRow) -> None:
        """See `Reporter`."""
        self._note = ""
        self._tally.row(row)

    def shard_done(self, shard: ShardRef) -> None:
        """See `Reporter`."""
        del shard
        self._tally.shards_done += 1

    def _render(self) -> Group:
        tally = self._tally
        done, total = float(tally.rows_before + tally.rows), tally.total
        bar = ProgressBar(total=total or 1.0, completed=min(done, total) if total else 0.0, pulse=total is None)
        head = Table.grid(padding=(0, 1))
        head.add_row(bar, f"{done / total:.0%}" if total else "")
        return Group(head, Text(self._note or tally.line(), overflow="fold"))


def summary_table(summary: Summary) -> Table:
    """Counts by status, for the end of a run."""
    table = Table()
    table.add_column("status")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for status, count in sorted(summary.counts.items(), key=lambda pair: (pair[0] != Status.OK, -pair[1])):
        table.add_row(status, str(count), f"{count / summary.rows:.1%}")
    return table
