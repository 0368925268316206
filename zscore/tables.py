"""Opens scored tables for deciding: one file, a folder of parts, a glob or an fsspec url → a lazy frame + metadata.

Nothing is read but footers until a query runs, and local files are read by polars' streaming engine, so memory
doesn't grow with the table. Other file systems go through fsspec and pyarrow, column by column, with the credentials
that fsspec uses everywhere else.
"""

from __future__ import annotations

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from zscore.errors import TableError, UsageError
from zscore.parquet import ROWS_PER_GROUP, read_metadata
from zscore.records import Status
from zscore.store import is_local
from zscore.table_metadata import are_alike, check_shape, check_unmixed, merged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from polars.datatypes import DataType, DataTypeClass

    PolarsDataType = DataType | DataTypeClass

OVERALL = "overall"
# Numbers the rows of a table inside a query.
ROW = "__zscore_row"
# What a column must hold, where it is there; derived tables may have fewer columns.
_TEXT = ("shard", "key", "prompt", "group", "status", "sha256")
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Scores:
    """A scored table, not yet read."""

    frame: pl.LazyFrame
    """All rows of all files, in file order (parts: in the order of their shards' names)."""
    schema: pl.Schema
    metadata: dict[str, Any]
    """The footer's `zscore` entry; that of several files is merged, counts are summed."""
    files: tuple[str, ...]
    rows: int
    numbered: pl.LazyFrame
    """The same rows with their numbers in the column `ROW`."""
    sources: tuple[str, ...] = ()
    """What it was opened by: files, folders, globs, urls."""
    mixed: bool = False
    """Whether its files were scored or made differently, so that opening them takes `allow_mixed`."""

    def where(self, mask: NDArray[np.bool_]) -> pl.LazyFrame:
        """Rows by a mask over all of them, in their order, with the column `ROW`."""
        if "index" not in self.schema:
            return self.numbered.filter(looked_up(mask, pl.Boolean))
        # Since it asks for a column of the file, polars looks at the mask before it decodes the others: 17 % less time.
        wanted = pl.struct(ROW, "index").map_batches(
            lambda rows: pl.Series(mask[rows.struct.field(ROW).to_numpy()], dtype=pl.Boolean),
            return_dtype=pl.Boolean,
            is_elementwise=True,
        )
        return self.numbered.filter(wanted)

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The rubric's dimensions that have a column."""
        return tuple(name for name in self.metadata["rubric"]["dimensions"] if name in self.schema)

    @property
    def values(self) -> tuple[float, ...]:
        """Level values in the order of the `*_probs` lists; empty where the files' levels differ."""
        return tuple(float(level["value"]) for level in self.metadata["rubric"]["levels"])

    def level(self, column: str, k: int) -> pl.Expr:
        """The probability of level k in a column `*_probs`; null where there is none."""
        if isinstance(self.schema[column], pl.Array):
            return pl.col(column).arr.get(k, null_on_oob=True)
        return pl.col(column).list.get(k, null_on_oob=True)

    def require(self, *columns: str) -> None:
        """Refuse a table without these columns.

        Raises:
            TableError: names the first that is missing.
        """
        for column in columns:
            if column not in self.schema:
                raise TableError(
                    f"{self.name} has no column '{column}': it isn't a full scores table; was it made with --columns?"
                )

    def check_column(self, name: str, option: str) -> str:
        """The name of a column that the user gave.

        Raises:
            UsageError: no such column; names the nearest.
        """
        return known(name, list(self.schema), option, "column")

    def check_score(self, name: str, option: str, *, overall: bool = True) -> str:
        """The name of a dimension (or `overall`) that the user gave.

        Raises:
            UsageError: no such dimension; names the nearest.
        """
        return known(name, [*([OVERALL] if overall and OVERALL in self.schema else []), *self.dimensions], option)


def known(name: str, names: Sequence[str], option: str, kind: str = "dimension") -> str:
    """`name`, if it is one of `names`.

    Raises:
        UsageError: it isn't; says what was probably meant.
    """
    if name in names:
        return name
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
    raise UsageError(f"{option}: there is no {kind} '{name}': {hint}")


def is_ok() -> pl.Expr:
    """Whether a row has scores."""
    return (pl.col("status") == Status.OK.value).fill_null(value=False)


def looked_up(values: NDArray[Any], dtype: PolarsDataType) -> pl.Expr:
    """The value of each row by its number, in the column `ROW`; streams, unlike a join."""
    return pl.col(ROW).map_batches(
        lambda rows: pl.Series(ROW, values[rows.to_numpy()], dtype=dtype), return_dtype=dtype, is_elementwise=True
    )


def open_scores(*sources: str, allow_mixed: bool | None = False) -> Scores:
    """Open the files that the sources stand for as one table.

    Args:
        sources: files, folders (all `.parquet` below them), globs, fsspec urls of these.
        allow_mixed: take files whose rubric, model or settings differ; only what they share can be asked for. None
            refuses them too, for a caller that has no such option to advise.

    Raises:
        TableError: a file that is missing, isn't a scores table, or was scored differently from the first.
    """
    found = [file for source in sources for file in _files(source)]
    named = {_identity(file): file for file in reversed(found)}  # by the first of several spellings
    files = list(dict.fromkeys(named[_identity(file)] for file in found))
    if len(files) > _FOOTERS_AT_ONCE:
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            footers = list(pool.map(_footer, files))
    else:
        footers = [_footer(file) for file in files]
    # A folder's parts are named after their shards' last component; rows belong in the order of the whole names.
    if all("part" in metadata for metadata, _, _ in footers):
        order = sorted(range(len(files)), key=lambda i: (str(footers[i][0]["part"]["shard"]["name"]), files[i]))
        files, footers = [files[i] for i in order], [footers[i] for i in order]
    metadatas = [metadata for metadata, _, _ in footers]
    check_unmixed(files, metadatas, allow_mixed=allow_mixed)
    metadata = merged(metadatas)
    schemas = [schema for _, schema, _ in footers]
    for file, schema in zip(files, schemas, strict=True):
        _check_types(file, schema, metadata["rubric"]["dimensions"])
    frame, numbered = _scan(files, schemas)
    rows = sum(rows for _, _, rows in footers)
    mixed = not are_alike(metadatas)
    return Scores(frame, frame.collect_schema(), metadata, tuple(files), rows, numbered, sources, mixed)


def would_read(source: str, target: str) -> bool:
    """Whether a source of `open_scores`, a folder or a glob, would take a new file for one of its own."""
    source, target = _plain(source), _plain(target)
    if is_local(source) != is_local(target):
        return False
    if is_local(source):
        if Path(source).is_dir():
            source, target = str(Path(source).resolve()), str(Path(target).resolve())
        elif Path(source).exists():
            return False
        else:
            source, target = (os.path.abspath(path) for path in (source, target))  # noqa: PTH100  # links stay
    folder = source.rstrip("/") + "/"
    if target.startswith(folder):
        return target.endswith(".parquet") and _is_visible(Path(target.removeprefix(folder)))
    if not any(sign in source for sign in "*?["):
        return False
    from fsspec.utils import glob_translate

    return re.match(glob_translate(source), target) is not None


def _plain(path: str) -> str:
    return path.removeprefix("file://").removeprefix("local://")


def _identity(file: str) -> str:
    """One name for one file, however it is spelt."""
    return str(Path(file).resolve()) if is_local(file) else file


def _files(source: str) -> list[str]:
    """Parquet files behind one argument, sorted by path inside a folder or glob."""
    source = _plain(source)
    if not is_local(source):
        return _remote_files(source)
    path = Path(source)
    if path.is_dir():
        found = [str(file) for file in sorted(path.rglob("*.parquet")) if _is_visible(file.relative_to(path))]
        if not found:
            raise TableError(f"the folder {source} holds no .parquet file: score into it with --out {source}")
        return found
    if path.exists():
        return [source]
    found = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    if found:
        return found
    raise TableError(_missing(path))


def _is_visible(path: Path) -> bool:
    """Hidden and underscored entries are other tools' or unfinished."""
    return not any(part.startswith((".", "_")) for part in path.parts)


def _missing(path: Path) -> str:
    """What to do about a path that isn't there."""
    if path.with_name(f"{path.name}.parts").is_dir():
        return f"{path} isn't finished: run the `zscore score` command again, it goes on where it stopped"
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = get_close_matches(path.name, [name for name in names if name.endswith(".parquet")], n=1)
    hint = f"did you mean {folder / near[0]}?" if near else "make it with `zscore score SHARDS --out scores.parquet`"
    return f"there is no {path}: {hint}"


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"can't read {url}: {error}") from error
    return filesystem, path


def _remote_files(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    protocol = url.partition("://")[0]
    try:
        if any(sign in path for sign in "*[") and protocol not in {"http", "https"}:
            found = sorted(filesystem.glob(path))
        elif not path.endswith(".parquet") or filesystem.isdir(path):
            found = [name for name in sorted(filesystem.find(path)) if name.endswith(".parquet")]
            found = [name for name in found if _is_visible(Path(name.removeprefix(path).lstrip("/")))]
        else:
            found = [path]
    except OSError as error:
        raise TableError(f"can't list {url}: {error}") from error
    if not found:
        raise TableError(f"there is no .parquet file at {url}")
    return [url] if found == [path] else [str(filesystem.unstrip_protocol(name)) for name in found]


def _open(file: str) -> IO[bytes]:
    if is_local(file):
        return Path(file).open("rb")
    filesystem, path = _filesystem(file)
    stream: IO[bytes] = filesystem.open(path, "rb")
    return stream


def _footer(file: str) -> tuple[dict[str, Any], pa.Schema, int]:
    """Metadata, schema and number of rows.

    Raises:
        TableError: it can't be opened, isn't parquet, or wasn't written by zscore.
    """
    try:
        with _open(file) as stream:
            metadata = read_metadata(stream, file)
            check_shape(file, metadata)
            stream.seek(0)
            parquet = pq.ParquetFile(stream)
            return metadata, parquet.schema_arrow, parquet.metadata.num_rows
    except OSError as error:
        raise TableError(f"can't read {file}: {error.strerror or error}") from error


def _check_types(file: str, schema: pa.Schema, dimensions: Iterable[str]) -> None:
    """Refuse columns of the right name and the wrong type, before a query fails on them."""

    def refuse(name: str, wanted: str) -> None:
        raise TableError(
            f"{file}: the column '{name}' is {schema.field(name).type}, not {wanted}: it isn't a scores table"
        )

    names = set(schema.names)
    for name in names.intersection(_TEXT):
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            refuse(name, "text")
    for name in names.intersection([OVERALL, *dimensions, *(f"{name}_std" for name in dimensions)]):
        if not pa.types.is_floating(schema.field(name).type):
            refuse(name, "a float")
    for name in names.intersection(f"{name}_probs" for name in dimensions):
        kind = schema.field(name).type
        is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not (is_list and pa.types.is_floating(kind.value_type)):
            refuse(name, "a list of floats")
    if "index" in names and not pa.types.is_integer(schema.field("index").type):
        refuse("index", "an integer")


def _scan(files: list[str], schemas: list[pa.Schema]) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """All files as one frame, and the same with row numbers; where columns differ, what a file doesn't have is null."""
    if all(is_local(file) for file in files):
        if all(_same_columns(schema, schemas[0]) for schema in schemas):
            # The reader's own row numbers; behind a `with_row_index` filters wouldn't reach the reader.
            return _scan_local(files), _scan_local(files, row_index_name=ROW)
        frames = [_scan_local([file]) for file in files]
    else:
        frames = [_scan_remote(file, schema) for file, schema in zip(files, schemas, strict=True)]
    frame = frames[0]
    if len(frames) > 1:
        frame = pl.concat([_loose_lists(frame) for frame in frames], how="diagonal_relaxed")
    return frame, frame.with_row_index(ROW)


def _scan_local(files: list[str], row_index_name: str | None = None) -> pl.LazyFrame:
    return pl.scan_parquet(files, glob=False, hive_partitioning=False, row_index_name=row_index_name)


def _same_columns(left: pa.Schema, right: pa.Schema) -> bool:
    return bool(left.names == right.names and left.types == right.types)


def _loose_lists(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Lists of any length, since rubrics may have different numbers of levels."""
    arrays = {name: kind for name, kind in frame.collect_schema().items() if isinstance(kind, pl.Array)}
    return frame.with_columns(pl.col(name).arr.to_list() for name in arrays)


def _scan_remote(file: str, schema: pa.Schema) -> pl.LazyFrame:
    """A frame that fetches the columns it needs, a row group at a time."""

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, _batch: int | None
    ) -> Iterator[pl.DataFrame]:
        with _open(file) as stream:
            reader = pq.ParquetFile(stream, pre_buffer=True)
            for batch in reader.iter_batches(batch_size=ROWS_PER_GROUP, columns=columns):
                found = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(found, pl.DataFrame)
                if rows is not None:
                    found = found.head(rows)
                    rows -= found.height
                yield found if predicate is None else found.filter(predicate)
                if rows == 0:
                    return

    from polars.io.plugins import register_io_source

    empty = pl.from_arrow(schema.empty_table())
    assert isinstance(empty, pl.DataFrame)
    return register_io_source(read, schema=empty.schema)
