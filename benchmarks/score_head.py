"""The score head's kernel against torch eager, torch.compile and the full-vocabulary path, on a GPU.

python benchmarks/score_head.py [--classes 9] [--width 4096] [--vocabulary 248320] [--rows 1 2 4 … 65536]

Hidden states are bfloat16, as a model leaves them, and so are the weights, as `zscore.engines.vllm_model` holds them.
The exact ways (zscore, eager, compile) compute in float32; all five outputs of each are compared with float64 at
B = 1, 256 and 512 before anything is timed. The two marked bf16 and the full-vocabulary one round their logits.

GPU time: 200 calls captured in a CUDA graph (fewer only where a replay would take longer than 50 ms), replayed, median,
divided by the calls; the empty kernel likewise. Inputs are reused, so up to the L2 cache's size they are read from it,
as they would be behind the model's last layer. Host time: how long Python and the launch take to put one call into the
queue, which is what counts where nothing is captured. The yardsticks are an empty Triton kernel (the least a launch can
take) and a copy of 1 GiB (the most that memory gives).

Writes benchmarks/results/score_head.json after every size: what ran out of memory is null there. Triton's interpreter
is never timed: its times mean nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from _common import report  # type: ignore[import-not-found]
from _gpu_timing import copy_gb_s, empty_kernel, graph_us, host_us, peak_mib  # type: ignore[import-not-found]
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DEVICE = "cuda"
WAYS = ("zscore", "eager", "eager bf16", "compile", "compile bf16", "full vocabulary")
EXACT = ("zscore", "eager", "compile")
OUTPUTS = ("probabilities", "mean", "variance", "entropy", "logits")
STEPS = ("zscore", "eager", "full vocabulary")
FORWARD_BYTES, TRAINING_BYTES = 10, 16
"""A logit of the full path: bfloat16, float32 copy and float32 log-probability; in training their gradients too, of
which one more float32 and one bfloat16 lie there at the same time."""
CHECKED_ROWS = (1, 256, 512)
LIMIT = 1e-5
"""Off float64, in units of the largest value (at least 1)."""
TARGETS = {
    "empty": "B ≤ 256: at most 1.3 times an empty kernel",
    "bandwidth": "B ≥ 16,384: at least 0.8 of the copy bandwidth",
    "full": "B = 256: at least 10 times the full-vocabulary path",
    "compile": "every B: never slower than torch.compile, in float32 or bfloat16",
    "memory": "training: the gradients and the partial sums, nothing of size V (peak against that)",
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
        vocabulary_VH = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16) / width**0.5
        ids_K = torch.randperm(vocabulary, device=DEVICE)[:classes]
        values_K = torch.linspace(1, 5, classes, device=DEVICE)
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


def off_float64(head: Head, width: int) -> dict[str, float]:
    """By how much any output of an exact way is off at worst; refuses to time a way that is wrong."""
    worst = dict.fromkeys(EXACT, 0.0)
    candidates = ways(head)
    for rows in CHECKED_ROWS:
        hidden_BH = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
        wanted = of_logits(hidden_BH.double() @ head.weight_KH.double().T, head.values_K.double())
        for name in EXACT:
            with torch.inference_mode():
                found = candidates[name](hidden_BH)
            for output, one, other in zip(OUTPUTS, found, wanted, strict=True):
                off = ((one - other).abs().max() / other.abs().max().clamp_min(1)).item()
                if not off <= LIMIT:
                    sys.exit(
                        f"score_head: {name}'s {output} is off by {off:.2e} from float64 at B = {rows}"
                        f" (limit {LIMIT:.0e}); nothing was timed"
                    )
                worst[name] = max(worst[name], off)
    return worst


def fits(name: str, rows: int, vocabulary: int, bytes_a_logit: int) -> bool:
    """Whether a way's buffers fit; only the full path's are of size V."""
    return name != "full vocabulary" or rows * vocabulary * bytes_a_logit < free_bytes() * 0.95


def free_bytes() -> int:
    """Memory of the GPU that nobody holds."""
    return torch.cuda.mem_get_info()[0]


def unless_full(measured: Callable[[], dict[str, float]]) -> dict[str, float] | None:
    """What was measured; None where the GPU's memory didn't suffice."""
    torch.cuda.empty_cache()
    try:
        return measured()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def measure(head: Head, rows: int, width: int) -> dict[str, Any]:
    """GPU and host time of every way for one batch size."""
    torch.compiler.reset()
    hidden_BH = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    result: dict[str, Any] = {"rows": rows}

    def times(call: Callable[[], object]) -> dict[str, float]:
        with torch.inference_mode():
            gpu_us = graph_us(call)
            torch.cuda.empty_cache()  # the graph's own memory
            return {"gpu_us": round(gpu_us, 3), "host_us": round(host_us(call), 3)}

    for name, way in ways(head).items():
        fitting = fits(name, rows, head.vocabulary_VH.shape[0], FORWARD_BYTES)
        result[name] = unless_full(partial(times, partial(way, hidden_BH))) if fitting else None
    classes = head.values_K.numel()
    moved = rows * width * 2 + classes * width * 2 + rows * (2 * classes + 3) * 4
    result["gb_s"] = round(moved / result["zscore"]["gpu_us"] / 1e3, 1) if result["zscore"] else None
    return result


def training_steps(head: Head, rows: int, width: int) -> dict[str, Callable[[], object]]:
    """Distillation, forward and backward, by name."""
    from zscore_kernels import score_head_kl

    hidden_BH = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight_KH = head.weight_KH.clone().requires_grad_()
    target_BK = torch.rand(rows, head.values_K.numel(), device=DEVICE).softmax(1)

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

    return {"zscore": fused, "eager": eager, "full vocabulary": full}


def train(head: Head, rows: int, width: int) -> dict[str, Any]:
    """Distillation: GPU time and peak memory of the fused loss, of plain torch and of the full-vocabulary path."""
    from zscore_kernels.launch import MAX_SPLITS

    classes, vocabulary = head.values_K.numel(), head.vocabulary_VH.shape[0]
    # Gradients of hidden and weight, of the logits twice (as they were saved, and scaled), partial sums, small change.
    needed = rows * width * 2 + classes * width * 2 + 2 * rows * classes * 4 + MAX_SPLITS * classes * width * 4
    result: dict[str, Any] = {"rows": rows, "without_v_mib": round((needed + 2**20) / 2**20, 1)}

    def figures(step: Callable[[], object]) -> dict[str, float]:
        peak = peak_mib(step)  # before a graph holds memory of its own
        return {"gpu_us": round(graph_us(step), 3), "peak_mib": round(peak, 1)}

    for name, step in training_steps(head, rows, width).items():
        fitting = fits(name, rows, vocabulary, TRAINING_BYTES)
        result[name] = unless_full(partial(figures, step)) if fitting else None
    return result


def verdicts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was aimed at, and whether it was reached; None where it wasn't measured."""
    rows = [row for row in result["rows"] if row["zscore"]]

    def ratios(other: str) -> list[float]:
        return [row[other]["gpu_us"] / row["zscore"]["gpu_us"] for row in rows if row[other]]

    def full() -> list[float]:
        wanted = [row for row in rows if row["rows"] == 256 and row["full vocabulary"]]
        return [row["full vocabulary"]["gpu_us"] / row["zscore"]["gpu_us"] for row in wanted]

    training = [row for row in result["training"] if row["zscore"]]
    empty = [row["zscore"]["gpu_us"] / result["empty_us"] for row in rows if row["rows"] <= 256]
    bandwidth = [row["gb_s"] / result["copy_gb_s"] for row in rows if row["rows"] >= 16_384]
    compiled, narrow = ratios("compile"), ratios("compile bf16")
    return {
        "empty": at_most(empty, 1.3),
        "bandwidth": at_least(bandwidth, 0.8),
        "full": at_least(full(), 10),
        "compile": at_least([*compiled, *narrow] if compiled and narrow else [], 1),
        "memory": at_most([row["zscore"]["peak_mib"] / row["without_v_mib"] for row in training], 1),
    }


def at_most(found: list[float], limit: float) -> dict[str, Any]:
    """A verdict over the largest."""
    return {"worst": max(found), "reached": max(found) <= limit} if found else {"worst": None, "reached": None}


def at_least(found: list[float], limit: float) -> dict[str, Any]:
    """A verdict over the smallest."""
    return {"worst": min(found), "reached": min(found) >= limit} if found else {"worst": None, "reached": None}


def show(result: dict[str, Any]) -> None:
    """Print the tables, also as they stand in kernels/README.md."""
    print(f"empty kernel {result['empty_us']} µs, copy {result['copy_gb_s']} GB/s")
    print("| B | " + " | ".join(WAYS) + " | GB/s |\n|" + "---|" * (len(WAYS) + 2))
    for row in result["rows"]:
        cells = (f"{row[way]['gpu_us']} ({row[way]['host_us']})" if row[way] else "–" for way in WAYS)
        print(f"| {row['rows']} | " + " | ".join(cells) + f" | {row['gb_s'] or '–'} |")
    print("GPU µs captured in a graph (host µs a call)\n\n| B, forward + backward | " + " | ".join(STEPS) + " |")
    print("|" + "---|" * (len(STEPS) + 1))
    for row in result["training"]:
        steps = (row[way] for way in STEPS)
        cells = (f"{step['gpu_us']} µs, {step['peak_mib']} MiB" if step else "–" for step in steps)
        print(f"| {row['rows']} | " + " | ".join(cells) + " |")
    for name, verdict in result["targets"].items():
        if verdict["reached"] is None:
            print(f"not measured  {TARGETS[name]}")
        else:
            print(f"{'reached' if verdict['reached'] else 'MISSED ':<12}  {TARGETS[name]}: {verdict['worst']:.2f}")


def run(arguments: argparse.Namespace, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """All measurements; `save` gets what there is after each, so that a run cut short leaves its figures."""
    head = Head.random(arguments.classes, arguments.width, arguments.vocabulary)
    result: dict[str, Any] = {
        "classes": arguments.classes,
        "width": arguments.width,
        "vocabulary": arguments.vocabulary,
        "weights": str(head.weight_KH.dtype),
        "off_float64": off_float64(head, arguments.width),
        "empty_us": round(graph_us(empty_kernel()), 3),
        "empty_host_us": round(host_us(empty_kernel()), 3),
        "copy_gb_s": round(copy_gb_s(), 1),
        "rows": [],
        "training": [],
    }
    for figures, measured, sizes in (
        (result["rows"], measure, arguments.rows),
        (result["training"], train, arguments.training_rows),
    ):
        for size in sizes:
            figures.append(measured(head, size, arguments.width))
            result["targets"] = verdicts(result)
            save(result)
    return result


def save(result: dict[str, Any]) -> None:
    """Writes the record as all benchmarks do; the table comes from `show`, once, at the end."""
    with redirect_stdout(io.StringIO()):
        report("score_head", result)


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
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("score_head: TRITON_INTERPRET=1 would time Triton's interpreter; unset it")
    show(run(arguments, save))


if __name__ == "__main__":
    main()
