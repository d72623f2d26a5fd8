"""Staging: moving expert records from the host store into slots."""

import time
from collections.abc import Iterable, Sequence

import torch

from vllm_expert_prefetch.experts.host_store import HostStore
from vllm_expert_prefetch.experts.link import EmulatedLink
from vllm_expert_prefetch.experts.slot_pool import SlotPool

_Record = tuple[torch.Tensor, ...]
"""One row of every expert tensor."""


class TorchStaging:
    """Copies records with torch, one copy per expert tensor, in the order of the current stream.

    On a GPU the copies are asynchronous when the host store is page-locked, and ordered before any kernel launched
    later on the same stream. On CPU a record has landed when `stage` returns. `total_bytes` and `total_seconds` count
    what `stage` moved and how long it took since `reset_totals`.
    """

    name = "torch"

    def __init__(self, store: HostStore, pool: SlotPool, link: EmulatedLink | None) -> None:
        self.record_bytes = store.record_bytes
        self.total_bytes = 0
        self.total_seconds = 0.0
        self._link = link
        self._sources = store.records
        self._targets = pool.records

    def stage(self, loads: Iterable[tuple[int, int]]) -> None:
        """Copy `(expert, slot)` pairs for a step."""
        self._stage(loads, self._targets)

    def _stage(self, loads: Iterable[tuple[int, int]], places: Sequence[_Record]) -> None:
        started = time.perf_counter()
        num_bytes = self.record_bytes * self._copy(loads, places)
        if self._link:
            self._link.wait(started, num_bytes)
        self.total_bytes += num_bytes
        self.total_seconds += time.perf_counter() - started

    def stage_stream(self, loads: Iterable[tuple[int, int]], kept: Iterable[tuple[int, int]], buffer: SlotPool) -> None:
        """Bring a wide step's experts into `buffer`, expert e at place e.

        `loads` are `(expert, expert)` pairs to copy from the host; `kept` are `(expert, slot)` pairs to copy from the
        slots, which is not counted: on a GPU it does not cross the link.
        """
        with torch.no_grad():
            for expert, slot in kept:
                _copy_record(self._targets[slot], buffer.records[expert])
        self._stage(loads, buffer.records)

    def reset_totals(self) -> None:
        """Start counting again."""
        self.total_bytes, self.total_seconds = 0, 0.0

    def fill(self, loads: Iterable[tuple[int, int]]) -> None:
        """Copy `(expert, slot)` pairs outside any step: not counted, not slowed down."""
        self._copy(loads, self._targets)

    def _copy(self, loads: Iterable[tuple[int, int]], places: Sequence[_Record]) -> int:
        num_records = 0
        with torch.no_grad():
            for expert, place in loads:
                _copy_record(self._sources[expert], places[place])
                num_records += 1
        return num_records


def _copy_record(source: _Record, target: _Record) -> None:
    for target_row, source_row in zip(target, source, strict=True):
        target_row.copy_(source_row, non_blocking=True)
