"""The score head's kernel against torch eager, torch.compile and the full-vocabulary path, on a GPU.

python benchmarks/score_head.py [--classes 9] [--width 4096] [--vocabulary 248320] [--rows 1 2 4 … 65536]

Hidden states are bfloat16, as a model leaves them; all ways but the two marked bf16 and the full-vocabulary one compute
in float32 and return the same five outputs, which are compared with float64 before anything is timed.

GPU time: calls captured in a CUDA graph, replayed, median, divided by the calls. Inputs are reused, so up to the L2
cache's size they are read from it, as they would be behind the model's last layer. Host time: how long Python and the
launch take to put one call into the queue, which is what counts where nothing is captured. The yardsticks are an empty
Triton kernel (the least a launch can take) and a copy of 1 GiB (the most that memory gives).

Writes benchmarks/results/score_head.json. Triton's interpreter is never timed: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

REPLAYS = 30
CAPTURED_MS = 2.0
HOST_CALLS = 40
"""A queue holds about a thousand launches: more calls than this would wait for the GPU and time it instead."""
COPY_BYTES = 1 << 30
WAYS = ("zscore", "eager", "eager bf16", "compile", "compile bf16", "full vocabulary")
TARGETS = {
    "empty": "B ≤ 256: at most 1.3 times an empty kernel",
    "bandwidth": "B ≥ 16,384: at least 0.8 of the copy bandwidth",
    "full": "B = 256: at least 10 times the full-vocabulary path",
    "compile": "every B: never slower than torch.compile",
}


@dataclass(frozen=True)
class Head:
    """What all ways score with."""

    weight_KH: Tensor
    values_K: Tensor
    vocabulary_VH: Tensor
    ids_K: Tensor

    @classmethod
    def random(cls, classes: int, width: int, vocabulary: int) -> Head:
        """A random language-model head whose K score rows lie scattered in it."""
        torch.manual_seed(0)
        vocabulary_VH = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) / width**0.5
        ids_K = torch.randperm(vocabulary, device="cuda")[:classes]
        values_K = torch.linspace(1, 5, classes, device="cuda")
        return cls(vocabulary_VH[ids_K].contiguous(), values_K, vocabulary_VH, ids_K)


def of_logits(z_BK: Tensor, values_K: Tensor) -> tuple[Tensor, ...]:
    """The five outputs in plain torch."""
    log_probs_BK = z_BK.log_softmax(1)
    probs_BK = log_probs_BK.exp()
    mean_B = (probs_BK * values_K).sum(1)
    var_B = (probs_BK * (values_K - mean_B[:, None]).square()).sum(1)
    return probs_BK, mean_B, var_B, -(probs_BK * log_probs_BK).sum(1), z_BK


def ways(head: Head) -> dict[str, Callable[[Tensor], Any]]:
    """Every way from hidden states to scores, by name."""
    from zscore_kernels import score_head

    def exact(hidden_BH: Tensor) -> tuple[Tensor, ...]:
        return of_logits(functional.linear(hidden_BH.float(), head.weight_KH.float()), head.values_K)

    def narrow(hidden_BH: Tensor) -> tuple[Tensor, ...]:
        return of_logits(functional.linear(hidden_BH, head.weight_KH).float(), head.values_K)

    def full(hidden_BH: Tensor) -> tuple[Tensor, ...]:
        log_probs_BV = functional.linear(hidden_BH, head.vocabulary_VH).log_softmax(1, dtype=torch.float32)
        return of_logits(log_probs_BV[:, head.ids_K], head.values_K)

    return {
        "zscore": lambda hidden_BH: score_head(hidden_BH, head.weight_KH, head.values_K),
        "eager": exact,
        "eager bf16": narrow,
        "compile": torch.compile(exact, dynamic=False),
        "compile bf16": torch.compile(narrow, dynamic=False),
        "full vocabulary": full,
    }


def graph_us(call: Callable[[], object]) -> float:
    """GPU time of one call, microseconds: captured in a graph, replayed, median."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()  # compiles, and warms the allocator
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
    calls = max(1, min(200, int(CAPTURED_MS / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times[3:])


def host_us(call: Callable[[], object]) -> float:
    """Host time to put one call into the queue, microseconds, median of five rounds."""
    rounds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        rounds.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(rounds[1:])


def empty_kernel() -> Callable[[], object]:
    """A Triton kernel that does nothing."""
    import triton

    @triton.jit
    def empty(pointer):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        pass

    pointer = torch.empty(1, device="cuda")
    return lambda: empty[(1,)](pointer, num_warps=4, enable_fp_fusion=False)


def copy_gb_s() -> float:
    """Bandwidth of a large copy, GB/s, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / graph_us(lambda: target.copy_(source)) / 1e3


def check(head: Head, width: int) -> float:
    """Largest difference of a probability from float64 over 512 rows; refuses to time a kernel that is wrong."""
    hidden_BH = torch.randn(512, width, device="cuda", dtype=torch.bfloat16)
    wanted = of_logits(hidden_BH.double() @ head.weight_KH.double().T, head.values_K.double())
    found = ways(head)["zscore"](hidden_BH)
    worst = (found[0] - wanted[0]).abs().max().item()
    if not worst < 1e-5:
        sys.exit(f"score_head: a probability is off by {worst:.2e} from float64 (limit 1e-5); nothing was timed")
    return worst


def fits(name: str, rows: int, vocabulary: int) -> bool:
    """Whether a way's buffers fit; the full path needs bfloat16 logits and float32 log-probabilities over V."""
    free, _ = torch.cuda.mem_get_info()
    return name != "full vocabulary" or rows * vocabulary * 8 < free * 0.9


def measure(head: Head, rows: int, width: int) -> dict[str, Any]:
    """GPU and host time of every way for one batch size."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    hidden_BH = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    result: dict[str, Any] = {"rows": rows}
    for name, way in ways(head).items():
        if not fits(name, rows, head.vocabulary_VH.shape[0]):
            result[name] = None
            continue
        call = partial(way, hidden_BH)
        with torch.inference_mode():
            result[name] = {"gpu_us": round(graph_us(call), 3), "host_us": round(host_us(call), 3)}
        torch.cuda.empty_cache()
    classes = head.values_K.numel()
    moved = rows * width * 2 + classes * width * 2 + rows * (2 * classes + 3) * 4
    result["gb_s"] = round(moved / result["zscore"]["gpu_us"] / 1e3, 1)
    return result


def train(head: Head, rows: int, width: int) -> dict[str, Any]:
    """Distillation, forward and backward: GPU time and peak memory of the fused loss and of the full-vocabulary one."""
    from zscore_kernels import score_head_kl

    torch.cuda.empty_cache()
    hidden_BH = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_KH = head.weight_KH.clone().requires_grad_()
    target_BK = torch.rand(rows, head.values_K.numel(), device="cuda").softmax(1)

    def fused() -> object:
        return torch.autograd.grad(score_head_kl(hidden_BH, weight_KH, target_BK), [hidden_BH, weight_KH])

    def eager() -> object:
        log_q_BK = functional.linear(hidden_BH.float(), weight_KH.float()).log_softmax(1)
        loss = functional.kl_div(log_q_BK, target_BK, reduction="batchmean")
        return torch.autograd.grad(loss, [hidden_BH, weight_KH])

    def full() -> object:
        logits_BV = functional.linear(hidden_BH, head.vocabulary_VH)
        log_q_BK = logits_BV.log_softmax(1, dtype=torch.float32)[:, head.ids_K].log_softmax(1)
        return torch.autograd.grad(functional.kl_div(log_q_BK, target_BK, reduction="batchmean"), hidden_BH)

    result: dict[str, Any] = {"rows": rows}
    for name, step in (("zscore", fused), ("eager", eager), ("full vocabulary", full)):
        if not fits(name, 3 * rows, head.vocabulary_VH.shape[0]):
            result[name] = None
            continue
        result[name] = {"gpu_us": round(graph_us(step), 3), "peak_mib": round(peak_mib(step), 1)}
        torch.cuda.empty_cache()
    return result


def peak_mib(step: Callable[[], object]) -> float:
    """Memory that a step takes at its worst moment beyond what was there."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def verdicts(rows: list[dict[str, Any]], empty_us: float, copy: float) -> dict[str, dict[str, Any]]:
    """What was aimed at, what was reached."""

    def ratios(other: str, sizes: Callable[[int], bool]) -> list[float]:
        return [
            row[other]["gpu_us"] / row["zscore"]["gpu_us"]
            for row in rows
            if sizes(row["rows"]) and row[other] is not None
        ]

    small = [row["zscore"]["gpu_us"] / empty_us for row in rows if row["rows"] <= 256]
    large = [row["gb_s"] / copy for row in rows if row["rows"] >= 16_384]
    full = ratios("full vocabulary", lambda size: size == 256)
    compiled = ratios("compile", lambda _: True)
    narrow = ratios("compile bf16", lambda _: True)
    return {
        "empty": {"worst": max(small, default=None), "reached": bool(small) and max(small) <= 1.3},
        "bandwidth": {"worst": min(large, default=None), "reached": bool(large) and min(large) >= 0.8},
        "full": {"worst": min(full, default=None), "reached": bool(full) and min(full) >= 10},
        "compile": {
            "worst": min(compiled, default=None),
            "worst_bf16": min(narrow, default=None),
            "reached": bool(compiled) and min(compiled) >= 1,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables, also as they stand in kernels/README.md."""
    print(f"empty kernel {result['empty_us']} µs, copy {result['copy_gb_s']} GB/s")
    print("| B | " + " | ".join(WAYS) + " | GB/s |\n|" + "---|" * (len(WAYS) + 2))
    for row in result["rows"]:
        cells = ("–" if row[way] is None else f"{row[way]['gpu_us']} ({row[way]['host_us']})" for way in WAYS)
        print(f"| {row['rows']} | " + " | ".join(cells) + f" | {row['gb_s']} |")
    print("GPU µs captured in a graph (host µs a call)\n\n| B, forward + backward | zscore | eager | full vocabulary |")
    print("|---|---|---|---|")
    for row in result["training"]:
        steps = (row[way] for way in ("zscore", "eager", "full vocabulary"))
        cells = ("–" if step is None else f"{step['gpu_us']} µs, {step['peak_mib']} MiB" for step in steps)
        print(f"| {row['rows']} | " + " | ".join(cells) + " |")
    for name, verdict in result["targets"].items():
        worst = "not measured" if verdict["worst"] is None else f"{verdict['worst']:.2f}"
        print(f"{'reached' if verdict['reached'] else 'MISSED '}  {TARGETS[name]}: {worst}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    head = Head.random(arguments.classes, arguments.width, arguments.vocabulary)
    off, empty_us, copy = check(head, arguments.width), graph_us(empty_kernel()), copy_gb_s()
    rows = [measure(head, size, arguments.width) for size in arguments.rows]
    return {
        "classes": arguments.classes,
        "width": arguments.width,
        "vocabulary": arguments.vocabulary,
        "off_float64": off,
        "empty_us": round(empty_us, 3),
        "empty_host_us": round(host_us(empty_kernel()), 3),
        "copy_gb_s": round(copy, 1),
        "rows": rows,
        "training": [train(head, size, arguments.width) for size in arguments.training_rows],
        "targets": verdicts(rows, empty_us, copy),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=9)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=248_320)
    parser.add_argument("--rows", type=int, nargs="+", default=[1 << power for power in range(17)])
    parser.add_argument("--training-rows", type=int, nargs="+", default=[256, 4096, 16_384])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        # Not a failure: `make bench` goes on with the benchmarks that can run here.
        print("score_head: no CUDA device here; this benchmark times a GPU kernel, run it on a machine with one")
        return
    from _common import RESULTS, hardware, versions  # type: ignore[import-not-found]

    result = run(arguments)
    show(result)
    record = {
        "benchmark": "score_head",
        "command": shlex.join(["python", "benchmarks/score_head.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "result": result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "score_head.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
