"""One layer for tests of the staging kernels: known records in a page-locked host store, slots on the GPU."""

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

READY, QUEUED, COPYING, CLAIMED, DROPPED, URGENT = range(6)
POISON = 0xA5


def word(state, ticket=1):
    """A slot's word as slot_state.h has it."""
    return ticket << 3 | state


class GpuLayer:
    """`row_bytes`: the length of each expert tensor's row. Slots start as POISON, which no record is."""

    def __init__(self, row_bytes, num_experts, num_slots, lane=None, **options):
        device = torch.device("cuda", torch.cuda.current_device())
        generator = torch.Generator().manual_seed(num_experts * 1000 + num_slots)
        tensors = {
            f"tensor{index}": torch.randint(0, 256, (num_experts, length), dtype=torch.uint8, generator=generator)
            for index, length in enumerate(row_bytes)
        }
        self.store = HostStore(tensors, HostMemoryOptions(pin=True, cuda=True))
        self.pool = SlotPool(self.store.views, num_slots, device)
        self.truth = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.lane = lane or DeviceLane(device)
        self.staging = DeviceStaging(self.store.views, self.pool, self.lane, DeviceStagingOptions(**options))
        self.demand = DemandLists(num_slots, device)
        self.ahead = PrefetchLists(num_slots, device)
        self.num_expected_errors = 0
        for tensor in self.pool.tensors.values():
            tensor.fill_(POISON)
        torch.cuda.synchronize()

    @property
    def words(self):
        return self.staging.slot_words

    def ask(self, loads=(), late=()):
        """Write a demand plan."""
        _write(self.demand.loads, self.demand.num_loads, loads)
        _write(self.demand.late, self.demand.num_late, late)

    def queue(self, loads, state=QUEUED, ticket=1):
        """Write a prefetch plan whose entries all have `ticket`, and put `state` into the words of its slots."""
        _write(self.ahead.loads, self.ahead.num_loads, loads)
        self.ahead.tickets.fill_(ticket)
        for _, slot in loads:
            self.words[slot] = word(state, ticket)

    def holds(self, slot, expert):
        """Whether all rows of `slot` are those of `expert`."""
        return all(torch.equal(self.pool.tensors[name][slot], self.truth[name][expert]) for name in self.truth)

    def is_untouched(self, slot):
        return all(bool((tensor[slot] == POISON).all()) for tensor in self.pool.tensors.values())

    def state(self, slot):
        return int(self.words[slot].item()) & 7


def _write(items, count, values):
    values = torch.tensor(list(values), dtype=torch.int32).reshape(-1, *items.shape[1:])
    items[: len(values)] = values.to(items.device)
    count.fill_(len(values))
