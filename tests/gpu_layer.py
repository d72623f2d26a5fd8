"""One layer for tests on a GPU: known records in a page-locked host store, and a cache with its rows on the GPU."""

import torch

from vllm_expert_prefetch.cache.device import DeviceCaches, DeviceOptions
from vllm_expert_prefetch.memory.device_rows import DeviceSharedRows
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore

READY, QUEUED, COPYING, CLAIMED, DROPPED, URGENT = range(6)
POISON = 0xA5
MAX_LAYERS = 8


def device():
    return torch.device("cuda", torch.cuda.current_device())


def make_caches(depth=1, **options):
    """Caches for up to MAX_LAYERS layers; `options` as DeviceOptions has them."""
    return DeviceCaches(MAX_LAYERS, device(), DeviceOptions(**options), depth)


def word(state, ticket=1):
    """A row's word as slot_state.h has it."""
    return ticket << 3 | state


class GpuLayer:
    """`row_bytes`: the length of each expert tensor's row. Rows start as POISON, which no record is."""

    def __init__(
        self, row_bytes, num_experts, num_slots, caches=None, shared=None, top_k=1, policy="lru", areas=1, **options
    ):
        self.caches = make_caches(**options) if caches is None else caches
        number = self.caches.layers.index(None)
        generator = torch.Generator().manual_seed(num_experts * 1000 + num_slots + number)
        tensors = {
            f"tensor{index}": torch.randint(0, 256, (num_experts, length), dtype=torch.uint8, generator=generator)
            for index, length in enumerate(row_bytes)
        }
        self.num_experts, self.num_slots = num_experts, num_slots
        self.truth = {name: tensor.to(device()) for name, tensor in tensors.items()}
        store = HostStore(tensors, HostMemoryOptions(pin=True, cuda=True))
        self.shared = shared or DeviceSharedRows(store.views, num_slots, areas, device())
        self.cache = self.caches.add(number, store, self.shared.row_space(number % areas), num_slots, top_k, policy)
        self.tensors, self.words = self.cache.tensors, self.cache.row_words
        self.num_expected_errors = 0
        for tensor in self.tensors.values():
            tensor.fill_(POISON)
        torch.cuda.synchronize()

    def ask(self, loads=(), late=()):
        """Write a demand plan."""
        orders = self.cache.demand
        _write(orders.loads, orders.num_loads, loads)
        _write(orders.late, orders.num_late, late)

    def queue(self, loads, state=QUEUED, ticket=1):
        """Write a prefetch plan whose entries all have `ticket`, and put `state` into the words of its rows."""
        orders = self.cache.ahead[0]
        _write(orders.loads, orders.num_loads, loads)
        orders.late.fill_(ticket)
        for _, row in loads:
            self.words[row] = word(state, ticket)

    def holds(self, row, expert):
        """Whether `row` of all tensors is that of `expert`."""
        return all(torch.equal(self.tensors[name][row], self.truth[name][expert]) for name in self.truth)

    def is_untouched(self, row):
        return all(bool((tensor[row] == POISON).all()) for tensor in self.tensors.values())

    def state(self, row):
        return int(self.words[row].item()) & 7


def _write(items, count, values):
    values = torch.tensor(list(values), dtype=torch.int32).reshape(-1, *items.shape[1:])
    items[: len(values)] = values.to(items.device)
    count.fill_(len(values))
