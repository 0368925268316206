"""How fast are kept samples copied into new shards?

Shards of 300 kB pictures (a 1024² JPEG) with a JSON and a text each, a quarter of the samples kept at random. Three
sides, in turn, from a warm page cache: `zscore.reshard`, Python's tarfile doing the same copy, and `cp` of the very
shards that reshard wrote (none of them synced; `cp` with `sync` beside them). Imports and the start of Python are left
out on all sides, opening the kept table is in.

    python benchmarks/reshard.py [--pairs 5] [--shards 8] [--samples 1000]
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _common import report  # type: ignore[import-not-found]

from tests.scores_factory import row, write_scores
from zscore.reshard import ReshardOptions, reshard
from zscore.tables import open_scores

if TYPE_CHECKING:
    from zscore.records import ScoreRow

PICTURE_BYTES = (200_000, 400_000)
KEPT = 0.25
# Several shards, as in a real job.
SHARD_SIZE = "100MB"


def write_shards(folder: Path, shards: int, samples: int) -> list[ScoreRow]:
    """Source shards; returns the rows that are kept."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(1 << 22)
    kept = []
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(samples):
                key = f"{number:05d}{index:04d}"
                start, size = rng.integers(0, 1 << 21), rng.integers(*PICTURE_BYTES)
                for suffix, data in (
                    ("jpg", noise[start : start + size]),
                    ("json", b'{"prompt": "a photo of sample %d"}' % index),
                    ("txt", b"a photo of sample %d" % index),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                if rng.random() < KEPT:
                    kept.append(row(index, shard=f"{number:05d}.tar", key=key))
    return kept


def by_reshard(folder: Path) -> float:
    """Seconds of the function behind `zscore reshard`."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    options = ReshardOptions(shards=(str(folder / "src"),), out=str(out), shard_size=SHARD_SIZE)
    reshard(open_scores(str(folder / "kept.parquet")), options)
    return time.perf_counter() - started


def by_tarfile(folder: Path, kept: set[str]) -> float:
    """Seconds of the same copy with Python's tarfile, streaming both sides."""
    target = folder / "tarfile.tar"
    target.unlink(missing_ok=True)
    started = time.perf_counter()
    with tarfile.open(target, "w") as out:
        for path in sorted((folder / "src").glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.partition(".")[0] in kept:
                        out.addfile(member, tar.extractfile(member))
    return time.perf_counter() - started


def by_cp(folder: Path, *, sync: bool) -> float:
    """Seconds of `cp` of what reshard wrote."""
    target = folder / "cp"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    files = sorted(str(path) for path in (folder / "out").glob("*.tar"))
    started = time.perf_counter()
    subprocess.run(["cp", *files, str(target)], check=True)
    if sync:
        subprocess.run(["sync", *(str(path) for path in target.iterdir())], check=True)
    return time.perf_counter() - started


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], int, int]:
    """Seconds by side, kept samples and written bytes."""
    seconds: dict[str, list[float]] = {"reshard": [], "tarfile": [], "cp": [], "cp_and_sync": []}
    (folder / "src").mkdir()
    kept = write_shards(folder / "src", options.shards, options.samples)
    write_scores(folder / "kept.parquet", kept)
    subprocess.run(["sync"], check=True)
    by_reshard(folder)  # imports and page cache
    for _ in range(options.pairs):
        seconds["tarfile"].append(by_tarfile(folder, {one.key for one in kept}))
        seconds["reshard"].append(by_reshard(folder))
        seconds["cp"].append(by_cp(folder, sync=False))
        seconds["cp_and_sync"].append(by_cp(folder, sync=True))
        print("  ".join(f"{side} {values[-1]:.3f} s" for side, values in seconds.items()), flush=True)
    return seconds, len(kept), sum(path.stat().st_size for path in (folder / "out").glob("*.tar"))


def main() -> None:
    """Run pairs and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1000, help="of one shard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seconds, kept, written = measure(Path(name), options)
    total = options.shards * options.samples
    ratios = {
        side: [other / own for other, own in zip(seconds[side], seconds["reshard"], strict=True)]
        for side in ("tarfile", "cp", "cp_and_sync")
    }
    own = statistics.median(seconds["reshard"])
    report(
        "reshard",
        {
            "source_samples": total,
            "picture_bytes": PICTURE_BYTES,
            "shard_size": SHARD_SIZE,
            "kept_samples": kept,
            "written_bytes": written,
            "seconds": {side: [round(value, 3) for value in values] for side, values in seconds.items()},
            "source_samples_per_s": round(total / own),
            "written_mb_per_s": round(written / own / 1e6),
            "speed_relative_to": {
                side: {"median": round(statistics.median(values), 3), "min": round(min(values), 3)}
                for side, values in ratios.items()
            },
            "wanted": "relative to tarfile >= 5, to cp >= 0.5 (medians)",
        },
    )


if __name__ == "__main__":
    main()
