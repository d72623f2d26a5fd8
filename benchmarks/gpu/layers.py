"""Layers for measurements: records of any size in page-locked memory, and caches whose orders the host may write."""

from typing import Any

import torch

from vllm_expert_prefetch.cache.device import DeviceCache, DeviceCaches, DeviceOptions
from vllm_expert_prefetch.memory.device_rows import DeviceSharedRows
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.native.library import cuda_library

DEVICE = torch.device("cuda")


def make_store(row_bytes: tuple[int, ...], num_experts: int) -> HostStore:
    """Small random bfloat16 numbers, other ones for each expert: zeros would be cheaper to compute with."""
    rows = {}
    for index, length in enumerate(row_bytes):
        numbers = torch.randn(length // 2).div_(50).to(torch.bfloat16)
        rows[f"w{index}"] = torch.stack([numbers.roll(4099 * expert) for expert in range(num_experts)])
    return HostStore(rows, HostMemoryOptions(pin=True, cuda=True))


def make_caches(
    store: HostStore, num_layers: int, num_slots: int, top_k: int, policy: str = "lfru", num_blocks: int | None = None
) -> DeviceCaches:
    """Layers that all bring records from `store`, with overflow rows in common. `num_blocks`: of demand copies."""
    options = DeviceOptions() if num_blocks is None else DeviceOptions(num_demand_blocks=num_blocks)
    caches = DeviceCaches(num_layers, DEVICE, options)
    shared = DeviceSharedRows(store.views, num_slots, 1, DEVICE)
    for number in range(num_layers):
        caches.add(number, store, shared.row_space(0), num_slots, top_k, policy)
    return caches


def layer_of(caches: DeviceCaches, number: int) -> DeviceCache:
    """The cache of a layer that there is."""
    cache = caches.layers[number]
    assert isinstance(cache, DeviceCache)
    return cache


def ask(cache: DeviceCache, loads: list[tuple[int, int]]) -> None:
    """Write a demand plan of (expert, row) pairs that stays until the next step is planned."""
    cache.demand.loads[: len(loads)] = torch.tensor(loads, dtype=torch.int32).reshape(-1, 2).to(DEVICE)
    cache.demand.num_loads.fill_(len(loads))
    cache.demand.num_late.zero_()


def plan_only(cache: DeviceCache, caches: DeviceCaches, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """A step's plan without its copies; `ids` (T, K) int32, `rows` (T) int64."""
    library: Any = cuda_library()
    orders = cache.demand
    library.plan_step(
        *(cache.state, cache.board, caches.lane, ids, rows, torch.empty_like(ids)),
        *(orders.loads, orders.num_loads, orders.late, orders.num_late),
        *(caches.mirror_address(cache.number), False, None, None, 0, torch.cuda.current_stream().cuda_stream),
    )
