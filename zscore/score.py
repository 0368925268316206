"""`zscore score`: shards in, one table out. This file only wires the stages; each stage has a file of its own.

shards → samples → prepare (decode, tokenize) → feed (engine) → parts → the final table
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from zscore.errors import OutputMismatchError, UsageError
from zscore.feed import feed
from zscore.judge import NOT_READ
from zscore.output import Output, PartWriter, check_settings
from zscore.parquet import BYTES_PER_BATCH, ROWS_PER_BATCH, rows_to_table
from zscore.prepare import Prefetch, Prepared, ShardEnd, prepare
from zscore.records import Sample, ScoreRow, ShardRef, Status
from zscore.samples import ReadOptions, read_samples
from zscore.shards import expand
from zscore.workers import DecodePool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zscore.engines.base import Engine
    from zscore.judge import Judge
    from zscore.output import PartInfo
    from zscore.progress import Reporter


# Of 3 MB each, at the largest default picture; about what an engine takes at once.
PREFETCHED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What `zscore score` may be told besides the judge."""

    inputs: tuple[str, ...]
    """Folders, globs, braces, files, fsspec urls."""
    out: str
    """`scores.parquet`, `DIR/` or an fsspec url of either."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How samples are found in shards."""
    workers: int | None = None
    """Decode processes; None for one a core, at most 8."""
    limit: int | None = None
    """Score only the first so many samples."""
    retry_failed: bool = False
    """Score again only the rows of a finished output that are not ok."""
    overwrite: bool = False
    """Start anew whatever lies at `out`."""


@dataclass(slots=True)
class Summary:
    """What a run did."""

    out: str
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by status, those of earlier runs included."""
    scored: int = 0
    """Rows written by this run."""
    shards: int = 0
    seconds: float = 0.0
    already_done: bool = False

    @property
    def rows(self) -> int:
        """All rows of the output."""
        return sum(self.counts.values())

    @property
    def failed_share(self) -> float:
        """Share of rows that aren't ok."""
        return (self.rows - self.counts[Status.OK]) / self.rows if self.rows else 0.0


def score(options: ScoreOptions, judge: Judge, reporter: Reporter, shards: Sequence[ShardRef] | None = None) -> Summary:
    """Score all shards; what an earlier run finished is kept.

    Args:
        options: input, output and how they are treated.
        judge: what scores.
        reporter: is told what happens.
        shards: `expand(options.inputs)`, where the caller has it already.

    Raises:
        ZscoreError: the input, the output or the model can't be used; finished shards are kept.
    """
    if options.retry_failed and options.overwrite:
        raise UsageError("--retry-failed keeps good rows, --overwrite drops them: give one of the two")
    shards = expand(options.inputs) if shards is None else shards
    run = _Run(options, judge, shards)
    with run.output.locked(shards):
        if not options.overwrite and not options.retry_failed and run.already_done():
            return run.summary
        run.begin()
        todo = [shard for shard in shards if shard.name not in run.finished]
        reporter.begin(shards, {name: info.counts for name, info in run.finished.items()}, options.limit)
        if todo:
            run.score_with(judge.engine, reporter)
        return run.end()


def outlook(options: ScoreOptions, judge: Judge, shards: Sequence[ShardRef]) -> str:
    """What `score` would do with the output, in a few words; nothing is written.

    Raises:
        ZscoreError: `score` would refuse it.
    """
    if judge.weights == NOT_READ:
        return "not compared, the model's weights aren't here"
    return _Run(options, judge, shards).outlook()


def default_workers() -> int:
    """One a core that this process may use, at most 8: decoding is a few milliseconds a picture."""
    return min(8, len(os.sched_getaffinity(0)))


class _Run:
    """One call of `score`."""

    def __init__(self, options: ScoreOptions, judge: Judge, shards: Sequence[ShardRef]) -> None:
        self._options = options
        self._judge = judge
        self._shards = shards
        self._by_name = {shard.name: shard for shard in shards}
        settings = {**judge.settings(), **asdict(options.read), "limit": options.limit}
        # Compared with what was read back from JSON: tuples are lists there.
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._created = datetime.now(UTC)
        self._provenance = {
            "version": version("zscore-reward"),
            "created": self._created.isoformat(),
            **judge.provenance(),
            "options": self._settings,
        }
        self.output = Output(options.out, judge.rubric, self._settings, self._provenance)
        self.summary = Summary(options.out)
        self.finished: dict[str, PartInfo] = {}

    def already_done(self) -> bool:
        """Whether a finished file of these very shards lies there; sums it up.

        Raises:
            OutputMismatchError: a finished file lies there, but of other shards or settings.
        """
        metadata = self._finished_file()
        if metadata is None:
            return False
        if not self.output.is_retrying:
            self.output.discard_parts()
        self.summary.counts.update(metadata["counts"])
        self.summary.shards = metadata["shards"]
        self.summary.already_done = True
        return True

    def _finished_file(self) -> dict[str, Any] | None:
        metadata = self.output.final_metadata()
        if metadata is None:
            return None
        check_settings(metadata.get("options", {}), self._settings, self._options.out)
        if metadata.get("inputs") != self._inputs():
            raise OutputMismatchError(
                f"{self._options.out} is finished, and its shards were others or have changed since"
                f" ({len(metadata.get('inputs', []))} then, {len(self._shards)} now):"
                " --overwrite to score everything again, or give another --out"
            )
        return metadata

    def outlook(self) -> str:
        """What would happen to the output; reads only.

        Raises:
            OutputMismatchError: the run would be refused.
        """
        if self._options.overwrite:
            return "scored anew, whatever lies there"
        if self._options.retry_failed:
            counts = self.output.check_retry(self._shards)
            failed = sum(counts.values()) - counts.get(Status.OK, 0)
            return f"{failed} of {sum(counts.values())} rows scored again"
        if self._finished_file() is not None:
            return "complete: nothing to do"
        self.output.check_begun()
        done = len(self.output.finished(self._shards))
        return f"resumed: {done} of {len(self._shards)} shards are done" if done else "new"

    def _inputs(self) -> list[list[Any]]:
        return [[shard.name, shard.size, shard.version] for shard in self._shards]

    def begin(self) -> None:
        """Find out what is left to do."""
        if self._options.retry_failed:
            self.output.begin_retry(self._shards)
        else:
            self.output.begin(self._shards, overwrite=self._options.overwrite)
        self.finished = self.output.finished(self._shards, retry=self._options.retry_failed)
        if self._options.limit is not None:
            # Where a shard is done anew, the limit falls elsewhere in those behind it.
            names = [shard.name for shard in self._shards]
            valid = set(takewhile(self.finished.__contains__, names))
            self.finished = {name: info for name, info in self.finished.items() if name in valid}

    def score_with(self, load: Callable[[], Engine], reporter: Reporter) -> None:
        """Run the stages over what is left."""
        workers = default_workers() if self._options.workers is None else self._options.workers
        # The pool starts before the model loads: its processes must not inherit a CUDA context, and importing
        # numpy in them overlaps with reading weights.
        with DecodePool(self._judge.pixels, workers=workers) as pool, contextlib.ExitStack() as stack:
            # Pictures are decoded while the model loads, and while the engine is at its last batch.
            stages: Iterator[Prepared | ShardEnd] = prepare(self._samples(), pool, self._judge.builder)
            prepared = stack.enter_context(Prefetch(stages, PREFETCHED))
            reporter.loading(self._judge)
            engine = load()
            stack.callback(engine.close)
            described = {"name": engine.name, "version": engine.version, "dtype": engine.dtype}
            self.output.check_engine(described)
            self._provenance["engine"] = described
            self._write(feed(prepared, engine, self._judge.combine), reporter)

    def _samples(self) -> Iterator[Sample | ShardEnd]:
        left = self._options.limit
        for shard in self._shards:
            if shard.name in self.finished:
                left = None if left is None else left - self.finished[shard.name].rows
                continue
            if left is not None and left <= 0:
                return
            kept = self._kept_indices(shard)
            for sample in islice(read_samples(shard, self._options.read), left):
                left = None if left is None else left - 1
                if sample.index not in kept:
                    yield sample
            yield ShardEnd(shard)

    def _kept_indices(self, shard: ShardRef) -> frozenset[int]:
        if not self._options.retry_failed:
            return frozenset()
        kept = self.output.kept_rows(shard)
        return frozenset() if kept is None else frozenset(kept["index"].to_pylist())

    def _write(self, rows: Iterator[ScoreRow | ShardEnd], reporter: Reporter) -> None:
        while (first := next(rows, None)) is not None:
            name = first.shard.name if isinstance(first, ShardEnd) else first.shard
            shard = self._by_name[name]
            kept = self.output.kept_rows(shard) if self._options.retry_failed else None
            with self.output.part(shard) as part:
                sink = _Sink(part, self._judge, kept)
                item: ScoreRow | ShardEnd | None = first
                while isinstance(item, ScoreRow):
                    sink.add(item)
                    self.summary.scored += 1
                    reporter.row(item)
                    item = next(rows, None)
                sink.close()
            self.finished[name] = self.output.info(shard, part)
            reporter.shard_done(shard)

    def end(self) -> Summary:
        """Commit and count."""
        done = [shard for shard in self._shards if shard.name in self.finished]
        for shard in done:
            self.summary.counts.update(self.finished[shard.name].counts)
        self.summary.shards = len(done)
        if "engine" not in self._provenance and done:
            self._provenance["engine"] = self.finished[done[0].name].engine
        finished = datetime.now(UTC)
        self.summary.seconds = (finished - self._created).total_seconds()
        metadata = {
            **self._provenance,
            "finished": finished.isoformat(),
            "shards": len(done),
            "inputs": self._inputs(),
            "counts": dict(self.summary.counts),
        }
        self.output.commit(done, metadata)
        return self.summary


class _Sink:
    """Rows of one shard on their way into its part; in a retry, merged with the rows that are kept."""

    def __init__(self, part: PartWriter, judge: Judge, kept: pa.Table | None) -> None:
        self._part = part
        self._rubric = judge.rubric
        self._reasons = judge.layout == "reasoning"
        self._kept = kept
        self._rows: list[ScoreRow] = []
        self._bytes = 0

    def add(self, row: ScoreRow) -> None:
        self._rows.append(row)
        self._bytes += 4 * len(row.prompt) + sum(map(len, row.scores.reasoning if row.scores else ()))
        if self._kept is None and (len(self._rows) >= ROWS_PER_BATCH or self._bytes >= BYTES_PER_BATCH):
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._part.write(self._table())
        self._rows, self._bytes = [], 0

    def _table(self) -> pa.Table:
        return rows_to_table(self._rows, self._rubric, reasoning=self._reasons)

    def close(self) -> None:
        if self._kept is None:
            self._flush()
            return
        tables = [self._kept, *([self._table()] if self._rows else [])]
        self._part.write(pa.concat_tables(tables).unify_dictionaries().sort_by("index"))
