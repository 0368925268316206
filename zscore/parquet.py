"""The scores table: its schema, its metadata, writing it without ever showing half a file, reading it back.

Layout of arrays: D dimensions, K levels. The schema is derived from the rubric, so every file carries its own
description: file metadata key `zscore` holds a JSON object (see `docs/formats.md`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from zscore.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import IO

    from zscore.records import ScoreRow
    from zscore.rubrics.rubric import Rubric

METADATA_KEY = b"zscore"
# 4096 rows are about 3 MB in memory, so a shard of any size is written in constant memory.
ROWS_PER_BATCH = 4096
# Parts are small; the final file wants row groups that readers can skip by.
ROWS_PER_GROUP = 65_536
# Prompts may be long: whatever the rows, no more than this waits in memory.
BYTES_PER_BATCH = 16 << 20
BYTES_PER_GROUP = 64 << 20

BASE_FIELDS = (
    pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
    pa.field("index", pa.int32(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("group", pa.string(), nullable=False),
    pa.field("status", pa.dictionary(pa.int8(), pa.string()), nullable=False),
    pa.field("error", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("sha256", pa.string()),
)


# Behind the scores, where the model reasoned.
REASONING_FIELDS = (pa.field("reasoning", pa.string()), pa.field("output_tokens", pa.int32()))


def score_schema(dimensions: Sequence[str], levels: int, *, reasoning: bool = False) -> pa.Schema:
    """Schema of a scores file.

    Args:
        dimensions: the rubric's dimension names, D of them.
        levels: K, the length of each `*_probs` list.
        reasoning: whether the model reasoned before its scores.
    """
    fields = [*BASE_FIELDS, pa.field("overall", pa.float32())]
    for name in dimensions:
        fields.append(pa.field(name, pa.float32()))
        fields.append(pa.field(f"{name}_std", pa.float32()))
        fields.append(pa.field(f"{name}_entropy", pa.float32()))
        fields.append(pa.field(f"{name}_probs", pa.list_(pa.float32(), levels)))
    return pa.schema([*fields, *(REASONING_FIELDS if reasoning else ())])


def rows_to_table(rows: Sequence[ScoreRow], rubric: Rubric, *, reasoning: bool = False) -> pa.Table:
    """Rows as a table; score columns are null where a row has no scores."""
    schema = score_schema(rubric.names, len(rubric.levels), reasoning=reasoning)
    columns: dict[str, list[Any]] = {field.name: [getattr(row, field.name) for row in rows] for field in BASE_FIELDS}
    columns["status"] = [str(row.status) for row in rows]
    scores = [row.scores for row in rows]
    columns["overall"] = [None if s is None else float(s.mean_D.mean(dtype="float64")) for s in scores]
    for d, name in enumerate(rubric.names):
        columns[name] = [None if s is None else s.mean_D[d] for s in scores]
        columns[f"{name}_std"] = [None if s is None else s.std_D[d] for s in scores]
        columns[f"{name}_entropy"] = [None if s is None else s.entropy_D[d] for s in scores]
        columns[f"{name}_probs"] = [None if s is None else s.probs_DK[d] for s in scores]
    columns["reasoning"] = [None if s is None else _reasoning(s.reasoning, rubric) for s in scores]
    columns["output_tokens"] = [None if s is None else s.output_tokens for s in scores]
    return pa.table({field.name: pa.array(columns[field.name], type=field.type) for field in schema}, schema=schema)


def _reasoning(texts: Sequence[str], rubric: Rubric) -> str:
    """What the model wrote as one text: a paragraph a dimension and reasoning, led by the dimension's title."""
    each = max(1, len(texts) // len(rubric.dimensions))
    numbers = [f" ({number + 1} of {each})" if each > 1 else "" for number in range(each)]
    leads = [dimension.title + number for dimension in rubric.dimensions for number in numbers]
    return "\n\n".join(f"{lead}: {text}" for lead, text in zip(leads, texts, strict=False))


class TableWriter:
    """Streams tables into one parquet file; metadata that is only known at the end goes to `close`."""

    def __init__(self, sink: IO[bytes], schema: pa.Schema, *, group_rows: int = ROWS_PER_GROUP) -> None:
        self._writer = pq.ParquetWriter(sink, schema, compression="zstd")
        self._schema = schema
        self._group_rows = group_rows
        self._pending: list[pa.Table] = []
        self._pending_rows = self._pending_bytes = 0
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """Append; rows leave memory once a row group is full."""
        self._pending.append(table.cast(self._schema))
        self._pending_rows += table.num_rows
        self._pending_bytes += table.nbytes
        self.rows += table.num_rows
        if self._pending_rows >= self._group_rows or self._pending_bytes >= BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._pending_rows:
            # Chunks from several parts have a dictionary each; one row group wants one.
            self._writer.write_table(pa.concat_tables(self._pending).unify_dictionaries().combine_chunks())
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def close(self, metadata: dict[str, Any]) -> None:
        """Write the rest and the footer."""
        self._flush()
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def read_metadata(source: Any, where: str) -> dict[str, Any]:
    """The `zscore` metadata of a parquet file (path or file object).

    Raises:
        TableError: not parquet, or not written by zscore.
    """
    try:
        raw = (pq.read_metadata(source).metadata or {}).get(METADATA_KEY)
    except (pa.ArrowInvalid, OSError) as error:
        raise TableError(f"{where} can't be read as parquet: {str(error).splitlines()[0]}") from error
    if raw is None:
        raise TableError(f"{where} has no zscore metadata: it isn't a scores file (made by `zscore score`)")
    try:
        metadata = json.loads(raw)
    except ValueError as error:
        raise TableError(f"{where} has zscore metadata that isn't JSON ({error}): it isn't a scores table") from error
    if not isinstance(metadata, dict):
        raise TableError(f"{where} has zscore metadata that isn't a JSON object: it isn't a scores table")
    return metadata


def batches(source: Any) -> Iterable[pa.Table]:
    """Tables of at most `ROWS_PER_GROUP` rows, in file order."""
    reader = pq.ParquetFile(source)
    for batch in reader.iter_batches(batch_size=ROWS_PER_GROUP):
        yield pa.Table.from_batches([batch])
