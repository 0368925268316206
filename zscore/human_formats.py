"""Readers for the rating files of public text-to-image benchmarks, as their authors publish them.

Each gives the long table of `zscore.human`. The key is the picture's path up to the first dot of its file name, as
webdataset would name it; the join falls back to base names (see `zscore.matching`). Ranks become negative scores, so
that more is better everywhere.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import polars as pl

from zscore.errors import TableError, UsageError
from zscore.human import OVERALL, Ratings, cleaned, read_columns, read_table, read_text, rename_dimensions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

IMAGE_REWARD_DIMENSIONS = {
    "overall_rating": OVERALL,
    "image_text_alignment_rating": "alignment",
    "fidelity_rating": "fidelity",
}


def key_of(path: str) -> str:
    """The webdataset key of a file: its path up to the first dot of the file name."""
    folder, slash, name = path.replace("\\", "/").removeprefix("./").rpartition("/")
    return f"{folder}{slash}{name.split('.', 1)[0]}"


def read_hpdv2(source: str) -> Ratings:
    """HPDv2: a JSON list of prompts, their pictures ranked (`rank`, low is best) or compared (`human_preference`)."""
    rows = []
    for number, entry in enumerate(_entries(source)):
        paths = entry.get("image_path") or entry.get("file_path")
        scores = [-rank for rank in entry["rank"]] if "rank" in entry else entry["human_preference"]
        if paths is None or len(paths) != len(scores):
            raise TableError(f"{source}: entry {number} doesn't have one rank or preference per picture")
        rows += [
            _row(key=key_of(path), group=f"{number}", score=score) for path, score in zip(paths, scores, strict=True)
        ]
    return _ratings(rows, source, None)


def read_image_reward(source: str) -> Ratings:
    """ImageRewardDB's metadata (parquet or JSON): 1–7 ratings of three aspects a picture."""
    frame = _flat(source, ("image_path", "prompt_id", *IMAGE_REWARD_DIMENSIONS))
    rows = [
        _row(key=key_of(entry["image_path"]), group=entry["prompt_id"], dimension=name, score=entry[column])
        for entry in frame.iter_rows(named=True)
        for column, name in IMAGE_REWARD_DIMENSIONS.items()
    ]
    return _ratings(rows, source, (1, 7))


def read_pick_a_pic(source: str) -> Ratings:
    """Pick-a-Pic (parquet, or CSV of its columns): one vote between two pictures a row; a tie is 0.5 for each."""
    columns = ("ranking_id", "image_0_uid", "image_1_uid", "label_0", "label_1")
    frame = _flat(source, columns)
    rows = [
        # The comparison is the group: other votes on the same picture are about another pair.
        _row(key=entry[f"image_{side}_uid"], group=f"{entry['ranking_id']}", score=entry[f"label_{side}"])
        for entry in frame.iter_rows(named=True)
        if entry["image_0_uid"] != entry["image_1_uid"]  # a picture against itself tells nothing
        for side in (0, 1)
    ]
    return _ratings(rows, source, None)


def read_genai_bench(source: str) -> Ratings:
    """GenAI-Bench's `genai_image.json`: per prompt and generator, raters' 1–5 alignment; pictures are GENERATOR/ID."""
    data = _json(source)
    if not isinstance(data, dict):
        raise TableError(f"{source}: not GenAI-Bench's JSON object of prompts")
    rows = [
        _row(key=f"{model}/{prompt}", group=prompt, dimension="alignment", rater=f"{rater}", score=score)
        for prompt, entry in data.items()
        for model, scores in _field(entry, "models", source).items()
        for rater, score in enumerate(scores)
    ]
    return _ratings(rows, source, (1, 5))


def read_agiqa(source: str) -> Ratings:
    """AGIQA-3K's `data.csv`: mean opinion scores (0–5) of `quality` and `alignment` a picture."""
    frame = _flat(source, ("name", "prompt", "mos_quality", "mos_align"))
    rows = [
        _row(key=key_of(entry["name"]), group=entry["prompt"], dimension=name, score=entry[column])
        for entry in frame.iter_rows(named=True)
        for column, name in (("mos_quality", "quality"), ("mos_align", "alignment"))
    ]
    return _ratings(rows, source, (0, 5))


def read_evalmuse(source: str) -> Ratings:
    """EvalMuse's `train_list.json`: the raters' 1–5 alignment of each picture (`total_score`)."""
    rows = []
    for entry in _entries(source):
        scores = _field(entry, "total_score", source)
        rows += [
            _row(
                key=key_of(_field(entry, "img_path", source)),
                group=_field(entry, "prompt_id", source),
                dimension="alignment",
                rater=f"{rater}",
                score=score,
            )
            for rater, score in enumerate(scores if isinstance(scores, list) else [scores])
        ]
    return _ratings(rows, source, (1, 5))


def read_tifa160(source: str) -> Ratings:
    """TIFA-160 Likert annotations (CSV): five raters' 1–5 alignment; pictures are GENERATOR/PROMPT."""
    frame = _flat(source, ("t2i_model", "item_id", "worker_id", "answer"))
    rows = [
        _row(
            key=f"{entry['t2i_model']}/{entry['item_id']}",
            group=entry["item_id"],
            dimension="alignment",
            rater=entry["worker_id"],
            score=entry["answer"],
        )
        for entry in frame.iter_rows(named=True)
    ]
    return _ratings(rows, source, (1, 5))


FORMATS: dict[str, Callable[[str], Ratings]] = {
    "hpdv2": read_hpdv2,
    "imagereward": read_image_reward,
    "pickapic": read_pick_a_pic,
    "genai-bench": read_genai_bench,
    "agiqa-3k": read_agiqa,
    "evalmuse": read_evalmuse,
    "tifa160": read_tifa160,
}
TABLE = "table"


def read_human(
    source: str,
    dimensions: Sequence[str],
    *,
    layout: str = TABLE,
    columns: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> Ratings:
    """Ratings of any known format.

    Args:
        source: path or fsspec url.
        dimensions: of the scores, with `overall`.
        layout: `table`, or a name in `FORMATS`.
        columns: role → column, for `table` only.
        names: the file's dimension → the scores' dimension.

    Raises:
        UsageError: an unknown format, role or dimension.
        TableError: the file can't be read as what it is said to be.
    """
    names = names or {}
    if layout == TABLE:
        wide = [name for name in dimensions if name not in names.values()]
        ratings = read_table(source, columns or {}, [*wide, *names])
    elif layout not in FORMATS:
        raise UsageError(f"--format '{layout}' is none of {', '.join((TABLE, *FORMATS))}")
    elif columns:
        raise UsageError(f"--column says how to read a table; leave it out with --format {layout}")
    else:
        ratings = FORMATS[layout](source)
    return rename_dimensions(ratings, names)


def _row(*, key: str, score: Any, group: Any, dimension: str = OVERALL, rater: str | None = None) -> dict[str, Any]:
    return {"key": key, "group": group, "dimension": dimension, "rater": rater, "score": score}


def _ratings(rows: list[dict[str, Any]], source: str, scale: tuple[float, float] | None) -> Ratings:
    """Ratings on a scale, or ranks and votes where there is none."""
    schema = {"key": pl.String, "group": pl.String, "dimension": pl.String, "rater": pl.String}
    frame = pl.DataFrame(
        rows, schema=[*schema, "score"], schema_overrides=schema, strict=False, infer_schema_length=None
    )
    if frame.schema["score"] == pl.Null:
        frame = frame.with_columns(pl.col("score").cast(pl.Float64))
    return Ratings(cleaned(frame, source), relative=scale is None, source=source, scale=scale)


def _flat(source: str, columns: Sequence[str]) -> pl.DataFrame:
    """The named columns of a parquet, CSV or JSON file."""
    if PurePosixPath(source).suffix.lower() in {".json", ".jsonl"}:
        entries = _entries(source)
        return pl.DataFrame([{name: _field(entry, name, source) for name in columns} for entry in entries])
    frame = read_columns(source, columns)
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise TableError(f"{source} has no column '{missing[0]}', only {', '.join(frame.columns)}")
    return frame.select(columns)


def _entries(source: str) -> list[dict[str, Any]]:
    data = _json(source)
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise TableError(f"{source}: not a JSON list of objects")
    return data


def _json(source: str) -> Any:
    text = read_text(source)
    try:
        if source.lower().endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise TableError(f"{source}: not valid JSON: {error}") from error


def _field(entry: Mapping[str, Any], name: str, source: str) -> Any:
    if name not in entry:
        raise TableError(f"{source}: an entry has no '{name}', only {', '.join(entry)}")
    return entry[name]
