"""Staging by the native engine (csrc/host/staging_engine.h): demand copies, and prefetches on a thread of its own."""

import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any

import torch

from vllm_expert_prefetch.experts.host_store import HostStore, row_bytes
from vllm_expert_prefetch.experts.link import EmulatedLink
from vllm_expert_prefetch.experts.slot_pool import SlotPool
from vllm_expert_prefetch.native.library import host_library, why_not_host

CHUNK_BYTES = 256 * 1024
"""A prefetch goes over the link in chunks of this size: what a demand waits for at most."""
_CHUNK_SECONDS, _LEAST_CHUNK_BYTES = 200e-6, 1024
"""Over a slow link, in chunks that last so long."""

_NO_LOADS = torch.empty(0, 2, dtype=torch.int32)
_NO_SLOTS = torch.empty(0, dtype=torch.int32)


class SlotState(IntEnum):
    """What is happening to a slot; csrc/slot_state.h has the transitions."""

    READY = 0
    QUEUED = 1
    COPYING = 2
    CLAIMED = 3
    DROPPED = 4
    URGENT = 5


class StagingLane:
    """The link of one worker and the thread that prefetches over it, shared by all layers.

    It keeps the memory of its layers alive, and its thread ends with it, at `close` or at exit. In a forked child
    every call raises RuntimeError.
    """

    def __init__(self, link: EmulatedLink | None, chunk_bytes: int | None = None) -> None:
        """`chunk_bytes`: what a demand waits for at most; None chooses it.

        Raises RuntimeError when the native host library is not there, ValueError for numbers that make no sense.
        """
        library = host_library()
        if library is None:
            raise RuntimeError(f"native staging needs the native host library: {why_not_host()}")
        self.library = library
        gbps, latency_us = (link.gbps, link.latency_us) if link else (0.0, 0.0)
        self.chunk_bytes = _chunk_for(link) if chunk_bytes is None else chunk_bytes
        self.engine = library.staging_create(gbps, latency_us, self.chunk_bytes)
        self._kept: list[Sequence[torch.Tensor]] = []
        self._close = weakref.finalize(self, library.staging_close, self.engine)

    def add_layer(self, sources: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], count_as: int) -> int:
        """Tell the engine where the rows of a layer lie, and get its index there.

        `sources[name]` has shape (E, *row), `targets[name]` (C, *row), both of one dtype, on the CPU and with
        contiguous rows. `count_as`: bytes that a record counts as and takes on the link, padding included.
        """
        segments = [_segment(name, source, targets[name]) for name, source in sources.items()]
        num_experts, num_slots = (len(next(iter(tensors.values()))) for tensors in (sources, targets))
        self._kept.append([*sources.values(), *targets.values()])
        rows = torch.tensor(segments, dtype=torch.int64)
        return int(self.library.staging_add_layer(self.engine, rows, num_experts, num_slots, count_as))

    def counters(self) -> dict[str, float]:
        """Totals of all layers; StagingCounters in csrc/host/staging_engine.h says what they are."""
        return dict(self.library.staging_counters(self.engine))

    def close(self) -> None:
        """End the thread; what is queued is dropped, and every later call raises RuntimeError."""
        self._close()


class NativeStaging:
    """Stages one layer through a StagingLane. CPU tensors only.

    A record has landed when `stage` returns. `total_bytes` and `total_seconds` count what demands moved and how long
    they took since `reset_totals`. Calls with experts or slots that do not exist, or with slots in the wrong state,
    raise ValueError and change nothing.
    """

    name = "native"

    def __init__(self, store: HostStore, pool: SlotPool, lane: StagingLane) -> None:
        self.record_bytes = store.record_bytes
        self.lane = lane
        self._library = lane.library
        self._engine = lane.engine
        self._store = store
        self._pool = pool
        self.layer = lane.add_layer(store.views, pool.tensors, store.record_bytes)
        self._streams: dict[SlotPool, tuple[int, int]] = {}

    def stage(self, loads: Iterable[tuple[int, int]], late_slots: Sequence[int] = ()) -> None:
        """Copy `(expert, slot)` pairs for a step, and see to it that the prefetches into `late_slots` have landed."""
        self._library.staging_demand(self._engine, self.layer, _pairs(loads), _slots(late_slots))

    def stage_stream(self, loads: Iterable[tuple[int, int]], kept: Iterable[tuple[int, int]], buffer: SlotPool) -> None:
        """Bring a wide step's experts into `buffer`, expert e at place e.

        `loads` are `(expert, expert)` pairs to copy from the host; `kept` are `(expert, slot)` pairs to copy from the
        slots, which is not counted: on a GPU it does not cross the link. Prefetches into these slots land first.
        """
        from_store, from_pool = self._stream(buffer)
        kept = list(kept)
        if kept:
            self.stage((), [slot for _, slot in kept])
            self._library.staging_fill(self._engine, from_pool, _pairs((slot, expert) for expert, slot in kept))
        self._library.staging_demand(self._engine, from_store, _pairs(loads), _NO_SLOTS)

    def fill(self, loads: Iterable[tuple[int, int]]) -> None:
        """Copy `(expert, slot)` pairs outside any step: not counted, not slowed down."""
        self._library.staging_fill(self._engine, self.layer, _pairs(loads))

    def prefetch(self, loads: Iterable[tuple[int, int]]) -> None:
        """Queue `(expert, slot)` pairs, most urgent first, behind what is queued already. Returns at once."""
        self._library.staging_prefetch(self._engine, self.layer, _pairs(loads))

    def cancel(self, slots: Sequence[int]) -> list[int]:
        """Drop the prefetches into `slots` that have not started; the slots of those, which are free at once."""
        dropped = torch.zeros(len(slots), dtype=torch.int8)
        self._library.staging_cancel(self._engine, self.layer, _slots(slots), dropped)
        return [slot for slot, was_dropped in zip(slots, dropped.tolist(), strict=True) if was_dropped]

    def state(self, slot: int) -> SlotState:
        """What is happening to `slot`."""
        return SlotState(self._library.staging_state(self._engine, self.layer, slot))

    def landed(self, slot: int) -> bool:
        """Whether no copy into `slot` is planned or running."""
        return self.state(slot) is SlotState.READY

    def wait_all(self) -> None:
        """A demand for everything that is in flight in this layer."""
        self._library.staging_wait_all(self._engine, self.layer)

    def slot_words(self) -> torch.Tensor:
        """The int32 words (C) of csrc/slot_state.h, the engine's own memory, for a planner in the same thread."""
        return torch.from_dlpack(self._library.staging_slot_words(self._engine, self.layer))

    @property
    def total_bytes(self) -> int:
        """Bytes that demands copied."""
        return sum(int(totals[0]) for totals in self._totals())

    @property
    def total_seconds(self) -> float:
        """Seconds that demands lasted, waiting for prefetches included."""
        return sum(float(totals[1]) for totals in self._totals())

    @property
    def total_late_seconds(self) -> float:
        """Seconds that demands waited for prefetches whose copy had started."""
        return sum(float(totals[2]) for totals in self._totals())

    def reset_totals(self) -> None:
        """Start counting again."""
        for layer in self._counted_layers():
            self._library.staging_reset_totals(self._engine, layer)

    def _totals(self) -> list[Sequence[Any]]:
        return [self._library.staging_totals(self._engine, layer) for layer in self._counted_layers()]

    def _counted_layers(self) -> list[int]:
        return [self.layer, *(from_store for from_store, _ in self._streams.values())]

    def _stream(self, buffer: SlotPool) -> tuple[int, int]:
        """The engine's layers whose slots are the places of `buffer`: from the host store, and from the slots."""
        if buffer not in self._streams:
            self._streams[buffer] = (
                self.lane.add_layer(self._store.views, buffer.tensors, self.record_bytes),
                self.lane.add_layer(self._pool.tensors, buffer.tensors, self.record_bytes),
            )
        return self._streams[buffer]


def _chunk_for(link: EmulatedLink | None) -> int:
    if link is None:
        return CHUNK_BYTES
    return min(CHUNK_BYTES, max(_LEAST_CHUNK_BYTES, int(_CHUNK_SECONDS * link.gbps * 1e9)))


def _segment(name: str, source: torch.Tensor, target: torch.Tensor) -> list[int]:
    """[store address, store stride, pool address, pool stride, row bytes], in bytes."""
    for tensor in (source, target):
        if tensor.device.type != "cpu":
            raise ValueError(f"native staging copies between CPU tensors, {name} is on {tensor.device}")
        if not tensor[0].is_contiguous():
            raise ValueError(f"the rows of {name} are not contiguous: strides {tensor.stride()}")
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
        raise ValueError(
            f"{name}: rows of {source.dtype} {tuple(source.shape[1:])} do not fit slots of {target.dtype} "
            f"{tuple(target.shape[1:])}"
        )
    places = [(tensor.data_ptr(), tensor.stride(0) * tensor.element_size()) for tensor in (source, target)]
    return [*chain.from_iterable(places), row_bytes(source)]


def _pairs(loads: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int32 (n, 2)."""
    numbers = array("i", chain.from_iterable(loads))
    return torch.frombuffer(numbers, dtype=torch.int32).view(-1, 2) if numbers else _NO_LOADS


def _slots(slots: Sequence[int]) -> torch.Tensor:
    """int32 (n)."""
    return torch.frombuffer(array("i", slots), dtype=torch.int32) if slots else _NO_SLOTS
