"""How fast samples come out of shards: zscore against Python's tarfile and the webdataset library, paired in one run.

python benchmarks/tar_reading.py [--rounds 3] [--scale 1.0]

Samples a second of CPU time (user + system, one thread, shards in the page cache), median over rounds in which the
readers take turns. zscore and webdataset give samples (zscore's with their prompt and group); `tarfile` only reads
the members, without grouping them or parsing JSON, so it is ahead by that much.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import webdataset
from rich.console import Console
from rich.table import Table
from webdataset.tariterators import group_by_keys, tar_file_expander

from zscore.records import ShardRef
from zscore.samples import count_samples, read_samples

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "tar_reading.json"
# name → samples, bytes a picture, gzipped
CASES = {
    "tiny: 100 B": (10_000, 100, False),
    "256²: 20 kB": (2_500, 20_000, False),
    "1024²: 300 kB": (300, 300_000, False),
    "256², .tar.gz": (1_000, 20_000, True),
}


def zscore_samples(path: Path) -> int:
    """Samples as the tool reads them."""
    rows = 0
    for sample in read_samples(ShardRef(str(path), path.name, -1, "")):
        assert sample.failure is None
        rows += 1
    return rows


def zscore_count(path: Path) -> int:
    """What `--dry-run` does: headers only."""
    return count_samples(ShardRef(str(path), path.name, -1, ""))


def tarfile_members(path: Path) -> int:
    """All members' contents through the standard library."""
    members = 0
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            file.read()
            vars(tar)["members"] = []  # or it keeps every header
            members += 1
    return members // 2


def webdataset_samples(path: Path) -> int:
    """Samples through the library, undecoded."""
    with path.open("rb") as stream:
        return sum(1 for _ in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


READERS: dict[str, Callable[[Path], int]] = {
    "zscore": zscore_samples,
    "tarfile": tarfile_members,
    "webdataset": webdataset_samples,
    "zscore count": zscore_count,
}


def write_shard(path: Path, samples: int, size: int, *, zipped: bool) -> None:
    """A shard of `samples` pairs: noise as a picture, JSON as img2dataset writes it."""
    noise = random.Random(0)  # noqa: S311  # the same shard every time
    with path.open("wb") as plain, ExitStack() as stack:
        file = stack.enter_context(gzip.GzipFile(fileobj=plain, mode="wb", compresslevel=1)) if zipped else plain
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="w"))
        for index in range(samples):
            record = {"prompt": f"a picture of thing number {index} in the style of nobody", "seed": index}
            for suffix, data in (("jpg", noise.randbytes(size)), ("json", json.dumps(record).encode())):
                info = tarfile.TarInfo(f"{index:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def measure(path: Path, samples: int, rounds: int) -> dict[str, float]:
    """Median samples per CPU second of every reader."""
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    for turn in range(rounds + 1):
        for name, reader in READERS.items():
            start = time.process_time()
            assert reader(path) == samples, name
            if turn:  # the first one warms the page cache
                rates[name].append(samples / (time.process_time() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def hardware() -> dict[str, object]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "webdataset": webdataset.__version__,
        "system": platform.platform(),
    }


def main() -> None:
    """Measures all cases, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of samples")
    arguments = parser.parse_args()
    results = {}
    table = Table("shard", *READERS, "× tarfile", "× webdataset", title="samples per CPU second")
    for name, (full, size, zipped) in CASES.items():
        samples = max(10, int(full * arguments.scale))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("shard.tar.gz" if zipped else "shard.tar")
            write_shard(path, samples, size, zipped=zipped)
            rates = measure(path, samples, arguments.rounds)
        ratios = {other: round(rates["zscore"] / rates[other], 2) for other in ("tarfile", "webdataset")}
        results[name] = {"samples": samples, "picture_bytes": size, "gzip": zipped, "rates": rates, "ratios": ratios}
        table.add_row(
            name, *(f"{rate:,.0f}" for rate in rates.values()), *(f"{ratio:.1f}" for ratio in ratios.values())
        )
    Console().print(table)
    command = " ".join(["python", "benchmarks/tar_reading.py", *sys.argv[1:]])
    record = {"command": command, "unit": "samples per CPU second", "hardware": hardware(), "results": results}
    RESULT.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
