"""One joint prompt a picture through our engine, against four prompts through vLLM's own `LLM.classify`.

Both score the same pictures, on the same body, from decoded RGB, with the prompts of the z-reward rubric: ours cuts
its patches and reads four probes in one prefill; the other runs vLLM's image path and its conversion to a classifier,
with the prefix cache and the multimodal cache on. Each lives in a process of its own, and rounds alternate; every
round has pictures of its own, so that nothing carries over.

What bounds the ratio is in the figures: the tokens that each side computes for a picture. Separate prompts longer than
a block of the prefix cache share their first blocks, and compute less than four times as much.

    python benchmarks/joint_vs_classify.py [--edges 512 640 1024] [--pictures 8] [--rounds 7]
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

from zscore.patches import PixelOptions, cut
from zscore.records import EnginePrompt, Failure, Pixels
from zscore.rubrics.rubric import load_rubric
from zscore.templates import PromptBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

# One core without bfloat16 instructions takes 50 to 100 ms for a joint prompt at 256 image tokens; most of it is the
# gated delta net, whose CPU kernel has no blocked path for such cores. As in the 9B, a recurrent state is as large as
# the keys and values of about 528 tokens, which is what vLLM makes its cache's blocks of; and the tower takes about a
# tenth of the time (there 7 % at 256 image tokens, 14 % at 1,024).
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 8192,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 1}
PROMPT = "a photo of a red cat and a blue dog on a green table in the kitchen, soft light, number {}"
LONGEST = 4096


def pictures(count: int, edge: int, seed: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Noise over gradients: no two alike, none that a cache has seen."""
    rng = np.random.default_rng(seed)
    ramp = np.arange(edge * edge * 3, dtype=np.uint32).reshape(edge, edge, 3) * 40_503 >> 8
    return [(ramp + rng.integers(0, 64, (edge, edge, 3), np.uint32)).astype(np.uint8) for _ in range(count)]


def builder(model: Path, layout: Any) -> PromptBuilder:
    """Prompts of the default rubric."""
    return PromptBuilder(model, load_rubric("z-reward"), layout, merge=2, max_tokens=LONGEST)


def built(prompts: PromptBuilder, text: str, pixels: Pixels) -> list[EnginePrompt]:
    """The prompts of one picture."""
    found = prompts.build(text, pixels)
    assert not isinstance(found, Failure), found.error
    return found


def joint(model: Path) -> Callable[[list[Any], int], int]:
    """Our engine; scores pictures and returns how many tokens it had to compute."""
    from zscore.engines.vllm import VllmConfig, VllmEngine

    rubric, prompts = load_rubric("z-reward"), builder(model, "joint")
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


def classify(model: Path) -> Callable[[list[Any], int], int]:
    """VLLM's own way; the same contract."""
    from zscore.engines.vllm_start import prepare_import, quiet

    prepare_import()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as ours: a second process would share the same cores
    with quiet():
        from PIL import Image
        from vllm import LLM, ModelRegistry, PoolingParams
        from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration

        ModelRegistry.register_model("Qwen3_5ForConditionalGeneration", Qwen3_5ForConditionalGeneration)
        words = [level.token for level in load_rubric("z-reward").levels]
        override = {"classifier_from_token": words, "method": "no_post_processing"}
        llm = LLM(
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
    prompts = builder(model, "separate")
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
    score = {"joint": joint, "classify": classify}[side](model)
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
    with tempfile.TemporaryDirectory() as folder:
        from zscore.demo.student import build_student

        model = build_student(Path(folder), text=TEXT, vision=VISION)
        sides = {side: _spawn(side, model, options.threads) for side in ("joint", "classify")}
        try:
            rounds: dict[int, list[dict[str, dict[str, float]]]] = {edge: [] for edge in options.edges}
            for seed in range(options.rounds):
                for edge, found in rounds.items():
                    order = sorted(sides) if seed % 2 else sorted(sides)[::-1]
                    found.append({side: _round(sides[side], edge, seed * 10_000 + edge) for side in order})
        finally:
            for process in sides.values():
                process.kill()
    settings = {"pictures_per_round": options.pictures, "rounds": options.rounds, "threads": options.threads}
    sizes = {f"{(edge // 32) ** 2}_image_tokens": _summary(found, options.pictures) for edge, found in rounds.items()}
    report(f"joint_vs_classify{options.suffix}", {**settings, "target_ratio": 2.5, **sizes})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--edges", type=int, nargs="+", default=[512, 640, 1024], help="of pictures; 32² pixels a token"
    )
    parser.add_argument("--pictures", type=int, default=8, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each side; one is least disturbed by other work")
    parser.add_argument("--suffix", default="", help="of the result's name")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(side: str, model: Path, threads: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--side", side, "--model", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
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
