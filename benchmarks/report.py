"""How long does `zscore report` take over a million rows, and how large is the page?

A table of every column that `zscore score` writes (four dimensions, nine levels, groups of eight, 2 % failed), and
shards of 1,000 samples whose shown pictures are 1024² JPEGs. The command runs as a process, so Python's start
and the imports are in. A page with texts alone, then one with thumbnails, in turn; peak memory is the process's own.

    python benchmarks/report.py [--rows 1000000] [--runs 3]
"""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from _common import report  # type: ignore[import-not-found]
from PIL import Image

from zscore.parquet import TableWriter, score_schema
from zscore.rubrics.rubric import load_rubric

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD = 1000
GROUP = 8
EDGE = 1024
PLACE = re.compile(r"<bdi>(\d{6})\.tar, sample (\d+)</bdi>")


def picture() -> bytes:
    """A JPEG of 1024² that looks like a photo to a codec: smooth noise."""
    noise_HWC = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise_HWC).resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def chunk(rng: np.random.Generator, row: NDArray[np.int64], values: NDArray[np.float64]) -> pa.Table:
    """Some rows as `zscore score` would write them."""
    names, n = load_rubric("z-reward").names, len(row)
    bad = rng.random(n) < 0.02
    shards, of_shard = np.unique(row // SHARD, return_inverse=True)
    columns: dict[str, Any] = {
        "shard": pa.DictionaryArray.from_arrays(of_shard.astype(np.int32), [f"{s:06d}.tar" for s in shards.tolist()]),
        "index": pa.array((row % SHARD).astype(np.int32)),
        "key": pa.array([f"{r:09d}" for r in row.tolist()]),
        "prompt": pa.array(
            [f"a photo of a cat beside a house with a red door, number {r // GROUP}" for r in row.tolist()]
        ),
        "group": pa.array([f"{r // GROUP * 0x9E3779B97F4A7C15 % 2**64:016x}" for r in row.tolist()]),
        "status": pa.DictionaryArray.from_arrays(pa.array(bad.astype(np.int8)), ["ok", "bad_image"]),
        "error": pa.array(np.full(n, "cannot identify image file"), mask=~bad),
        "width": pa.array(np.full(n, EDGE, np.int32)),
        "height": pa.array(np.full(n, EDGE, np.int32)),
        # All shown pictures have the same bytes, of which a gallery would show one.
        "sha256": pa.array([None] * n, pa.string()),
    }
    means = []
    for name in names:
        centre = 1 + 4 * rng.beta(4, 2.5, (n, 1))
        probs_NK = np.exp(-0.5 * ((values - centre) / rng.uniform(0.25, 1.0, (n, 1))) ** 2)
        probs_NK /= probs_NK.sum(axis=1, keepdims=True)
        mean = probs_NK @ values
        std = np.sqrt(np.maximum(probs_NK @ values**2 - mean**2, 0))
        entropy = -(probs_NK * np.log(np.maximum(probs_NK, 1e-30))).sum(axis=1)
        means.append(mean)
        for suffix, array in (("", mean), ("_std", std), ("_entropy", entropy)):
            columns[name + suffix] = pa.array(array.astype(np.float32), mask=bad)
        flat = probs_NK.astype(np.float32).ravel()
        columns[f"{name}_probs"] = pa.FixedSizeListArray.from_arrays(flat, len(values), mask=pa.array(bad))
    columns["overall"] = pa.array(np.mean(means, axis=0).astype(np.float32), mask=bad)
    schema = score_schema(names, len(values))
    return pa.table({field.name: columns[field.name] for field in schema}, schema=schema)


def write_table(path: Path, rows: int) -> None:
    """The table."""
    rubric, rng = load_rubric("z-reward"), np.random.default_rng(0)
    values = np.asarray(rubric.values)
    levels = [{"token": level.token, "value": level.value} for level in rubric.levels]
    described = {"name": rubric.name, "hash": rubric.hash, "source": rubric.source, "dimensions": list(rubric.names)}
    schema = score_schema(rubric.names, len(values))
    with path.open("wb") as sink, TableWriter(sink, schema) as writer:
        for start in range(0, rows, 65_536):
            writer.write(chunk(rng, np.arange(start, min(start + 65_536, rows)), values))
        writer.close(
            {"version": "0", "rubric": {**described, "levels": levels}, "model": {"id": "made", "weights": "up"}}
        )


def write_shards(folder: Path, page: str) -> int:
    """The shards that a page speaks of: a picture where it shows one, a byte of text elsewhere. Returns how many."""
    wanted = {(int(shard), int(index)) for shard, index in PLACE.findall(page)}
    data = picture()
    for shard in {shard for shard, _ in wanted}:
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for index in range(SHARD):
                shown = (shard, index) in wanted
                for suffix, content in ((("jpg", data),) if shown else ()) + (("txt", b"t"),):
                    info = tarfile.TarInfo(f"{shard * SHARD + index:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return len(wanted)


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of one `zscore report`."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "zscore", "report", *arguments, "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"zscore report {' '.join(arguments)} failed: {status}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        table, page = folder / "scores.parquet", folder / "report.html"
        write_table(table, options.rows)
        texts = (str(table), "--out", str(page))
        run(*texts)  # page cache, byte code
        shown = write_shards(folder / "shards", page.read_text())
        sides = {"texts": texts, "thumbnails": (*texts, "--shards", str(folder / "shards"))}
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        sizes = {}
        for _ in range(options.runs):
            for side, arguments in sides.items():
                found[side].append(run(*arguments))
                sizes[side] = page.stat().st_size
        text = page.read_text()
        if text.count("<image ") + text.count("<use ") < shown:
            raise SystemExit("some thumbnails are missing")
        table_size = table.stat().st_size
    report(
        "report",
        {
            "rows": options.rows,
            "table_mb": round(table_size / 1e6, 1),
            "pictures": shown,
            "seconds": {side: [round(seconds, 2) for seconds, _ in runs] for side, runs in found.items()},
            "median_s": {side: round(statistics.median(s for s, _ in runs), 2) for side, runs in found.items()},
            "peak_mb": {side: round(max(peak for _, peak in runs)) for side, runs in found.items()},
            "page_mb": {side: round(size / 1e6, 2) for side, size in sizes.items()},
            "wanted": "1 million rows in <= 30 s and <= 10 MB on 2 cores",
        },
    )


if __name__ == "__main__":
    main()
