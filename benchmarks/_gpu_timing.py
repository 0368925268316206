"""GPU time, host time and peak memory of a call; the least that a launch takes and the most that memory gives."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

REPLAYS = 30
CALLS = 200
LONGEST_MS = 50.0
"""Of a replay: with 200 calls in it, or 50 ms, its own launch is a small part of each."""
HOST_CALLS = 40
"""A queue holds about a thousand launches: more calls than this would wait for the GPU and time it instead."""
COPY_BYTES = 1 << 30


def graph_us(call: Callable[[], object]) -> float:
    """GPU time of one call, microseconds: captured in a graph, replayed, median."""
    warm(call)
    # How many calls is asked of a replay: an eager call takes the host's time, which would leave small kernels few.
    one_ms = max(replay_ms(captured(call, 1), 3), 1e-3)
    calls = max(1, min(CALLS, int(LONGEST_MS / one_ms)))
    return replay_ms(captured(call, calls), REPLAYS) / calls * 1e3


def warm(call: Callable[[], object]) -> None:
    """Compiles what a call needs, away from the stream of capture, and leaves its memory to the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def captured(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """Replays so many calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def replay_ms(replay: Callable[[], None], times: int) -> float:
    """Median of so many replays, milliseconds, after three that don't count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(times + 3):
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found[3:])


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


def peak_mib(step: Callable[[], object]) -> float:
    """Memory that a step takes at its worst moment beyond what was there."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
