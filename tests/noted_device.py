"""Device caches on a machine without a GPU, whose library notes what it is asked for and does nothing."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from vllm_expert_prefetch.cache import device as module
from vllm_expert_prefetch.cache.device import DeviceCaches
from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, TOP_K = 4, 8, 3, 2
DEVICE = torch.device("cpu", 0)


class Library:
    """Notes what is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, arguments))

    def device_pointer(self, address: int, _device: int) -> int:
        return address

    def board_ints(self, num_experts: int) -> int:
        return 3 * num_experts + 3

    def lane_ints(self) -> int:
        return 2


def make_caches(patch: Any, library: Library, main: Any, others: list[Any], event: Any, depth: int = 1) -> DeviceCaches:
    """With all layers. `main` and `others`: the streams; `event`: makes an event; `patch`: a pytest.MonkeyPatch."""
    current, waiting = [main], iter(others)

    @contextlib.contextmanager
    def run_on(stream: Any) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    patch.setattr(module, "cuda_library", lambda: library)
    patch.setattr(module.torch, "device", lambda *_: DEVICE)
    patch.setattr(module, "HostMemory", lambda num_bytes, _: HostMemory(num_bytes, HostMemoryOptions()))
    patch.setattr(torch.cuda, "Stream", lambda *_, **__: next(waiting))
    patch.setattr(torch.cuda, "Event", event)
    patch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    patch.setattr(torch.cuda, "stream", run_on)
    caches = DeviceCaches(NUM_LAYERS, DEVICE, depth=depth)
    tensors = {"w": torch.arange(NUM_EXPERTS * 4).view(NUM_EXPERTS, 4)}
    for number in range(NUM_LAYERS):
        store = HostStore(tensors, HostMemoryOptions())
        caches.add(number, store, {"w": torch.zeros_like(tensors["w"])}, NUM_SLOTS, TOP_K, "lru")
    library.calls.clear()
    return caches
