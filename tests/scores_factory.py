"""Makes scores files for tests, through the same code that `zscore score` writes with.

write_scores(tmp_path / "scores.parquet", [row(0, group="g"), row(1, means=[4, 3, 2, 5])])
write_scores(path, random_rows(seed=0, rows=100, groups=20))
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zscore.parquet import TableWriter, read_metadata, rows_to_table, score_schema
from zscore.records import LevelScores, ScoreRow, Status
from zscore.rubrics.rubric import Rubric, load_rubric, parse_rubric
from zscore.tables import Scores

TWO = """
name = "two"
overall = "mean"
levels = [{token = "1", value = 1.0}, {token = "2", value = 2.0}, {token = "3", value = 4.0}]
[text]
prompt = "{prompt}"
scale = ""
question = "{title} {question}{anchors}"
anchor = ""
[layouts.separate]
probe = ": "
[layouts.joint]
probe = "{title}: "
between = " "
[[dimensions]]
name = "left"
title = "L"
question = "l"
anchors = {}
[[dimensions]]
name = "right"
title = "R"
question = "r"
anchors = {}
"""


@cache
def z_reward() -> Rubric:
    """Four dimensions, nine levels from 1 to 5."""
    return load_rubric("z-reward")


@cache
def two() -> Rubric:
    """Dimensions `left` and `right`, three levels: 1, 2 and 4."""
    return parse_rubric(TWO)


def scores_of(probs: Any, rubric: Rubric | None = None) -> LevelScores:
    """Scores whose mean, std and entropy follow from distributions of shape (D, K)."""
    values = np.asarray((rubric or z_reward()).values, dtype=np.float64)
    probs_DK = np.asarray(probs, dtype=np.float64)
    mean = probs_DK @ values
    std = np.sqrt(np.maximum(probs_DK @ values**2 - mean**2, 0))
    entropy = -(probs_DK * np.log(np.maximum(probs_DK, 1e-300))).sum(axis=1)
    return LevelScores(*(array.astype(np.float32) for array in (probs_DK, mean, std, entropy)))


def scores_with_means(means: Any, rubric: Rubric | None = None) -> LevelScores:
    """Scores with these means, on the two levels that enclose each; a NaN mean stays NaN, one beyond is kept."""
    rubric = rubric or z_reward()
    values = np.asarray(rubric.values)
    probs = np.zeros((len(rubric.names), len(values)))
    wanted = np.broadcast_to(np.asarray(means, dtype=np.float64), len(rubric.names))
    for d, mean in enumerate(np.nan_to_num(np.clip(wanted, values[0], values[-1]), nan=values[0])):
        low = min(int(np.searchsorted(values, mean, side="right")) - 1, len(values) - 2)
        share = (mean - values[low]) / (values[low + 1] - values[low])
        probs[d, low : low + 2] = 1 - share, share
    made = scores_of(probs, rubric)
    return LevelScores(made.probs_DK, wanted.astype(np.float32), made.std_D, made.entropy_D)


def row(
    number: int = 0, *, means: Any = 3.0, probs: Any = None, rubric: Rubric | None = None, **fields: Any
) -> ScoreRow:
    """One row; `means` is a number or one a dimension, `probs` (D, K) wins over it, `fields` over all else.

    Give `status` something other than ok and the row has no scores.
    """
    status = Status(fields.pop("status", Status.OK))
    scores = scores_with_means(means, rubric) if probs is None else scores_of(probs, rubric)
    made: dict[str, Any] = {
        "shard": "s-0000.tar",
        "index": number,
        "key": f"k{number:05d}",
        "prompt": f"prompt {fields.get('group', 'g0')}",
        "group": "g0",
        "status": status,
        "error": None if status is Status.OK else "what was wrong with it",
        "width": 64,
        "height": 48,
        "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        "scores": scores if status is Status.OK else None,
    }
    return ScoreRow(**{**made, **fields})


def random_rows(
    seed: int = 0, *, rows: int = 100, groups: int = 20, failed: float = 0.05, rubric: Rubric | None = None
) -> list[ScoreRow]:
    """Rows of ten a shard whose groups are scattered over shards; some failed, some pictures twice."""
    rubric = rubric or z_reward()
    random = np.random.default_rng(seed)
    made = []
    for number in range(rows):
        probs = random.dirichlet(np.full(len(rubric.values), 0.7), len(rubric.names))
        picture = number if random.random() > 0.1 else int(random.integers(0, number + 1))
        made.append(
            row(
                number,
                probs=probs,
                rubric=rubric,
                shard=f"s-{number // 10:04d}.tar",
                index=number % 10,
                group=f"g{random.integers(0, groups)}",
                sha256=hashlib.sha256(str(picture).encode()).hexdigest(),
                status=Status.BAD_IMAGE if random.random() < failed else Status.OK,
            )
        )
    return made


def metadata_of(rows: list[ScoreRow], rubric: Rubric | None = None, **changes: Any) -> dict[str, Any]:
    """What `zscore score` writes into the footer; `changes` replace whole entries."""
    rubric = rubric or z_reward()
    counts: dict[str, int] = {}
    for made in rows:
        counts[str(made.status)] = counts.get(str(made.status), 0) + 1
    return {
        "version": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
        "rubric": {
            "name": rubric.name,
            "hash": rubric.hash,
            "source": rubric.source,
            "dimensions": list(rubric.names),
            "levels": [{"token": level.token, "value": level.value} for level in rubric.levels],
        },
        "layout": "joint",
        "model": {"id": "made-up", "weights": "0" * 64},
        "engine": {"name": "transformers", "version": "5", "dtype": "float32"},
        "max_pixels": 1_048_576,
        "template": "1" * 64,
        "options": {},
        "shards": len({made.shard for made in rows}),
        "counts": counts,
        **changes,
    }


def write_scores(
    path: Path,
    rows: list[ScoreRow],
    rubric: Rubric | None = None,
    *,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a scores file; `extra` adds columns, `changes` go into the metadata."""
    rubric = rubric or z_reward()
    table = rows_to_table(rows, rubric)
    for name, values in (extra or {}).items():
        table = table.append_column(name, [values])
    schema = table.schema if extra else score_schema(rubric.names, len(rubric.levels))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as sink, TableWriter(sink, schema) as writer:
        writer.write(table)
        writer.close(metadata_of(rows, rubric, **changes))
    return path


def rewrite(table: pa.Table, path: Path, metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a table that was changed by hand, with the metadata of a scores file; `options` go to pyarrow."""
    text = json.dumps(metadata or metadata_of([]))
    pq.write_table(table.replace_schema_metadata({"zscore": text}), path, **options)
    return path


def spoil(path: Path, gaps: list[tuple[int, str, float | None]]) -> Path:
    """Put null, NaN or infinity into a file: (row, column, value); in a distribution the first level gets the number.

    Rows that the file doesn't have, or that have no scores, stay as they are.
    """
    table, metadata = pq.read_table(path), metadata_in(path)
    for number, column, value in gaps:
        values = table[column].to_pylist()
        if number >= len(values) or values[number] is None:
            continue
        is_list = isinstance(values[number], list) and value is not None
        values[number] = [value, *values[number][1:]] if is_list else value
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, pa.array(values, type=table.schema.field(column).type))
    return rewrite(table, path, metadata)


def blank(path: Path, column: str, numbers: Iterable[int]) -> Path:
    """Put null into a column of these rows, whatever its type, as tools that don't keep our schema may."""
    table, metadata = pq.read_table(path), metadata_in(path)
    values, numbers = table[column].to_pylist(), set(numbers)
    kind = table.schema.field(column).type
    holed = pa.array([None if n in numbers else value for n, value in enumerate(values)], type=kind)
    table = table.set_column(table.schema.get_field_index(column), pa.field(column, kind), holed)
    return rewrite(table, path, metadata)


def write_parts(folder: Path, rows: list[ScoreRow], rubric: Rubric | None = None, **changes: Any) -> Path:
    """Write a folder that holds one part a shard, as `zscore score --out DIR/` does."""
    for shard in dict.fromkeys(made.shard for made in rows):
        part = {"shard": {"name": shard}, "counts": {}, "attempt": "a"}
        name = (
            f"{shard.replace('/', '_').removesuffix('.tar')}-{hashlib.sha256(shard.encode()).hexdigest()[:12]}.parquet"
        )
        of_shard = [made for made in rows if made.shard == shard]
        write_scores(folder / name, of_shard, rubric, part=part, **changes)
    (folder / "run.json").write_text("{}")
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows as dicts."""
    return pq.read_table(path).to_pylist()


def metadata_in(path: Path) -> dict[str, Any]:
    """The zscore metadata of a file."""
    return read_metadata(path, str(path))


def zscore(*arguments: object) -> int:
    """Exit code of one call of the command line, in this process."""
    from zscore.cli.app import build_app
    from zscore.cli.run import run

    with patch.object(sys, "argv", ["zscore", *map(str, arguments)]):
        return run(build_app())


def without(scores: Scores, *columns: str) -> Scores:
    """The same table, as a file that lacks these columns would be opened."""
    frame = scores.frame.drop(columns)
    return replace(scores, frame=frame, schema=frame.collect_schema(), numbered=scores.numbered.drop(columns))
