"""A scores table of any size, as `zscore score` would write it: 20 columns, zstd, row groups of 65,536 rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zscore.parquet import BASE_FIELDS, ROWS_PER_GROUP, TableWriter

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")
LEVELS = tuple(1.0 + k / 2 for k in range(9))
SHARD_ROWS = 10_000
WORDS = "a photo of the red blue small large cat dog house tree standing under beside oil painting with hat bright"
HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)


def schema() -> pa.Schema:
    """20 columns: the ten that every row has, overall, mean and std of four dimensions, one distribution."""
    fields = [*BASE_FIELDS, pa.field("overall", pa.float32())]
    for name in DIMENSIONS:
        fields += [pa.field(name, pa.float32()), pa.field(f"{name}_std", pa.float32())]
    return pa.schema([*fields, pa.field("alignment_probs", pa.list_(pa.float32(), len(LEVELS)))])


def write_scores(path: Path, rows: int, groups: int, *, scattered: bool) -> None:
    """Write a table whose groups lie together, or are scattered: one candidate of each in every run of shards."""
    random = np.random.default_rng(0)
    prompts = pa.array([" ".join(random.choice(WORDS.split(), 12)) for _ in range(4096)])
    with path.open("wb") as sink, TableWriter(sink, schema()) as writer:
        for start in range(0, rows, ROWS_PER_GROUP):
            row = np.arange(start, min(start + ROWS_PER_GROUP, rows))
            group = row % groups if scattered else row * groups // rows
            writer.write(_chunk(random, row, group, prompts))
        writer.close(metadata(rows))


def metadata(rows: int) -> dict[str, object]:
    """What zscore keeps in the footer, as far as filter and select read it."""
    levels = [{"token": str(k + 1), "value": value} for k, value in enumerate(LEVELS)]
    rubric = {"name": "z-reward", "hash": "0" * 64, "source": "", "dimensions": list(DIMENSIONS), "levels": levels}
    return {"version": "0", "rubric": rubric, "layout": "joint", "model": {"id": "made", "weights": "up"},
            "counts": {"ok": rows}}  # fmt: skip


def _chunk(
    random: np.random.Generator, row: NDArray[np.int64], group: NDArray[np.int64], prompts: pa.Array
) -> pa.Table:
    n = len(row)
    bad = random.random(n) < 0.02
    shards, of_shard = np.unique(row // SHARD_ROWS, return_inverse=True)
    mean_DN = (1 + 4 * random.beta(4, 2.5, (len(DIMENSIONS), n))).astype(np.float32)
    probs_NK = random.random((n, len(LEVELS)), dtype=np.float32)
    probs_NK /= probs_NK.sum(axis=1, keepdims=True)
    text = pc.binary_join_element_wise(prompts.take(pa.array(group % 4096)), pa.array(group).cast(pa.string()), " no. ")
    columns: dict[str, pa.Array] = {
        "shard": pa.DictionaryArray.from_arrays(of_shard.astype(np.int32), [f"{s:06d}.tar" for s in shards.tolist()]),
        "index": pa.array((row % SHARD_ROWS).astype(np.int32)),
        "key": pc.utf8_lpad(pa.array(row).cast(pa.string()), 9, "0"),
        "prompt": text,
        "group": _hex(_mix(group).reshape(n, 1)),
        "status": pa.DictionaryArray.from_arrays(pa.array(bad.astype(np.int8)), ["ok", "bad_image"]),
        "error": pa.array(np.full(n, "cannot identify image file"), mask=~bad),
        "width": pa.array(np.full(n, 1024, np.int32)),
        "height": pa.array(np.full(n, 1024, np.int32)),
        "sha256": _hex(random.integers(0, 2**64, (n, 4), dtype=np.uint64)),
        "overall": pa.array(mean_DN.mean(axis=0), mask=bad),
        "alignment_probs": pa.FixedSizeListArray.from_arrays(probs_NK.ravel(), len(LEVELS), mask=pa.array(bad)),
    }
    for name, mean_N in zip(DIMENSIONS, mean_DN, strict=True):
        columns[name] = pa.array(mean_N, mask=bad)
        columns[f"{name}_std"] = pa.array(random.random(n, dtype=np.float32), mask=bad)
    return pa.table({field.name: columns[field.name] for field in schema()})


def _mix(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """SplitMix64: distinct numbers become distinct, random-looking ones."""
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(27))


def _hex(words_NW: NDArray[np.uint64]) -> pa.Array:
    """Rows of 64-bit words as strings of 16 hex digits a word."""
    raw = np.ascontiguousarray(words_NW).view(np.uint8)
    digits = np.stack([HEX[raw >> 4], HEX[raw & 15]], axis=-1).reshape(len(raw), -1)
    offsets = np.arange(0, digits.size + 1, digits.shape[1], dtype=np.int32)
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(digits.tobytes()))
