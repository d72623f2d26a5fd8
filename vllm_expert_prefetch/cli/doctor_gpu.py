"""`vllm-expert-prefetch doctor --gpu`: what a GPU does with this package's kernels, without a model."""

import time
from dataclasses import replace
from typing import Any

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.planning.facts import Gpu, find_gpu

_RECORDS = (64 << 10, 1 << 20, 9 << 20, 50 << 20)
"""Bytes of a record: from a tiny expert to one of Mixtral's size in four bits."""
_BLOCKS = (4, 8, 16, 32, 64)
_NUM_EXPERTS, _NUM_SLOTS, _TOP_K, _WIDTH = 16, 6, 4, 3
_NUM_REPLAYS, _COMPARED_EVERY, _NUM_PLANS = 1000, 50, 100
_ENOUGH = 0.95


def examine_gpu() -> dict[str, Any]:
    """The report: for each record size the link's speed with the gather kernel and with the copy engine, and the fewest
    blocks that reach nearly all of it; microseconds of a plan; replays of a CUDA graph whose every byte was compared.

    Raises ConfigError or TakeoverError, with what is wrong.
    """
    torch = _torch()
    rows = [_measure(torch, size) for size in _RECORDS]
    cache = _cache(torch, _RECORDS[0], 16)
    return {
        "gpu": torch.cuda.get_device_name(),
        "records": rows,
        "plan_us": _plan_us(torch, cache),
        "replays_compared": _replays(torch, _cache(torch, _RECORDS[1], 16)),
    }


def measure_gpu() -> tuple[Gpu, float]:
    """This machine's GPU, with the memory that it has, and the GB/s of its link with the gather kernel.

    Raises ConfigError where there is none, or none that is known.
    """
    torch = _torch()
    if not torch.cuda.is_available():
        raise ConfigError("there is no NVIDIA GPU here to measure: name one with --gpu, or give --gpu-memory")
    known = find_gpu(torch.cuda.get_device_name())
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return replace(known, memory_bytes=memory), float(_measure(torch, _RECORDS[2])["gather_gbps"])


def _torch() -> Any:
    import torch

    return torch


def as_text(report: dict[str, Any]) -> str:
    """One table, and the two figures that do not depend on the size."""
    lines = [report["gpu"], f"{'record':>10} {'gather':>12} {'copy engine':>12} {'blocks':>7}"]
    for row in report["records"]:
        lines.append(
            f"{row['record_bytes'] / 1e6:>7.2f} MB {row['gather_gbps']:>7.1f} GB/s {row['engine_gbps']:>7.1f} GB/s "
            f"{row['blocks']:>7}"
        )
    lines.append(f"a plan and an empty gather: {report['plan_us']:.1f} us in a CUDA graph")
    lines.append(f"{report['replays_compared']} replays with other routing: every byte where it belongs")
    return "\n".join(lines)


def _cache(torch: Any, record_bytes: int, num_blocks: int) -> Any:
    from vllm_expert_prefetch.cache.device import DeviceCaches, DeviceOptions
    from vllm_expert_prefetch.memory.device_rows import DeviceSharedRows
    from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
    from vllm_expert_prefetch.memory.host_store import HostStore

    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**31 - 1, (_NUM_EXPERTS, record_bytes // 4), dtype=torch.int32, generator=generator)
    store = HostStore({"w": words}, HostMemoryOptions(pin=True, cuda=True))
    caches = DeviceCaches(1, device, DeviceOptions(num_demand_blocks=num_blocks))
    space = DeviceSharedRows(store.views, _NUM_SLOTS, 1, device).row_space(0)
    return caches.add(0, store, space, _NUM_SLOTS, _TOP_K, "lru")


def _measure(torch: Any, record_bytes: int) -> dict[str, Any]:
    gathered = {}
    for blocks in _BLOCKS:
        cache = _cache(torch, record_bytes, blocks)
        gathered[blocks] = record_bytes / cache.measure_copy() / 1e9
    best = max(gathered.values())
    target, source = cache.tensors["w"][0], cache.store.views["w"][0]
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return {
        "record_bytes": record_bytes,
        "gather_gbps": best,
        "engine_gbps": 8 * record_bytes / (time.perf_counter() - started) / 1e9,
        "blocks": next(blocks for blocks, speed in gathered.items() if speed >= _ENOUGH * best),
    }


def _plan_us(torch: Any, cache: Any) -> float:
    """Of steps that hit."""
    device = cache.tensors["w"].device
    ids = torch.arange(_TOP_K, dtype=torch.int32, device=device).view(1, -1)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    cache.serve(ids, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_NUM_PLANS):
            cache.serve(ids, rows)
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / _NUM_PLANS * 1e6


def _replays(torch: Any, cache: Any) -> int:
    from vllm_expert_prefetch.serving.proof import Step, compare

    generator = torch.Generator().manual_seed(0)
    step = Step(cache, cache.tensors["w"].device, _WIDTH)
    step.route(generator)
    step.run()
    graph = step.capture()
    compared = 0
    for number in range(_NUM_REPLAYS):
        step.route(generator)
        graph.replay()
        if number % _COMPARED_EVERY == 0:
            compare(cache, "doctor", step, "a replayed CUDA graph")
            compared += 1
    cache.check_integrity()
    return compared
