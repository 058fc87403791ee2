"""Times and memory of calls on a CUDA GPU. All times are in milliseconds."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

__all__ = ["capture", "copy_bytes_per_ms", "graph_ms", "host_ms", "kernel_us", "median_ms", "peak_mib", "replay_ms"]


def median_ms(run: Callable[[], Any], budget_ms: float = 120.0) -> float:
    """Median time of a call on the GPU. Calls are launched one after the other, without waiting for the GPU.

    Args:
        run: makes one call.
        budget_ms: about how long to measure, with at least 5 and at most 50 calls.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    run()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    calls = min(50, max(5, int(budget_ms / max(events[0].elapsed_time(events[1]), 1e-3))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks))


def host_ms(run: Callable[[], Any], calls: int = 8) -> float:
    """Median time that Python takes to launch a call while the GPU is idle."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mib(run: Callable[[], Any]) -> float:
    """The most memory, in MiB, that the second of two calls has allocated at once."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def capture(run: Callable[[], Any], warm_up: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`, after `warm_up` on a side stream, as PyTorch's documentation asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graph_ms(run: Callable[[], Any]) -> float | None:
    """Median time of a replay of the call in a CUDA graph. None if it cannot be captured; the reason is printed."""
    try:
        return median_ms(capture(run, run).replay)
    except RuntimeError as error:
        tqdm.write(f"no CUDA graph: {str(error)[:100]}")
        return None


def replay_ms(graph: torch.cuda.CUDAGraph, budget_ms: float = 100.0) -> float:
    """Median time of a replay, where each replay waits for the one before it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    graph.replay()
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 50):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def kernel_us(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """Mean time in microseconds of each kernel of `run`, which makes several calls outside of a graph."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / event.count, 2)
        for event in recorded.key_averages()
        if event.self_device_time_total > 0 and "kernel" in event.key
    }


def copy_bytes_per_ms() -> float:
    """Bytes read plus bytes written by the fastest of 20 copies of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = math.inf
    for _ in range(20):
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return 2 * 2**30 / best
