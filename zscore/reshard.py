"""Kept samples → new webdataset shards, every member byte for byte as it was, and a wids index of them.

Nothing is decoded or parsed but headers. Output shards are filled in the order of the source shards and, inside one,
of its samples, whatever the order of the kept rows; so the same input gives the same shards. A shard is complete as
soon as it is there under its name; beside it a record says how far it goes, and the same command resumes behind it.
Where an earlier output is replaced, the new one is finished in a hidden folder first.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from zscore.store import identity, is_local, open_store
from zscore.table_output import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zscore.sources import Source
    from zscore.store import Store
    from zscore.tables import Scores

PLAN_FILE = "plan.json"
LOCK = "lock"
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
    """Replaces an earlier output of the same prefix, once the new one is complete; until then both take room."""


@dataclass(slots=True)
class Result:
    """What lies in the output folder now."""

    index: str
    """Path of the wids index."""
    shards: list[Written] = field(default_factory=list)
    resumed: int = 0
    """Of the shards, how many an earlier run had finished."""
    links: int = 0
    """Links in what was copied now, for neither a picture nor a text, that stayed behind."""

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
        resumes = not options.overwrite
        # A power cut may cut shards that have their names already: their sizes are checked before they count as done.
        self._out = open_store(out, resumes=resumes, syncs=False)
        # Hidden, so that a glob or a folder of the output only holds shards.
        self._state = open_store(f"{out}/.{options.prefix}-reshard", resumes=resumes)
        self._aside = f".{options.prefix}-reshard-new"
        self._new = open_store(f"{out}/{self._aside}", syncs=False)
        """Where shards wait until all of them are there, if they replace others."""
        self._index = f"{options.prefix}-index.json"
        self._result = Result(self._out.path(self._index))
        self._scores = _score_rows(kept) if options.add_scores else {}

    def run(self, on_shard: Callable[[Written], None]) -> Result:
        plan = self._plan()
        try:
            with self._state.lock(LOCK):
                there = self._out.names()
                self._sweep(there)
                if not self._is_done(plan, there):
                    self._make(plan, there, on_shard)
                self._forget()
        finally:
            self._state.delete_if_empty()
        return self._result

    def _make(self, plan: dict[str, Any], there: set[str], on_shard: Callable[[Written], None]) -> None:
        old = sorted(name for name in there if self._is_ours(name))
        if self._options.overwrite and (old or self._index in there):
            self._spare(old)
            try:
                self._copy(self._new, on_shard)
                self._replace(old)
            finally:
                _clear(self._new)
        else:
            self._begin(plan, there, old)
            self._copy(self._out, on_shard)
        self._write_index(plan)

    def _sweep(self, there: set[str]) -> None:
        """Remove what a killed run left half-written, or aside."""
        self._out.sweep(lambda name: self._is_ours(name) or name == self._index)
        self._state.sweep(lambda _: True)
        if self._aside in there:
            _clear(self._new)

    def _forget(self, *spared: str) -> None:
        for name in self._state.names() - {LOCK, *spared}:
            self._state.delete(name)

    def _plan(self) -> dict[str, Any]:
        """All that the output depends on."""
        rows = hashlib.sha256()
        for source in self._sources:
            rows.update(f"{source.name}\n".encode() + source.rows["index"].to_numpy().tobytes())
        return {
            "kept": rows.hexdigest(),
            "samples": sum(source.rows.height for source in self._sources),
            "sources": {source.shard.name: [source.shard.size, source.shard.version] for source in self._sources},
            "shard_size": self._options.shard_size,
            "scores": self._digest_of_scores() if self._options.add_scores else None,
        }

    def _digest_of_scores(self) -> str:
        names = ("rubric", "model", "created", "finished", "derived")
        scores = {name: self._kept.metadata.get(name) for name in names}
        values = hashlib.sha256(json.dumps(scores, sort_keys=True).encode())
        for source in self._sources:
            values.update(_digest_of_rows(self._scores[source.name]))
        return values.hexdigest()

    def _is_done(self, plan: dict[str, Any], there: set[str]) -> bool:
        if self._index not in there or self._options.overwrite:
            return False
        index = _read(self._out, self._index).get("zscore")
        index = index if isinstance(index, dict) else {}
        self._check(index, plan, self._index)
        shards = [_written(entry) for entry in index.get("shards", [None])]
        found = [shard for shard in shards if shard is not None and shard.name in there]
        if len(found) < len(shards) or any(self._size_of(shard.name) != shard.size for shard in found):
            return False
        self._result.shards, self._result.resumed = found, len(found)
        return True

    def _check(self, before: Mapping[str, Any], plan: Mapping[str, Any], file: str) -> None:
        """Refuse to go on with what another call has begun."""
        fix = "give another --out or --prefix, or --overwrite"
        if not before:
            raise OutputMismatchError(f"{self._options.out} holds a damaged {file}, and shards of some call: {fix}")
        for name, value in plan.items():
            if before.get(name) != value:
                raise OutputMismatchError(
                    f"{self._options.out} holds '{self._options.prefix}' shards of another call ({name} differs): {fix}"
                )

    def _begin(self, plan: dict[str, Any], there: set[str], shards: Sequence[str]) -> None:
        """Find out how far an earlier run came."""
        records = self._state.names()
        if PLAN_FILE in records and shards:
            self._check(_read(self._state, PLAN_FILE), plan, PLAN_FILE)
            self._resume(there, records)
        elif shards and self._index not in there:
            raise OutputMismatchError(
                f"{self._options.out} holds {shards[0]}, which no reshard left unfinished: give another --out or "
                "--prefix, or --overwrite"
            )
        if not self._result.resumed:
            self._forget(PLAN_FILE)  # else a later run would take them for this one's
        with self._state.write(PLAN_FILE) as stream:
            stream.write(json.dumps(plan).encode())

    def _is_ours(self, name: str) -> bool:
        return bool(re.fullmatch(re.escape(self._options.prefix) + r"-\d{6,}\.tar", name))

    def _spare(self, old: Sequence[str]) -> None:
        """Refuse to delete what is still to be read, and what is no shard."""
        paths = {identity(self._out.path(name)): name for name in old}
        for source in self._sources if paths else ():
            name = paths.get(identity(source.shard.url))
            if name is not None:
                raise UsageError(f"--overwrite would delete the source shard {name}: give another --out or --prefix")
        for name in (*old, self._index):
            if is_local(self._options.out) and Path(self._out.path(name)).is_dir():
                raise OutputMismatchError(f"{self._out.path(name)} is a folder: remove it, or give another --prefix")

    def _replace(self, old: Sequence[str]) -> None:
        """Give the new shards the places of the old ones, now that all of them are there."""
        shards = [shard.name for shard in self._result.shards]
        self._out.delete(self._index)
        self._forget()
        for name in set(old) - set(shards):
            self._out.delete(name)
        for name in shards:
            self._out.adopt(self._aside, name)

    def _resume(self, there: set[str], records: set[str]) -> None:
        for number in itertools.count():
            name = shard_name(self._options.prefix, number)
            if name not in there or f"{name}.json" not in records:
                return
            shard = _written(_read(self._state, f"{name}.json"))
            if shard is None or self._size_of(name) != shard.size:
                return
            self._result.shards.append(shard)
            self._result.resumed += 1

    def _size_of(self, name: str) -> int:
        with self._out.open(name) as stream:
            return stream.seek(0, io.SEEK_END)

    def _copy(self, store: Store, on_shard: Callable[[Written], None]) -> None:
        """Copy all that isn't there yet."""
        stand_ins = _stand_ins(self._kept.metadata.get("options", {}))
        done = self._result.shards[-1] if self._result.shards else None
        sources = list(self._sources)
        while done is not None and sources and sources[0].shard.name != done.source:
            sources.pop(0)
        after = done.index if done else -1

        def finished(shard: Written) -> None:
            if store is self._out:
                self._record(shard)
            self._result.shards.append(shard)
            on_shard(shard)

        prefix, number = self._options.prefix, len(self._result.shards)
        with ShardWriter(store, prefix, number, self._size, finished) as writer:
            for source in sources:
                rows = self._rows(source)
                with contextlib.closing(source.passages(after, stand_ins, writer.drain)) as passages:
                    for passage, carrier in passages:
                        writer.add(source, passage, carrier, rows[passage.index] if rows is not None else None)
                        self._result.links += passage.links
                after = -1

    def _rows(self, source: Source) -> dict[int, dict[str, Any]] | None:
        """The rows of one source as they go into its samples."""
        if not self._options.add_scores:
            return None
        return {row.pop("index"): row for row in self._scores[source.name].iter_rows(named=True)}

    def _record(self, shard: Written) -> None:
        """Write down that a shard is complete."""
        with self._state.write(f"{shard.name}.json") as stream:
            stream.write(json.dumps(asdict(shard)).encode())

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
        out = self._options.out.rstrip("/") or "/"
        with open_store(out, resumes=not self._options.overwrite).write(self._index) as stream:
            stream.write((json.dumps(index, indent=1) + "\n").encode())


def _score_rows(kept: Scores) -> dict[str, pl.DataFrame]:
    """By shard what goes into the samples, in the order of their numbers: all kept rows, in memory, in one pass."""
    columns = [name for name in kept.schema if name not in NOT_SCORES]
    rows = fetch(kept.frame.select(pl.col("shard").cast(pl.String), "index", *columns), kept.name)
    parts = rows.partition_by("shard", as_dict=True, include_key=False)
    return {str(name): part.sort("index") for (name,), part in parts.items()}


def _digest_of_rows(rows: pl.DataFrame) -> bytes:
    """The same for the same values, whatever polars calls their types."""
    # JSON has no bytes, and polars panics on them.
    raw = [name for name, kind in rows.schema.items() if "Binary" in str(kind)]
    values = hashlib.sha256(rows.drop(raw).write_ndjson().encode())
    for name in raw:
        values.update(repr(rows[name].to_list()).encode())
    return values.digest()


def _clear(store: Store) -> None:
    for name in store.names():
        store.delete(name)
    store.sweep(lambda _: True)
    store.delete_if_empty()


def _read(store: Store, name: str) -> dict[str, Any]:
    """A record; empty where it is damaged."""
    with store.open(name) as stream:
        try:
            found = json.loads(stream.read())
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}


def _written(entry: Any) -> Written | None:
    """A shard as it was recorded; None where that is damaged."""
    names = {field.name for field in dataclasses.fields(Written)}
    return Written(**entry) if isinstance(entry, dict) and entry.keys() == names else None
