"""Staging on a GPU, decided and done on the device: what csrc/cuda/gather_kernels.cuh copies, and on which stream.

Nothing here allocates, synchronises or reads a result, so every call can be captured in a CUDA graph. Lists of loads
are int32 tensors on the GPU that the plan kernel fills; their addresses never change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_expert_prefetch.experts.host_store import row_bytes
from vllm_expert_prefetch.experts.slot_pool import SlotPool
from vllm_expert_prefetch.native.library import cuda_library, why_not_cuda


class DeviceStagingError(RuntimeError):
    """The CUDA library is missing or refuses a layer; the text says what helps."""


@dataclass(frozen=True)
class DeviceStagingOptions:
    """Grid sizes in blocks of 512 threads (one fits beside others on an SM), and how often a prefetch may yield."""

    num_demand_blocks: int = 16
    num_prefetch_blocks: int = 8
    chunk_bytes: int = 64 * 1024


class DemandLists:
    """What the plan of a step asks for. All int32 on the GPU: `loads` (room, 2) of (expert, slot), `num_loads` (1),
    `late` (room) of slots that the prefetch lane is filling, `num_late` (1)."""

    def __init__(self, room: int, device: torch.device) -> None:
        self.loads = torch.zeros((room, 2), dtype=torch.int32, device=device)
        self.num_loads = torch.zeros(1, dtype=torch.int32, device=device)
        self.late = torch.zeros(room, dtype=torch.int32, device=device)
        self.num_late = torch.zeros(1, dtype=torch.int32, device=device)


class PrefetchLists:
    """What a prefetch plan asks for. All int32 on the GPU: `loads` (room, 2) of (expert, slot), most wanted first,
    `tickets` (room) from slot_state.h's enqueue, `num_loads` (1). Must not change while a prefetch runs."""

    def __init__(self, room: int, device: torch.device) -> None:
        self.loads = torch.zeros((room, 2), dtype=torch.int32, device=device)
        self.tickets = torch.zeros(room, dtype=torch.int32, device=device)
        self.num_loads = torch.zeros(1, dtype=torch.int32, device=device)


class DeviceLane:
    """What the layers of one GPU share: the side stream of prefetches, and the flag by which demands hold them up.

    A prefetch is forked from the current stream and joined before the step ends. Joining is what vLLM's offloader hooks
    need: `sync_prev_onload` (before a capture or a replay) and `join_after_forward` (before a capture ends).
    `num_joins` counts those that had something to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self.words = torch.zeros(2, dtype=torch.int32, device=self.device)
        self.stream = torch.cuda.Stream(self.device)
        self._forked = torch.cuda.Event()
        self._landed = torch.cuda.Event()
        self._is_ahead = False
        self.num_joins = 0

    def fork(self) -> int:
        """Order the side stream after everything on the current one. Returns its handle."""
        self._forked.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(self._forked)
        self._is_ahead = True
        return self.stream.cuda_stream

    def join(self) -> None:
        """Order the current stream after every prefetch since the last join; nothing when there was none.

        A prefetch that was forked outside a capture must be joined outside it, and one inside, inside.
        """
        if self._is_ahead:
            self._landed.record(self.stream)
            torch.cuda.current_stream(self.device).wait_event(self._landed)
            self._is_ahead = False
            self.num_joins += 1

    def num_errors(self) -> int:
        """Loads and waits that kernels refused since the start (see gather_kernels.cuh). Synchronises: for reports."""
        return int(self.words[1].item())


class DeviceStaging:
    """Copies records of one layer into `pool`, on the GPU's own initiative.

    `sources` are tensors (E, *row) by name: the views of a page-locked host store, or tensors on the GPU (the slots,
    when `pool` is the stream buffer; "expert" then means the place in the source). `slot_words` (C) int32 holds the
    words of slot_state.h, for the plan kernel. At most one prefetch of a layer may be on its way: join the lane before
    planning the next one.
    """

    def __init__(
        self,
        sources: Mapping[str, torch.Tensor],
        pool: SlotPool,
        lane: DeviceLane,
        options: DeviceStagingOptions | None = None,
    ) -> None:
        """DeviceStagingError without the CUDA library; ValueError or RuntimeError, with numbers, for memory that is
        not page-locked, or whose rows or strides are no multiples of 16 bytes."""
        self._library: Any = cuda_library()
        if self._library is None:
            raise DeviceStagingError(f"expert_prefetch: no staging on the GPU: {why_not_cuda()}")
        self.lane = lane
        self.options = options or DeviceStagingOptions()
        self.num_experts, self.num_slots = len(next(iter(sources.values()))), pool.num_slots
        self._layer = (_segment_table(self._library, sources, pool, lane.device), self.num_experts, self.num_slots)
        self._kept_alive = (dict(sources), pool)  # kernels hold their addresses
        self.record_bytes: int = self._library.check_layout(*self._layer)
        self._library.load_staging_kernels(lane.device.index)
        num_words = self._library.board_ints(self.num_slots)
        self._board = torch.zeros(num_words, dtype=torch.int32, device=lane.device)
        self.slot_words = self._board[: self.num_slots]

    def stage(self, lists: DemandLists) -> None:
        """Copy what `lists` name, then wait for its late slots, on the current stream: kernels launched on it later
        find all records there."""
        self._library.gather_records(
            *self._layer,
            lists.loads,
            lists.num_loads,
            lists.late,
            lists.num_late,
            self._board,
            self.lane.words,
            self.options.num_demand_blocks,
            self._current_stream(),
        )

    def await_late(self, lists: DemandLists) -> None:
        """Only wait for the late slots: for steps whose records came by `copy`."""
        self._library.await_slots(
            lists.late, lists.num_late, self.num_slots, self._board, self.lane.words, self._current_stream()
        )

    def prefetch(self, lists: PrefetchLists) -> None:
        """Copy what `lists` name on the lane's stream, after what is on the current stream now."""
        self._library.prefetch_records(
            *self._layer,
            lists.loads,
            lists.tickets,
            lists.num_loads,
            self._board,
            self.lane.words,
            self.options.num_prefetch_blocks,
            self.options.chunk_bytes,
            self.lane.fork(),
        )

    def copy(self, loads: Iterable[tuple[int, int]], batched: bool = True) -> None:
        """Copy `(expert, slot)` pairs known on the host, by the copy engines, on the current stream.

        For wide steps, filling, and as the reference. Leaves slot words alone. `batched` hands the driver all copies at
        once where it can (CUDA 13, outside captures and the default stream).
        """
        pairs = torch.tensor(list(loads), dtype=torch.int32).reshape(-1, 2)
        device = self.lane.device.index
        self._library.copy_records_async(*self._layer, pairs, device, batched, self._current_stream())

    def _current_stream(self) -> int:
        return torch.cuda.current_stream(self.lane.device).cuda_stream


def _segment_table(
    library: Any, sources: Mapping[str, torch.Tensor], pool: SlotPool, device: torch.device
) -> torch.Tensor:
    """One row per expert tensor, int64 on the CPU: address of the source as the GPU sees it, stride, address in the
    slots, stride, row bytes."""
    rows = []
    for name, source in sources.items():
        address = source.data_ptr()
        if not source.is_cuda:
            address = library.device_pointer(address, device.index)
        slots = pool.tensors[name]
        rows.append((address, _stride_bytes(source), slots.data_ptr(), _stride_bytes(slots), row_bytes(source)))
    return torch.tensor(rows, dtype=torch.int64)


def _stride_bytes(tensor: torch.Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()
