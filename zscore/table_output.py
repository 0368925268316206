"""Writes derived tables: several files that appear together, whole or not at all, and never over their own input."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import polars as pl

from zscore.errors import TableError, UsageError
from zscore.parquet import METADATA_KEY, ROWS_PER_GROUP
from zscore.store import identity, is_local, open_store, split_out
from zscore.tables import is_ok, would_read

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from zscore.tables import Scores

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_targets(
    inputs: Sequence[str],
    targets: Mapping[str, str | None],
    sources: Sequence[str] = (),
    *,
    shards: Sequence[str] = (),
) -> None:
    """Refuse outputs that are an input or would become one, a folder, or one another.

    Args:
        inputs: files that are read.
        targets: paths or urls by the option that names them; None where it isn't given.
        sources: folders and globs that the inputs were found by.
        shards: paths or urls of shards that are read.

    Raises:
        UsageError: says which.
    """
    taken: dict[str, str] = {}
    for option, target in targets.items():
        if target is None:
            continue
        split_out(target)
        if is_local(target) and _local(target).is_dir():
            raise UsageError(f"{option} {target} is a folder: give a file name, like {target.rstrip('/')}/out.parquet")
        if _among(target, inputs) is not None:
            raise UsageError(f"{option} {target} is the table that is read: give another name")
        shard = _among(target, shards)
        if shard is not None:
            raise UsageError(f"{option} {target} is the shard {shard} that is read: give another name")
        for source in sources:
            if would_read(source, target):
                raise UsageError(
                    f"{option} {target} would be read as a part of {source} from then on: write it somewhere else"
                )
        for other, path in taken.items():
            if identity(target) == identity(path):
                raise UsageError(f"{option} and {other} name the same file, {target}: give another name")
        taken[option] = target


def _among(target: str, files: Sequence[str]) -> str | None:
    """Which of the files, all of which exist, the target is."""
    if is_local(target) and not _local(target).resolve().exists():  # no need to look at a hundred thousand shards
        return None
    sought = identity(target)
    return next((file for file in files if identity(file) == sought), None)


def _local(path: str) -> Path:
    return Path(path.removeprefix("file://").removeprefix("local://"))


@contextlib.contextmanager
def written(*targets: str | None) -> Iterator[list[IO[bytes] | None]]:
    """Streams for the targets; the files appear, replacing earlier ones, when the block ends without an exception."""
    with contextlib.ExitStack() as stack:
        streams: list[IO[bytes] | None] = []
        for target in targets:
            if target is None:
                streams.append(None)
                continue
            folder, name = split_out(target)
            streams.append(stack.enter_context(open_store(folder).write(name)))
        yield streams


def sink(frame: pl.LazyFrame, stream: IO[bytes], metadata: dict[str, Any], source: str) -> None:
    """Stream a query into parquet with zscore metadata, in the order of its rows.

    Raises:
        TableError: `source`, what the query reads, is broken.
        OSError: the disk is full.
    """
    text = json.dumps(metadata, sort_keys=True)
    with readable(source):
        frame.sink_parquet(
            stream,
            compression="zstd",
            compression_level=1,  # as small as the default 3 on these columns, for a third less time
            row_group_size=ROWS_PER_GROUP,
            metadata={METADATA_KEY.decode(): text},
            engine="streaming",
        )


def fetch(frame: pl.LazyFrame, source: str) -> pl.DataFrame:
    """Collect a query on the streaming engine.

    Raises:
        TableError: `source`, what the query reads, is broken.
    """
    with readable(source):
        return frame.collect(engine="streaming")


def failures(scores: Scores) -> dict[str, int]:
    """Rows without scores by their status."""
    status = pl.col("status").cast(pl.String).fill_null("no_status")
    counts = scores.frame.filter(~is_ok()).group_by(status).len()
    return dict(fetch(counts, scores.name).iter_rows())


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    """What polars makes of a broken file, in one line that names the file; a full disk is the output's fault."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found and int(found[1]) in _FULL:
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise TableError(f"can't read {source}: {str(error).splitlines()[0]}") from error


def derived(metadata: dict[str, Any], command: str, criteria: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a table that a command made from another: the same, and a line on how it came about."""
    step = {"command": command, "criteria": criteria, "counts": counts}
    return {**metadata, "derived": [*metadata.get("derived", []), step]}
