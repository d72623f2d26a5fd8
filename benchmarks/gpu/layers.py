"""A layer for measurements: records of any size in page-locked memory, slots, and lists filled from the host."""

import torch

from vllm_expert_prefetch.experts.device_staging import (
    DemandLists,
    DeviceLane,
    DeviceStaging,
    DeviceStagingOptions,
    PrefetchLists,
)
from vllm_expert_prefetch.experts.host_memory import HostMemoryOptions
from vllm_expert_prefetch.experts.host_store import HostStore
from vllm_expert_prefetch.experts.slot_pool import SlotPool

DEVICE = torch.device("cuda")


def make_store(row_bytes: tuple[int, ...], num_experts: int) -> HostStore:
    """Small random bfloat16 numbers, other ones for each expert: zeros would be cheaper to compute with."""
    rows = {}
    for index, length in enumerate(row_bytes):
        numbers = torch.randn(length // 2).div_(50).to(torch.bfloat16)
        rows[f"w{index}"] = torch.stack([numbers.roll(4099 * expert) for expert in range(num_experts)])
    return HostStore(rows, HostMemoryOptions(pin=True, cuda=True))


class Layer:
    """One layer's slots on `store`, its lists, and its planner's state when `policy` is given (0 lru, 2 lfru)."""

    def __init__(self, store: HostStore, num_slots: int, lane: DeviceLane, options: DeviceStagingOptions) -> None:
        self.store, self.num_slots = store, num_slots
        self.pool = SlotPool(store.views, num_slots, lane.device)
        self.staging = DeviceStaging(store.views, self.pool, lane, options)
        self.demand = DemandLists(num_slots, lane.device)
        self.ahead = PrefetchLists(num_slots, lane.device)
        self.record_bytes = self.staging.record_bytes

    def ask(self, loads: list[tuple[int, int]]) -> None:
        """Write a demand plan that never changes."""
        self.demand.loads[: len(loads)] = torch.tensor(loads, dtype=torch.int32).to(self.demand.loads.device)
        self.demand.num_loads.fill_(len(loads))


def planner_state(num_experts: int, num_slots: int, top_k: int, policy: int) -> torch.Tensor:
    """A device planner's state with all slots free (csrc/residency.h)."""
    from vllm_expert_prefetch.native.library import host_library

    host = host_library()
    if host is None:
        raise RuntimeError("libvep_host.so is needed to initialise planners")
    state = torch.zeros(host.planner_words(num_experts, num_slots), dtype=torch.int64)
    host.planner_init(state, num_experts, num_slots, top_k, policy, 2, False)
    return state.to(DEVICE)
