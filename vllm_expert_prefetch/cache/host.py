"""The expert cache on the CPU platform: planned and copied in C++, prefetches on a thread of the engine's own."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from vllm_expert_prefetch.cache.base import Caches, LayerCache, Rows, check_state
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.memory.row_space import RowSpace
from vllm_expert_prefetch.residency import POLICIES

_CHUNK_BYTES = 256 * 1024
"""A prefetch goes over the link in chunks of this size: what a demand waits for at most."""
_CHUNK_SECONDS, _LEAST_CHUNK_BYTES = 200e-6, 1024
"""Over a slow link, in chunks that last so long."""


class HostCache(LayerCache):
    """One layer, behind one native call per step; see csrc/host/cache_bindings.cc."""

    on_device = False

    def __init__(
        self,
        caches: "HostCaches",
        number: int,
        store: HostStore,
        space: RowSpace,
        num_slots: int,
        top_k: int,
        policy: str,
    ) -> None:
        super().__init__(store, space, num_slots, top_k)
        library = caches.library
        self.state = torch.zeros(library.planner_words(self.num_experts, num_slots), dtype=torch.int64)
        self._mirror = caches.mirror[number]
        self._budgets = [0] + [num_slots] * caches.depth
        """Records of one prefetch, by its distance."""
        numbers = (self.num_experts, num_slots, top_k, list(POLICIES).index(policy), store.record_bytes)
        segments = _segment_table(store, space)
        self._native = library.cache_create(caches.engine, segments, *numbers, self.state, self._mirror)
        self._serve, self._prefetch, self._copy = library.cache_serve, library.cache_prefetch, library.cache_copy
        self._preload, self._num_queued, self._engine = library.cache_preload, library.engine_num_queued, caches.engine
        self._caches = caches

    def serve(self, topk_ids: torch.Tensor, rows: Rows, speculated: bool = False) -> torch.Tensor:
        self._caches.claim_area(self, topk_ids, rows)
        topk_ids = topk_ids.contiguous()
        row_ids = torch.empty_like(topk_ids)
        self._serve(self._native, topk_ids, rows * topk_ids.shape[1], row_ids, speculated)
        return row_ids

    def prefetch(self, predicted: torch.Tensor, rows: Rows, distance: int = 1) -> None:
        if self._budgets[distance] > 0:
            self._prefetch(self._native, predicted.contiguous(), self._budgets[distance], distance > 1)

    def preload(self, predicted: torch.Tensor, rows: Rows) -> None:
        self._caches.preloaded = self
        self._preload(self._native, predicted.contiguous(), self._budgets[1])

    def set_budget(self, num_records: int, num_guesses: int, distance: int = 1) -> None:
        self._budgets[distance] = num_records  # whoever guesses on the host guesses no more than counts

    def takes_guesses(self, distance: int = 1) -> bool:
        budget = self._budgets[distance]
        return budget > 0 and (distance == 1 or budget > self._num_queued(self._engine))

    def _add_ghosts(self, num_slots: Sequence[int], states: torch.Tensor, mirror: torch.Tensor) -> None:
        self._ghosts = states, mirror
        self._caches.library.cache_add_ghosts(self._native, states, mirror)

    def words(self) -> Words:
        return Words._make(self._mirror.tolist())

    def measure_copy(self) -> float:
        return float(self._copy(self._native, 0, self.num_experts - 1))

    def check_integrity(self) -> None:
        check_state(self.state)


class HostCaches(Caches):
    """The link of one worker and the thread that prefetches over it.

    They keep the memory of their layers alive; the thread ends with them, at `close` or at exit. In a forked child
    every call raises RuntimeError.
    """

    engine_name = "cpu"
    on_device = False

    def __init__(
        self, library: Any, num_layers: int, link: EmulatedLink | None, chunk_bytes: int | None = None, depth: int = 1
    ) -> None:
        """`library`: `native.library.host_library()`. `chunk_bytes`: what a demand waits for at most; None chooses it.

        Raises ValueError for numbers that make no sense.
        """
        super().__init__(num_layers, torch.zeros(num_layers, len(Words._fields), dtype=torch.int64), link, depth)
        self.library = library
        gbps, latency_us = link or (0.0, 0.0)
        self.engine = library.engine_create(gbps, latency_us, chunk_bytes or _chunk_for(link))
        self._kept: list[tuple[HostStore, RowSpace]] = []
        self._close = weakref.finalize(self, library.engine_close, self.engine)

    def add(self, number: int, store: HostStore, space: RowSpace, num_slots: int, top_k: int, policy: str) -> HostCache:
        cache = HostCache(self, number, store, space, num_slots, top_k, policy)
        self._kept.append((store, space))
        self.layers[number] = cache
        return cache

    def join(self) -> None:
        pass

    def close(self) -> None:
        self._close()


def _chunk_for(link: EmulatedLink | None) -> int:
    if link is None:
        return _CHUNK_BYTES
    return min(_CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, int(_CHUNK_SECONDS * link.gbps * 1e9)))


def _segment_table(store: HostStore, space: RowSpace) -> torch.Tensor:
    """One row per expert tensor, int64: address in the host store, stride there, address of the rows, row bytes."""
    return torch.tensor(
        [
            (view.data_ptr(), view.stride(0) * view.element_size(), space[name].data_ptr(), view[0].nbytes)
            for name, view in store.views.items()
        ],
        dtype=torch.int64,
    )
