"""Times on the GPU's own clock."""

import statistics
from collections.abc import Callable
from typing import Any

import torch


def median_ms(work: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """Milliseconds of one call of `work`: the median of `repeats` measurements of `calls` calls, after a warm-up."""
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def captured(work: Callable[[], Any]) -> "torch.cuda.CUDAGraph":
    """`work` as a graph, after one run outside it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def gbps(num_bytes: float, milliseconds: float) -> float:
    """10^9 bytes per second."""
    return round(num_bytes / milliseconds / 1e6, 2)
