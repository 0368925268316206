"""Decode + resize + patch on 1024² JPEGs: zscore against Pillow and transformers' image processor (PIL back end).

python benchmarks/decode.py [--rounds 30] [--pool 500]

Both ways take the same file by turns in one process and one thread, and their pixels are checked to be equal before.
Times are CPU seconds of the thread, medians over the rounds, so that a busy machine changes them little. Then the
worker processes are fed with `--pool` pictures: pictures a second, the parent's CPU time, the workers' memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: one thread against one thread

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from zscore import images
from zscore.patches import PixelOptions, patchify
from zscore.records import Pixels
from zscore.workers import DecodePool

if TYPE_CHECKING:
    from collections.abc import Callable

EDGE = 1024
RESULT = Path(__file__).parent / "results" / "decode.json"
BUDGETS = {"1024² as it is": 1024 * 1024, "1024² to 512²": 512 * 512}


def photo(seed: int) -> bytes:
    """Make a JPEG of the size and the bytes of a text-to-image picture: soft shapes and some grain, quality 90."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)).resize(
        (EDGE, EDGE), Image.Resampling.BICUBIC
    )
    grain = random.normal(0, 9, (EDGE, EDGE, 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def transformers_way(options: PixelOptions) -> Callable[[bytes], Any]:
    """Pillow, then the processor as a checkpoint configures it."""
    from zscore._torchvision import ensure_importable

    ensure_importable()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=options.patch,
        merge_size=options.merge,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return lambda data: processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="np")


def assert_equal(pixels: Pixels, theirs: dict[str, Any]) -> None:
    """Hold our uint8 patches to their floats, bit for bit."""
    scaled = (pixels.patches_NCPP.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    doubled = np.repeat(scaled[:, :, None], 2, axis=2).reshape(len(scaled), -1)
    assert np.array_equal(doubled, theirs["pixel_values"])


def cpu_ms(call: Callable[[], object]) -> float:
    """CPU time of one call in this thread."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def compare(files: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """Both ways by turns on the same files, for each image budget."""
    found = {}
    for name, budget in BUDGETS.items():
        options = PixelOptions(max_pixels=budget)
        theirs = transformers_way(options)
        pixels = images.load(files[0], options)
        assert isinstance(pixels, Pixels)
        assert_equal(pixels, theirs(files[0]))
        ours_ms, theirs_ms = [], []
        for turn in range(rounds + 2):
            data = files[turn % len(files)]
            pair = cpu_ms(lambda: images.load(data, options)), cpu_ms(lambda: theirs(data))  # noqa: B023  called at once
            if turn >= 2:  # the first two warm both up
                ours_ms.append(pair[0])
                theirs_ms.append(pair[1])
        ours, other = statistics.median(ours_ms), statistics.median(theirs_ms)
        found[name] = {
            "zscore_ms": round(ours, 2),
            "transformers_ms": round(other, 2),
            "zscore_per_s": round(1e3 / ours, 1),
            "transformers_per_s": round(1e3 / other, 1),
            "ratio": round(statistics.median(b / a for a, b in zip(ours_ms, theirs_ms, strict=True)), 2),
        }
    return found


def parts(files: list[bytes], rounds: int) -> dict[str, float]:
    """CPU milliseconds of the steps."""
    options = PixelOptions()
    rgb = images.decode(files[0], options)
    assert isinstance(rgb, np.ndarray)
    resize = Image.fromarray(rgb)
    steps: dict[str, Callable[[bytes], object]] = {
        "decode": lambda data: images.decode(data, options),
        "decode with Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "resize to 512² (Pillow)": lambda _: resize.resize((512, 512), Image.Resampling.BICUBIC),
        "patch": lambda _: patchify(rgb, options),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            data = files[turn % len(files)]
            times[name].append(cpu_ms(lambda: step(data)))  # noqa: B023  called at once
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def status_mb(pid: int, field: str) -> float:
    """Read a line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024, 1)


def worker_cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in user and system mode."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def run_pool(files: list[bytes], count: int, workers: int) -> dict[str, Any]:
    """Feed `count` pictures to worker processes."""
    with DecodePool(PixelOptions(), workers=workers) as pool:
        for _ in range(pool.capacity):
            pool.submit(0, files[0])
        warm = 0
        while warm < pool.capacity:
            warm += len(pool.results(None))
        first_mb = max(status_mb(pid, "VmRSS") for pid in pool.pids)
        busy_before = sum(worker_cpu_s(pid) for pid in pool.pids)
        wall, cpu, sent, done = time.perf_counter(), time.thread_time(), 0, 0
        while done < count:
            while sent < count and pool.in_flight < pool.capacity:
                pool.submit(sent, files[sent % len(files)])
                sent += 1
            done += len(pool.results(None))
        return {
            "workers": workers,
            "pictures": count,
            "per_s": round(count / (time.perf_counter() - wall), 1),
            "worker_cpu_ms": round((sum(worker_cpu_s(pid) for pid in pool.pids) - busy_before) * 1e3 / count, 2),
            "parent_cpu_ms": round((time.thread_time() - cpu) * 1e3 / count, 2),
            "worker_rss_mb_at_start": first_mb,
            "worker_rss_mb_after": max(status_mb(pid, "VmRSS") for pid in pool.pids),
            "worker_private_mb_after": max(status_mb(pid, "RssAnon") for pid in pool.pids),
        }


def machine() -> dict[str, Any]:
    """Say what this ran on."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(": ")[2],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "pillow", "simplejpeg", "transformers")},
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pool", type=int, default=500)
    arguments = parser.parse_args()
    load = round(os.getloadavg()[0], 1)  # other work on the machine: it slows the pool, and CPU times a little
    files = [photo(seed) for seed in range(8)]
    compared = compare(files, arguments.rounds)
    table = Table("picture", "zscore ms", "Pillow + transformers ms", "pictures/s", "ratio")
    for name, row in compared.items():
        table.add_row(
            name,
            f"{row['zscore_ms']}",
            f"{row['transformers_ms']}",
            f"{row['zscore_per_s']} / {row['transformers_per_s']}",
            f"{row['ratio']}",
        )
    Console().print(table)
    result = {
        "command": " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "machine": machine(),
        "load_before": load,
        "file_kb": round(statistics.mean(len(data) for data in files) / 1024),
        "one_core": compared,
        "steps_ms": parts(files, arguments.rounds),
        "pool": [run_pool(files, arguments.pool, workers) for workers in (1, 2)],
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    Console().print_json(data=result)


if __name__ == "__main__":
    main()
