"""Kept samples → new webdataset shards, every member byte for byte as it was, and a wids index of them.

Nothing is decoded or parsed but headers. Output shards are filled in the order of the source shards and, inside one,
of its samples, whatever the order of the kept rows; so the same input gives the same shards. A shard is complete as
soon as it is there under its name; beside it a record says how far it goes, and the same command resumes behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from zscore.errors import OutputMismatchError, UsageError
from zscore.passages import StandIns
from zscore.samples import ReadOptions
from zscore.shard_writer import ShardSize, ShardWriter, Written, shard_name
from zscore.shards import expand
from zscore.sources import locate
from zscore.store import is_local, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zscore.sources import Source
    from zscore.tables import Scores

PLAN_FILE = "plan.json"
LOCK = "lock"
# Shards that a killed run may have left half-written: one is filled while others get their names.
IN_FLIGHT = 100
# What the sample itself holds, or what is the same for all that is kept.
NOT_SCORES = frozenset({"shard", "index", "key", "prompt", "status", "error"})
PREFIX = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardOptions:
    """What to copy, and where to."""

    shards: tuple[str, ...]
    """Source shards: files, folders, globs, braces, fsspec urls."""
    out: str
    """Folder or fsspec url of the new shards."""
    prefix: str = "kept"
    """Shards are called PREFIX-000000.tar and so on."""
    shard_size: str = "1GB"
    """Samples, or bytes with a unit."""
    add_scores: bool = False
    """Adds a member KEY.zscore.json with the row's scores to every sample."""
    overwrite: bool = False
    """Replaces an earlier output of the same prefix."""


@dataclass(slots=True)
class Result:
    """What lies in the output folder now."""

    index: str
    """Path of the wids index."""
    shards: list[Written] = field(default_factory=list)
    resumed: int = 0
    """Of the shards, how many an earlier run had finished."""

    @property
    def samples(self) -> int:
        """In all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def reshard(kept: Scores, options: ReshardOptions, on_shard: Callable[[Written], None] | None = None) -> Result:
    """Copy kept samples into new shards.

    Args:
        kept: rows with `shard` and `index`, and `key` to check that the shards are still those that were scored.
        options: sources and output.
        on_shard: called with every shard that is finished.

    Raises:
        TableError: the rows name no sample, one twice, or one that its shard doesn't hold.
        ShardNotFoundError: a source argument matches nothing.
        UsageError: an option that can't be read.
        OutputMismatchError: the folder holds another output of this prefix.
        OutputError: it can't be written, or another run is writing there.
    """
    size = ShardSize.parse(options.shard_size)
    if not PREFIX.fullmatch(options.prefix):
        raise UsageError(f"--prefix '{options.prefix}': letters, digits, '-', '_' and '.' only, no '.' in front")
    kept.require("shard", "index")
    sources = locate(kept.frame, expand(options.shards))
    return _Job(kept, options, size, sources).run(on_shard or (lambda _: None))


def _stand_ins(scored_with: Mapping[str, Any]) -> StandIns:
    names = ("image_keys", "prompt_keys", "group_key")
    return StandIns.of(ReadOptions(**{name: scored_with[name] for name in names if name in scored_with}))


class _Job:
    """One call of `reshard`."""

    def __init__(self, kept: Scores, options: ReshardOptions, size: ShardSize, sources: Sequence[Source]) -> None:
        self._kept = kept
        self._options = options
        self._size = size
        self._sources = sources
        out = options.out.rstrip("/") or "/"
        # A power cut may cut shards that have their names already: their sizes are checked before they count as done.
        self._out = open_store(out, resumes=True, syncs=False)
        # Hidden, so that a glob or a folder of the output only holds shards.
        self._state = open_store(f"{out}/.{options.prefix}-reshard", resumes=True)
        self._index = f"{options.prefix}-index.json"
        self._result = Result(self._out.path(self._index))

    def run(self, on_shard: Callable[[Written], None]) -> Result:
        plan = self._plan()
        with self._state.lock(LOCK):
            if not self._is_done(plan):
                self._begin(plan)
                self._copy(on_shard)
                self._write_index(plan)
            self._forget()
        self._state.delete_if_empty()
        return self._result

    def _forget(self) -> None:
        for name in self._state.names() - {LOCK}:
            self._state.delete(name)

    def _plan(self) -> dict[str, Any]:
        """All that the output depends on."""
        rows = hashlib.sha256()
        for source in self._sources:
            rows.update(f"{source.name}\n".encode() + source.rows["index"].to_numpy().tobytes())
        scores = {name: self._kept.metadata.get(name) for name in ("rubric", "model", "created", "finished")}
        return {
            "kept": rows.hexdigest(),
            "samples": sum(source.rows.height for source in self._sources),
            "sources": {source.shard.name: [source.shard.size, source.shard.version] for source in self._sources},
            "shard_size": self._options.shard_size,
            "scores": _digest(scores, self._score_columns()) if self._options.add_scores else None,
        }

    def _score_columns(self) -> list[str]:
        return [name for name in self._kept.schema if name not in NOT_SCORES]

    def _is_done(self, plan: dict[str, Any]) -> bool:
        there = self._out.names()
        if self._index not in there or self._options.overwrite:
            return False
        with self._out.open(self._index) as stream:
            index = json.loads(stream.read())
        self._check(index.get("zscore"), plan)
        shards = [Written(**entry) for entry in index["zscore"]["shards"]]
        if not all(shard.name in there and self._size_of(shard.name) == shard.size for shard in shards):
            return False
        self._result.shards, self._result.resumed = shards, len(shards)
        return True

    def _check(self, before: Mapping[str, Any] | None, plan: Mapping[str, Any]) -> None:
        """Refuse to go on with what another call has begun."""
        for name, value in plan.items():
            if not before or before.get(name) != value:
                raise OutputMismatchError(
                    f"{self._options.out} holds '{self._options.prefix}' shards of another call ({name} differs): give "
                    "another --out or --prefix, or --overwrite"
                )

    def _begin(self, plan: dict[str, Any]) -> None:
        """Find out how far an earlier run came, or clear the way."""
        there, records = self._out.names(), self._state.names()
        shards = sorted(name for name in there if self._is_ours(name))
        if self._options.overwrite:
            self._spare_sources()
            for name in (self._index, *shards):
                self._out.delete(name)
            self._forget()
        elif PLAN_FILE in records:
            with self._state.open(PLAN_FILE) as stream:
                before = json.loads(stream.read())
            if shards:
                self._check(before, plan)
                self._resume(there, records)
        elif shards and self._index not in there:
            raise OutputMismatchError(
                f"{self._options.out} holds {shards[0]}, which no reshard left unfinished: give another --out or "
                "--prefix, or --overwrite"
            )
        with self._state.write(PLAN_FILE) as stream:
            stream.write(json.dumps(plan).encode())

    def _is_ours(self, name: str) -> bool:
        return bool(re.fullmatch(re.escape(self._options.prefix) + r"-\d{6,}\.tar", name))

    def _spare_sources(self) -> None:
        """Refuse to delete what is still to be read."""
        for source in self._sources:
            name = source.shard.url.rsplit("/", 1)[-1]
            if self._is_ours(name) and _same(source.shard.url, self._out.path(name)):
                raise UsageError(f"--overwrite would delete the source shard {name}: give another --out or --prefix")

    def _resume(self, there: set[str], records: set[str]) -> None:
        for number in itertools.count():
            name = shard_name(self._options.prefix, number)
            if name not in there or f"{name}.json" not in records:
                return
            with self._state.open(f"{name}.json") as stream:
                shard = Written(**json.loads(stream.read()))
            if self._size_of(name) != shard.size:
                return
            self._result.shards.append(shard)
            self._result.resumed += 1

    def _size_of(self, name: str) -> int:
        with self._out.open(name) as stream:
            return stream.seek(0, io.SEEK_END)

    def _copy(self, on_shard: Callable[[Written], None]) -> None:
        """Copy all that isn't there yet."""
        stand_ins = _stand_ins(self._kept.metadata.get("options", {}))
        done = self._result.shards[-1] if self._result.shards else None
        sources = list(self._sources)
        while done is not None and sources and sources[0].shard.name != done.source:
            sources.pop(0)
        after = done.index if done else -1

        def finished(shard: Written) -> None:
            self._record(shard)
            on_shard(shard)

        prefix, number = self._options.prefix, len(self._result.shards)
        self._out.sweep(shard_name(prefix, number + ahead) for ahead in range(IN_FLIGHT))
        with ShardWriter(self._out, prefix, number, self._size, finished) as writer:
            for source in sources:
                rows = self._rows(source)
                with contextlib.closing(source.passages(after, stand_ins, writer.drain)) as passages:
                    for passage, carrier in passages:
                        writer.add(source, passage, carrier, rows[passage.index] if rows is not None else None)
                after = -1

    def _rows(self, source: Source) -> dict[int, dict[str, Any]] | None:
        """The rows of one source as they go into its samples."""
        if not self._options.add_scores:
            return None
        rows = self._kept.frame.filter(pl.col("shard").cast(pl.String) == source.name)
        found = rows.select("index", *self._score_columns()).collect()
        return {row.pop("index"): row for row in found.iter_rows(named=True)}

    def _record(self, shard: Written) -> None:
        """Write down that a shard is complete."""
        with self._state.write(f"{shard.name}.json") as stream:
            stream.write(json.dumps(asdict(shard)).encode())
        self._result.shards.append(shard)

    def _write_index(self, plan: dict[str, Any]) -> None:
        """The list of shards that webdataset's `wids` reads; urls are relative to it."""
        shards = self._result.shards
        index = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": self._options.prefix,
            "shardlist": [{"url": shard.name, "nsamples": shard.samples, "filesize": shard.size} for shard in shards],
            "zscore": {**plan, "shards": [asdict(shard) for shard in shards]},
        }
        with open_store(self._options.out.rstrip("/") or "/", resumes=True).write(self._index) as stream:
            stream.write((json.dumps(index, indent=1) + "\n").encode())


def _same(left: str, right: str) -> bool:
    """Whether two paths or urls lead to one file."""
    return left == right or (is_local(left) and is_local(right) and Path(left).resolve() == Path(right).resolve())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
