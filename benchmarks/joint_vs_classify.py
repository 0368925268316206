"""One joint prompt a picture through our engine, against four prompts through vLLM's own `LLM.classify`.

Both score the same pictures, on the same body, from decoded RGB, with the same rubric: ours cuts its patches and reads
four probes in one prefill; the other runs vLLM's image path and its conversion to a classifier, with the prefix cache
and the multimodal cache on. Each lives in a process of its own, and rounds alternate; every round has pictures of its
own, so that nothing carries over. The body and the short rubric are those of score_throughput.py; the z-reward rubric
puts some 480 tokens around a picture.

What bounds the ratio is in the figures: the tokens that each side computes for a picture. Separate prompts longer than
a block of the prefix cache (some 500 tokens here as in the 9B: a recurrent state is as large as the keys and values of
so many) share their first blocks, and compute less than four times as much.

    python benchmarks/joint_vs_classify.py [--edges 512 640 1024] [--pictures 8] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _common import report
from score_throughput import RUBRIC, TEXT

from zscore.patches import PixelOptions, cut
from zscore.records import EnginePrompt, Failure, Pixels
from zscore.rubrics.rubric import Rubric, load_rubric
from zscore.templates import PromptBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = "a photo of a red cat and a blue dog on a green table in the kitchen, soft light, number {}"
LONGEST = 4096


def pictures(count: int, edge: int, seed: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Noise over gradients: no two alike, none that a cache has seen."""
    rng = np.random.default_rng(seed)
    ramp = np.arange(edge * edge * 3, dtype=np.uint32).reshape(edge, edge, 3) * 40_503 >> 8
    return [(ramp + rng.integers(0, 64, (edge, edge, 3), np.uint32)).astype(np.uint8) for _ in range(count)]


def builder(model: Path, rubric: Rubric, layout: Any) -> PromptBuilder:
    """Prompts of a rubric."""
    return PromptBuilder(model, rubric, layout, merge=2, max_tokens=LONGEST)


def built(prompts: PromptBuilder, text: str, pixels: Pixels) -> list[EnginePrompt]:
    """The prompts of one picture."""
    found = prompts.build(text, pixels)
    assert not isinstance(found, Failure), found.error
    return found


def joint(model: Path, rubric: Rubric) -> Callable[[list[Any], int], int]:
    """Our engine; scores pictures and returns how many tokens it had to compute."""
    from zscore.engines.vllm import VllmConfig, VllmEngine

    prompts = builder(model, rubric, "joint")
    config = VllmConfig(max_model_len=LONGEST, max_num_batched_tokens=LONGEST)
    engine = VllmEngine(model, level_token_ids=prompts.level_ids, level_values=rubric.values, config=config)

    def score(images: list[Any], seed: int) -> int:
        tokens = done = 0
        for tag, image in enumerate(images):
            pixels = cut(image, PixelOptions())
            assert isinstance(pixels, Pixels)
            (prompt,) = built(prompts, PROMPT.format(seed * 1000 + tag), pixels)
            tokens += len(prompt.token_ids)
            engine.submit(tag, prompt)
        while done < len(images):
            done += len(engine.step())
        return tokens

    return score


def _classifier(model: Path, rubric: Rubric) -> Any:
    """The checkpoint as vLLM converts it, with its caches on."""
    from zscore.engines.vllm_start import prepare_import, quiet

    prepare_import()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as ours: a second process would share the same cores
    with quiet():
        from vllm import LLM, ModelRegistry
        from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration

        ModelRegistry.register_model("Qwen3_5ForConditionalGeneration", Qwen3_5ForConditionalGeneration)
        words = [level.token for level in rubric.levels]
        override = {"classifier_from_token": words, "method": "no_post_processing"}
        return LLM(
            model=str(model),
            runner="pooling",
            convert="classify",
            hf_overrides={"text_config": override},
            max_model_len=LONGEST,
            max_num_batched_tokens=LONGEST,
            enable_prefix_caching=True,
            mamba_ssm_cache_dtype="float32",
            limit_mm_per_prompt={"image": 1, "video": 0},
            kv_cache_memory_bytes=2**30,
            enforce_eager=True,
            disable_log_stats=True,
        )


def classify(model: Path, rubric: Rubric) -> Callable[[list[Any], int], int]:
    """VLLM's own way; the same contract."""
    llm = _classifier(model, rubric)
    from PIL import Image
    from vllm import PoolingParams

    prompts = builder(model, rubric, "separate")
    image_token = llm.llm_engine.model_config.hf_config.image_token_id

    def score(images: list[Any], seed: int) -> int:
        requests = []
        for tag, image in enumerate(images):
            grid = (image.shape[0] // 16, image.shape[1] // 16)
            empty = Pixels(np.zeros((0, 3, 16, 16), np.uint8), grid, image.shape[1], image.shape[0])
            for prompt in built(prompts, PROMPT.format(seed * 1000 + tag), empty):
                first, count = prompt.token_ids.index(image_token), prompt.token_ids.count(image_token)
                ids = [*prompt.token_ids[: first + 1], *prompt.token_ids[first + count :]]
                requests.append({"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(image)}})
        outputs = llm.classify(requests, pooling_params=PoolingParams(use_activation=True), use_tqdm=False)
        assert len(outputs) == 4 * len(images)
        return sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs)

    return score


def serve(side: str, model: Path, options: argparse.Namespace) -> None:
    """Score a round for each line on stdin; answer with one line of JSON."""
    score = {"joint": joint, "classify": classify}[side](model, load_rubric(options.rubric))
    for edge in options.edges:
        score(pictures(2, edge, 10**6 + edge), 10**6 + edge)
    print("ready", flush=True)
    for line in sys.stdin:
        edge, seed = map(int, line.split())
        images = pictures(options.pictures, edge, seed)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = score(images, seed)
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": tokens}
        print(json.dumps(took), flush=True)


def main() -> None:
    """Run both sides in alternation and report."""
    options = _options()
    if options.side:
        serve(options.side, Path(options.model), options)
        return
    result: dict[str, Any] = {"pictures_per_round": options.pictures, "rounds": options.rounds, "body": TEXT}
    result["target"] = "ratio >= 2.5 at 256 image tokens or more, 50 to 100 ms a picture on the joint side"
    with tempfile.TemporaryDirectory() as name:
        from zscore.demo.student import build_student

        folder = Path(name)
        model = build_student(folder / "student", text=TEXT)
        (folder / "bench.toml").write_text(RUBRIC)
        for title, rubric in (("short_rubric", str(folder / "bench.toml")), ("z_reward_rubric", "z-reward")):
            for edge, found in _compare(model, rubric, options).items():
                result[f"{title}_{(edge // 32) ** 2}_image_tokens"] = _summary(found, options.pictures)
    report("joint_vs_classify", result)


def _compare(model: Path, rubric: str, options: argparse.Namespace) -> dict[int, list[dict[str, dict[str, float]]]]:
    rounds: dict[int, list[dict[str, dict[str, float]]]] = {edge: [] for edge in options.edges}
    sides = {side: _spawn(side, model, rubric) for side in ("joint", "classify")}
    try:
        for seed in range(options.rounds):
            for edge, found in rounds.items():
                order = sorted(sides) if seed % 2 else sorted(sides)[::-1]
                found.append({side: _round(sides[side], edge, seed * 10_000 + edge) for side in order})
    finally:
        for process in sides.values():
            process.kill()
    return rounds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--edges", type=int, nargs="+", default=[512, 640, 1024], help="of pictures; 32² pixels a token"
    )
    parser.add_argument("--pictures", type=int, default=8, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("--side", "--model", "--rubric"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(side: str, model: Path, rubric: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--side", side, "--model", str(model), "--rubric", rubric],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready", f"{side} didn't start"
    return process


def _round(process: subprocess.Popen[str], edge: int, seed: int) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{edge} {seed}\n")
    process.stdin.flush()
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def _summary(rounds: list[dict[str, dict[str, float]]], count: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for side in ("joint", "classify"):
        took = {what: statistics.median(found[side][what] for found in rounds) for what in ("wall", "cpu", "tokens")}
        summary[side] = {
            "pictures_per_second": round(count / took["wall"], 2),
            "ms_per_picture": round(1000 * took["wall"] / count, 1),
            "cpu_ms_per_picture": round(1000 * took["cpu"] / count, 1),
            "computed_tokens_per_picture": round(took["tokens"] / count, 1),
        }
    for what, name in (("wall", "ratio"), ("cpu", "cpu_time_ratio"), ("tokens", "token_ratio")):
        ratios = [found["classify"][what] / found["joint"][what] for found in rounds]
        summary[name] = round(statistics.median(ratios), 2)
        if what == "wall":
            summary["ratio_by_round"] = [round(ratio, 2) for ratio in ratios]
    return summary


if __name__ == "__main__":
    main()
