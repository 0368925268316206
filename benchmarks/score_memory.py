"""Does memory of `zscore score` depend on how much it scores?

Peak memory (PSS of the whole process tree, sampled every 20 ms) of `zscore score` at 1×, 4× and 16× the shards and
samples, and of the same vLLM engine alone, fed the same prompts from memory one at a time. Beside each picture lie
rows that fail (a prompt of 1 kB without a picture), which pass the engine by.

    python benchmarks/score_memory.py [--samples 60]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _common import report  # type: ignore[import-not-found]
from score_throughput import RUBRIC, judge_of, write_inputs  # type: ignore[import-not-found]

BASE_SHARDS = 4
ENGINE_PICTURES = 48
TEXT_ONLY = 20


def peak_mb(command: list[str]) -> float:
    """Highest sum of proportional set sizes over the process and its children, in MB (10^6 bytes)."""
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                continue
        peak = max(peak, total)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return peak / 1e6


def engine_alone(folder: Path) -> None:
    """Load the engine, score prompts that are made on the spot, and leave."""
    from zscore import images
    from zscore.records import Pixels
    from zscore.samples import read_samples
    from zscore.shards import expand

    judge = judge_of(folder)
    engine = judge.engine()
    shard = expand([str(folder / "1x" / "shards")])[0]
    pictures = [sample for sample in read_samples(shard) if sample.image] * ENGINE_PICTURES
    for tag, sample in enumerate(pictures[:ENGINE_PICTURES]):
        pixels = images.load(sample.image, judge.pixels)
        assert isinstance(pixels, Pixels)
        built = judge.builder.build(sample.prompt, pixels)
        assert isinstance(built, list)
        engine.submit(tag, built[0])
        while not engine.step():
            pass
    engine.close()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60, help="samples at 1×")
    parser.add_argument("--engine-alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine_alone:
        engine_alone(options.engine_alone)
        return
    from zscore.demo.student import build_student

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_student(folder / "student")
        (folder / "bench.toml").write_text(RUBRIC)
        peaks = {}
        for factor in (1, 4, 16):
            (folder / f"{factor}x").mkdir()
            write_inputs(
                folder / f"{factor}x", options.samples * factor, options.samples // BASE_SHARDS, text_only=TEXT_ONLY
            )
        engine = peak_mb([sys.executable, __file__, "--engine-alone", str(folder)])
        for factor in (1, 4, 16):
            score = ["score", str(folder / f"{factor}x" / "shards"), "--out", str(folder / f"{factor}.parquet")]
            model = ["--model", str(folder / "student"), "--rubric", str(folder / "bench.toml"), "--engine", "vllm"]
            settings = ["--max-pixels", str(512 * 512), "--max-failed", "1"]
            peaks[factor] = peak_mb([sys.executable, "-m", "zscore", *score, *model, *settings])
            print(f"{factor}×: {peaks[factor]:.0f} MB (engine alone {engine:.0f} MB)", flush=True)
    report(
        "score_memory",
        {
            "pictures": {f"{factor}x": options.samples * factor for factor in peaks},
            "failing_rows": {f"{factor}x": TEXT_ONLY * options.samples * factor for factor in peaks},
            "shards": {f"{factor}x": BASE_SHARDS * factor for factor in peaks},
            "peak_mb": {f"{factor}x": round(peak) for factor, peak in peaks.items()},
            "engine_alone_mb": round(engine),
            "above_engine_mb": {f"{factor}x": round(peak - engine) for factor, peak in peaks.items()},
            "growth_16x_over_1x": round(peaks[16] / peaks[1], 3),
            "wanted": "above_engine_mb < 400, no growth",
        },
    )


if __name__ == "__main__":
    main()
