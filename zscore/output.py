"""Parts, resume and the final file of one `zscore score` output.

    --out scores.parquet   parts in scores.parquet.parts/, joined into one file by atomic rename, then removed
    --out DIR/             the parts are the output

A part holds one shard's rows and is written whole or not at all, so the set of finished parts is the state of a run:
nothing else needs to be recovered after a kill. `run.json` beside them says with which settings they were made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from zscore.errors import OutputError, OutputMismatchError
from zscore.parquet import TableWriter, batches, read_metadata, score_schema
from zscore.records import ShardRef, Status
from zscore.store import is_local, open_store, refuse_foreign, split_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pyarrow as pa

    from zscore.rubrics.rubric import Rubric

RUN_FILE = "run.json"
LOCK_FILE = "lock"


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What a finished part says about itself."""

    shard: ShardRef
    counts: dict[str, int]
    """Rows by status."""
    attempt: str
    """Id of the run that wrote it; a retry redoes parts of earlier attempts that hold failures."""
    engine: dict[str, str]
    """Name, version and dtype of the engine that scored it."""

    @property
    def rows(self) -> int:
        """Rows in the part."""
        return sum(self.counts.values())


class Output:
    """One output and its parts; use inside `with output.locked():`.

    Args:
        out: `scores.parquet`, `DIR/` or an fsspec url of either.
        rubric: gives the schema.
        settings: what the rows depend on; a resume with other settings is refused.
        provenance: metadata that every file carries (rubric, model, engine, …).
    """

    def __init__(self, out: str, rubric: Rubric, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.out = out = out.removeprefix("file://")
        self.is_folder = out.endswith("/") or (is_local(out) and Path(out).is_dir())
        reasoning = provenance.get("layout") == "reasoning"
        self._schema = score_schema(rubric.names, len(rubric.levels), reasoning=reasoning)
        self._settings = settings
        self._provenance = provenance
        self.attempt = datetime.now(UTC).isoformat()
        if self.is_folder:
            self._parts = open_store(out.rstrip("/") or "/", resumes=True)
        else:
            refuse_foreign({"--out": out})
            folder, self._name = split_out(out)
            self._final = open_store(folder, resumes=True)
            self._parts = open_store(f"{out}.parts", resumes=True)

    @contextlib.contextmanager
    def locked(self, shards: Sequence[ShardRef]) -> Iterator[None]:
        """Hold the output for ourselves.

        Machines that fill one folder from different shards don't exclude each other; where their shards overlap,
        they do the same work twice and write the same rows.

        Raises:
            OutputLockedError: another run holds it.
        """
        name = LOCK_FILE
        if self.is_folder:
            name = f".{LOCK_FILE}-{_digest(chr(10).join(shard.name for shard in shards))}"
        try:
            with self._parts.lock(name):
                # What was killed while it wrote left a temporary file.
                parts = {self.part_name(shard) for shard in shards} | (set() if self.is_folder else {RUN_FILE})
                self._parts.sweep(lambda name: name in parts)
                if not self.is_folder:
                    self._final.sweep(lambda name: name == self._name)
                yield
        finally:
            if not self.is_folder:
                self._parts.delete_if_empty()

    def final_metadata(self) -> dict[str, Any] | None:
        """Metadata of the finished file, or None where there is none (a folder never has one)."""
        if self.is_folder or self._name not in self._final.names():
            return None
        with self._final.open(self._name) as stream:
            return read_metadata(stream, self.out)

    def begin(self, shards: Sequence[ShardRef], *, overwrite: bool = False) -> None:
        """Check that what lies here was made with our settings, and write down ours.

        Raises:
            OutputMismatchError: it wasn't; names the first field that differs.
        """
        if overwrite:
            for shard in shards:  # in a folder, parts of other machines' shards and foreign files stay
                self._parts.delete(self.part_name(shard))
            if not self.is_folder:
                self.discard_parts()
        elif before := self.check_begun():
            self.attempt = before["attempt"]
            return
        self._write_run()

    def check_begun(self) -> dict[str, Any]:
        """What an earlier run wrote down about itself; empty where there was none.

        Raises:
            OutputMismatchError: its settings were others; names the first that differs.
        """
        if before := self._run():
            check_settings(before["settings"], self._settings, self.out)
        return before

    def begin_retry(self, shards: Sequence[ShardRef]) -> None:
        """Turn a finished output back into parts, so that those with failures can be done again.

        Raises:
            OutputError: there is nothing to retry.
            OutputMismatchError: it was made with other settings or of other shards.
        """
        attempt = self.attempt
        self.check_retry(shards)
        if self._run().get("retry") or self.is_folder:
            self.begin(shards)
            if not self.is_folder:  # an interrupted retry goes on where it was
                return
            self.attempt = attempt
        else:
            self.discard_parts()
            self._split_final()
        self._write_run(retry=True)

    def check_retry(self, shards: Sequence[ShardRef]) -> dict[str, int]:
        """Rows by status, as far as they are known, of what a retry would start from.

        Raises:
            OutputError: there is nothing to retry.
            OutputMismatchError: it was made of other shards or with other settings.
        """
        metadata = self.final_metadata()
        before = self.check_begun()
        if metadata is None:
            if not before:
                raise OutputError(f"--retry-failed: there is no {self.out} yet; run without it first")
            counts: Counter[str] = Counter()
            for info in self.finished(shards).values():
                counts.update(info.counts)
            return dict(counts)
        check_settings(metadata.get("options", {}), self._settings, self.out)
        if {name for name, _, _ in metadata["inputs"]} != {shard.name for shard in shards}:
            raise OutputMismatchError(  # a retry of some shards only would drop the others' rows
                f"{self.out} holds {len(metadata['inputs'])} shards, and --retry-failed was given {len(shards)} others"
                " or only some of them: give the same inputs as before"
            )
        found: dict[str, int] = metadata["counts"]
        return found

    @property
    def is_retrying(self) -> bool:
        """Whether an interrupted retry lies here, whose parts must be kept."""
        return bool(self._run().get("retry"))

    def check_engine(self, engine: dict[str, str]) -> None:
        """Hold every part of one output to one engine and dtype, also where those are chosen by the machine.

        Raises:
            OutputMismatchError: parts that lie here were scored with another.
        """
        before = self._run()
        for field in ("name", "dtype"):
            if before.get("engine", engine).get(field) != engine[field]:
                check_settings(
                    {f"engine {field}": before["engine"][field]}, {f"engine {field}": engine[field]}, self.out
                )
        if "engine" not in before:
            self._write_run(**{**before, "engine": engine})

    def _run(self) -> dict[str, Any]:
        """What run.json says; empty where there is none.

        Raises:
            OutputMismatchError: it isn't ours.
        """
        if RUN_FILE not in self._parts.names():
            return {}
        try:
            with self._parts.open(RUN_FILE) as stream:
                run = json.loads(stream.read())
        except ValueError:
            run = None
        if not isinstance(run, dict) or not run.keys() >= {"settings", "attempt"}:
            raise OutputMismatchError(f"{self._parts.path(RUN_FILE)} isn't zscore's: give a folder of its own as --out")
        return run

    def _write_run(self, **more: Any) -> None:
        run = {**more, "settings": self._settings, "attempt": self.attempt}
        with self._parts.write(RUN_FILE) as stream:
            stream.write(json.dumps(run, indent=1).encode())

    def part_name(self, shard: ShardRef) -> str:
        """File name of a shard's part; depends on the shard's name alone, so that inputs may be added."""
        stem = shard.name.rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:80]
        return f"{safe}-{_digest(shard.name)}.parquet"

    def finished(self, shards: Sequence[ShardRef], *, retry: bool = False) -> dict[str, PartInfo]:
        """Parts that can be kept, by shard name.

        A part is kept while its shard has the size and version that it was scored with; in a retry it must also
        be free of failures, or of this attempt.
        """
        there = self._parts.names()
        kept = {}
        for shard in shards:
            name = self.part_name(shard)
            if name not in there:
                continue
            info = self._part_info(name)
            if info.shard.url and info.shard.url != shard.url and info.shard.version != shard.version:
                raise OutputMismatchError(
                    f"{self.out} has rows of {info.shard.url} under the name {shard.name}, and {shard.url} is another"
                    " shard of that name: give the folder above both as input, or another --out"
                )
            if (info.shard.size, info.shard.version) != (shard.size, shard.version):
                continue
            if retry and info.attempt != self.attempt and info.rows != info.counts.get(Status.OK, 0):
                continue
            kept[shard.name] = info
        return kept

    def _part_info(self, name: str) -> PartInfo:
        with self._parts.open(name) as stream:
            metadata = read_metadata(stream, self._parts.path(name))
        part = metadata["part"]
        return PartInfo(ShardRef(**part["shard"]), part["counts"], part["attempt"], metadata["engine"])

    def info(self, shard: ShardRef, part: PartWriter) -> PartInfo:
        """What a part that was just written says about itself."""
        return PartInfo(shard, part.counts, self.attempt, self._provenance["engine"])

    def kept_rows(self, shard: ShardRef) -> pa.Table | None:
        """The ok rows of a part that is being retried; None where its shard has changed since, or has no part."""
        name = self.part_name(shard)
        if name not in self._parts.names():
            return None
        before = self._part_info(name).shard
        if (before.size, before.version) != (shard.size, shard.version):
            return None
        with self._parts.open(name) as stream:
            table = pq.read_table(stream)
        return table.filter(pc.equal(table["status"].cast("string"), str(Status.OK)))

    @contextlib.contextmanager
    def part(self, shard: ShardRef) -> Iterator[PartWriter]:
        """Write one shard's part; it appears when the block ends without an exception."""
        with self._parts.write(self.part_name(shard)) as stream, TableWriter(stream, self._schema) as writer:
            part = PartWriter(writer)
            yield part
            writer.close(self._part_metadata(shard, part.counts, self.attempt))

    def _part_metadata(self, shard: ShardRef, counts: dict[str, int], attempt: str) -> dict[str, Any]:
        part = {"shard": asdict(shard), "counts": counts, "attempt": attempt}
        return {**self._provenance, "counts": counts, "shards": 1, "part": part}

    def commit(self, shards: Sequence[ShardRef], metadata: dict[str, Any]) -> None:
        """Join the parts in shard order into the final file and remove them; a folder only gets its metadata."""
        if self.is_folder:
            self._write_run(metadata=metadata)
            return
        with self._final.write(self._name) as stream, TableWriter(stream, self._schema) as writer:
            for shard in shards:
                with self._parts.open(self.part_name(shard)) as part:
                    for table in batches(part):
                        writer.write(table)
            writer.close(metadata)
        self.discard_parts()

    def discard_parts(self) -> None:
        """Remove parts whose rows are in the final file (the lock stays until its holder lets go)."""
        for name in self._parts.names():
            if name == RUN_FILE or name.endswith(".parquet"):
                self._parts.delete(name)

    def _split_final(self) -> None:
        """Write the finished file's rows back as parts, one shard at a time."""
        metadata = self.final_metadata()
        assert metadata is not None
        shards = {name: ShardRef("", name, size, version) for name, size, version in metadata["inputs"]}
        with self._final.open(self._name) as stream:
            for name, tables in _by_shard(batches(stream)):
                ref = shards[name]
                with self._parts.write(self.part_name(ref)) as sink, TableWriter(sink, self._schema) as writer:
                    part = PartWriter(writer)
                    for table in tables:
                        part.write(table)
                    described = self._part_metadata(ref, part.counts, metadata["created"])
                    writer.close({**described, "engine": metadata["engine"]})


class PartWriter:
    """Rows of one shard, in order."""

    def __init__(self, writer: TableWriter) -> None:
        self._writer = writer
        self.counts: dict[str, int] = {}

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._writer.write(table)
        for status in table["status"].cast("string").to_pylist():
            self.counts[status] = self.counts.get(status, 0) + 1


def check_settings(before: dict[str, Any], now: dict[str, Any], out: str) -> None:
    """Refuse to mix rows made with different settings.

    Raises:
        OutputMismatchError: names the first field that differs, both values and the ways out.
    """
    for field in sorted({*before, *now}):
        if before.get(field) != now.get(field):
            raise OutputMismatchError(
                f"{out} was made with {field} = {before.get(field)!r}, this run has {now.get(field)!r}:"
                " use the same, or --overwrite to score everything again, or another --out"
            )


def _by_shard(tables: Iterable[pa.Table]) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """Runs of rows with one shard name (rows are in shard order)."""

    def runs() -> Iterator[tuple[str, pa.Table]]:
        for table in tables:
            names = table["shard"].cast("string")
            for name in pc.unique(names).to_pylist():
                yield name, table.filter(pc.equal(names, name))

    for name, group in groupby(runs(), key=lambda pair: pair[0]):
        yield name, (table for _, table in group)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
