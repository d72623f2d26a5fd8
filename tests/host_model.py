"""Layers of a model on the CPU platform that share overflow rows, and what their kernels would read."""

from collections.abc import Callable

import torch
from expert_tensors import bits

from vllm_expert_prefetch.cache.create import create_shared_rows
from vllm_expert_prefetch.cache.host import HostCaches
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.native.library import host_library


class HostModel:
    """`tensors_of(number)`: the expert tensors (E, *row) of that layer."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        tensors_of: Callable[[int], dict[str, torch.Tensor]],
        areas: int = 1,
        link: EmulatedLink | None = None,
        policy: str = "lru",
        top_k: int = 2,
        chunk_bytes: int | None = None,
        depth: int = 2,
    ) -> None:
        self.caches = HostCaches(host_library(), num_layers, link, chunk_bytes, depth)
        stores = [HostStore(tensors_of(number), HostMemoryOptions()) for number in range(num_layers)]
        self.shared = create_shared_rows(stores[0].views, num_slots, areas, torch.device("cpu"))
        self.layers = [
            self.caches.add(number, store, self.shared.row_space(number % areas), num_slots, top_k, policy)
            for number, store in enumerate(stores)
        ]

    def serve(self, number: int, topk_ids: torch.Tensor, num_real: int, speculated: bool = False) -> torch.Tensor:
        """Serve a step, and compare every row that a kernel would read with the host store."""
        row_ids = self.layers[number].serve(topk_ids, num_real, speculated)
        assert (row_ids.shape, row_ids.dtype) == (topk_ids.shape, topk_ids.dtype)
        assert ((row_ids < 0) == (topk_ids < 0)).all()
        experts, rows = topk_ids[:num_real].flatten().tolist(), row_ids[:num_real].flatten().tolist()
        needed = {expert: row for expert, row in zip(experts, rows, strict=True) if expert >= 0}
        assert all(self.holds(number, row, expert) for expert, row in needed.items()), needed
        assert set(row_ids[num_real:].flatten().tolist()) <= {*needed.values(), -1} or not needed, "padding"
        return row_ids

    def holds(self, number: int, row: int, expert: int) -> bool:
        """Whether `row` of a layer holds the record of `expert`."""
        cache = self.layers[number]
        views = cache.store.views.items()
        return all(torch.equal(bits(cache.tensors[name][row]), bits(view[expert])) for name, view in views)
