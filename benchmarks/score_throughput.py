"""Does `zscore score` keep the engine fed?

Pictures a second of `zscore score` on shards of 1024² JPEGs, against the same vLLM engine fed with the same prompts
prepared beforehand in memory (no tar, no decoding, no parquet). The body is sized so that the engine takes 50 to
100 ms a picture. Both sides run in turn, each in a process of its own; loading the model is left out on both.

    python benchmarks/score_throughput.py [--pairs 5] [--pictures 96]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import report  # type: ignore[import-not-found]

MAX_PIXELS = 512 * 512
# The demo student's shapes with more layers; the table says what that comes to a picture.
TEXT = {"num_hidden_layers": 8, "full_attention_interval": 2}
RUBRIC = """
name = "bench"
levels = [{token = "1", value = 1.0}, {token = "2", value = 2.0}, {token = "3", value = 3.0}]
text = {prompt = "{prompt}\\n", scale = "1 to 3.\\n", question = "{title}: {question}\\n", anchor = ""}
layouts = {separate = {probe = "Score: "}, joint = {probe = "{title}: ", between = "\\n"}}
dimensions = [
  {name = "alignment", title = "Alignment", question = "?", anchors = {}},
  {name = "realism", title = "Realism", question = "?", anchors = {}},
  {name = "aesthetics", title = "Aesthetics", question = "?", anchors = {}},
  {name = "plausibility", title = "Plausibility", question = "?", anchors = {}},
]
"""


def write_inputs(folder: Path, pictures: int, per_shard: int = 32, *, text_only: int = 0) -> None:
    """Shards of smooth noise, about 370 kB a JPEG, like a generated picture; and text without a picture beside each."""
    import numpy as np
    import webdataset
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    for start in range(0, pictures, per_shard):
        path = folder / "shards" / f"{start // per_shard:05d}.tar"
        with path.open("wb") as stream, webdataset.TarWriter(stream) as writer:
            for number in range(start, min(start + per_shard, pictures)):
                coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                fine = rng.normal(0, 5, (1024, 1024, 1))
                smooth = np.asarray(coarse.resize((1024, 1024), Image.Resampling.BICUBIC), dtype=np.float64)
                jpeg = io.BytesIO()
                Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
                writer.write({"__key__": f"{number:06d}", "jpg": jpeg.getvalue(), "txt": f"noise number {number}"})
                for extra in range(text_only):
                    writer.write({"__key__": f"{number:06d}-{extra}", "txt": f"no picture {number} {extra} " * 50})


def judge_of(folder: Path) -> Any:
    """The judge that both sides use."""
    from zscore.judge import JudgeOptions, plan_judge

    options = JudgeOptions(
        model=str(folder / "student"), engine="vllm", rubric=str(folder / "bench.toml"), max_pixels=MAX_PIXELS
    )
    return plan_judge(options)


def run_score(folder: Path) -> dict[str, float]:
    """`zscore score`; the clock runs from the engine being ready to the committed file, less the engine's shutdown."""
    from zscore.progress import QuietReporter
    from zscore.score import ScoreOptions, score

    judge = judge_of(folder)
    started: list[float] = []
    closing: list[float] = []

    class Loaded:
        def __getattr__(self, name: str) -> Any:
            return getattr(judge, name)

        def engine(self) -> Any:
            engine = judge.engine()
            close = engine.close

            def timed_close() -> None:
                before = time.perf_counter()
                close()
                closing.append(time.perf_counter() - before)

            engine.close = timed_close
            started.append(time.perf_counter())
            return engine

    with tempfile.TemporaryDirectory() as out:
        options = ScoreOptions(inputs=(str(folder / "shards"),), out=f"{out}/scores.parquet")
        summary = score(options, Loaded(), QuietReporter())  # type: ignore[arg-type]
        return {"pictures": summary.rows, "seconds": time.perf_counter() - started[0] - closing[0]}


def run_prepared(folder: Path) -> dict[str, float]:
    """The engine alone, on prompts that are ready in memory."""
    from zscore import images
    from zscore.records import Pixels
    from zscore.samples import read_samples
    from zscore.shards import expand

    judge = judge_of(folder)
    prompts = []
    for shard in expand([str(folder / "shards")]):
        for sample in read_samples(shard):
            pixels = images.load(sample.image, judge.pixels)
            assert isinstance(pixels, Pixels)
            built = judge.builder.build(sample.prompt, pixels)
            assert isinstance(built, list)
            prompts += built
    engine = judge.engine()
    started = time.perf_counter()
    inside = finished = 0
    for tag, prompt in enumerate(prompts):
        engine.submit(tag, prompt)
        inside += 1
        while inside >= engine.max_in_flight:
            done = len(engine.step())
            inside, finished = inside - done, finished + done
    while inside:
        done = len(engine.step())
        inside, finished = inside - done, finished + done
    return {"pictures": finished, "seconds": time.perf_counter() - started}


def child(side: str, folder: Path) -> float:
    """Pictures a second of one side, measured in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return float(result["pictures"] / result["seconds"])


def main() -> None:
    """Run pairs and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--side", choices=["score", "prepared"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"score": run_score, "prepared": run_prepared}[options.side](options.folder)))
        return
    from zscore.demo.student import build_student

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_student(folder / "student", text=TEXT)
        (folder / "bench.toml").write_text(RUBRIC)
        write_inputs(folder, options.pictures)
        pairs = []
        for _ in range(options.pairs):
            pairs.append((child("prepared", folder), child("score", folder)))
            print(f"prepared {pairs[-1][0]:.2f}/s  score {pairs[-1][1]:.2f}/s", flush=True)
    ratios = [score / prepared for prepared, score in pairs]
    report(
        "score_throughput",
        {
            "pictures": options.pictures,
            "picture": "1024x1024 JPEG",
            "image_tokens": MAX_PIXELS // 1024,
            "body": TEXT,
            "prepared_pictures_per_s": [round(prepared, 3) for prepared, _ in pairs],
            "score_pictures_per_s": [round(score, 3) for _, score in pairs],
            "engine_ms_a_picture": round(1000 / statistics.median(prepared for prepared, _ in pairs), 1),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "wanted": "ratio_median >= 0.85 at 50 to 100 ms a picture",
        },
    )


if __name__ == "__main__":
    main()
