"""The expert cache of one layer on a GPU: planned and staged by kernels, nothing decided on the host.

Every method only launches kernels on tensors that stay where they are, so that a step can be captured in a CUDA graph:
a replay plans with the ids of *its* step.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from vllm_expert_prefetch.experts.device_staging import DemandLists, DeviceLane, DeviceStaging, PrefetchLists
from vllm_expert_prefetch.experts.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.experts.host_store import HostStore
from vllm_expert_prefetch.experts.native_planner import HEADER_WORDS, NativePlanner
from vllm_expert_prefetch.experts.slot_pool import SlotPool
from vllm_expert_prefetch.native.library import cuda_library, host_library

_MIRROR_BYTES, _BUDGET_BYTES = 8 * HEADER_WORDS, 4
"""Of the host memory that a layer shares with the GPU: the totals, which the GPU writes, and then the budget of
prefetches, which it reads."""


class CopyEngine:
    """Copies that the host decides, by the copy engines: to measure the link with."""

    def __init__(self, staging: DeviceStaging) -> None:
        self.record_bytes = staging.record_bytes
        self._staging = staging

    def stage(self, loads: Sequence[tuple[int, int]]) -> None:
        """Copy `(expert, slot)` pairs on the current stream."""
        self._staging.copy(loads)

    def reset_totals(self) -> None:
        """Nothing is counted."""


class DeviceLayerCache:
    """C slots for the experts of one layer, and what says who is in them, in GPU memory."""

    name = "cuda"

    def __init__(
        self, store: HostStore, pool: SlotPool, buffer: SlotPool | None, lane: DeviceLane, top_k: int, policy: str
    ) -> None:
        """`buffer`: the stream buffer, when there is one. Starts with expert s in slot s.

        Raises ValueError, with the numbers, for a layer that the planner does not take.
        """
        self.num_slots = pool.num_slots
        self.top_k = top_k
        self.staging = DeviceStaging(store.views, pool, lane)
        planner = NativePlanner(host_library(), store.num_experts, pool.num_slots, top_k, policy, 0, False)
        planner.fill()
        self._state = planner.state.to(lane.device)
        library: Any = cuda_library()  # there, or DeviceStaging would have said why not
        self._library = library
        self._lane = lane
        self._demand = DemandLists(pool.num_slots, lane.device)
        self._ahead = PrefetchLists(pool.num_slots, lane.device)
        self._joins_when_sent = -1
        shared = HostMemory(_MIRROR_BYTES + _BUDGET_BYTES, HostMemoryOptions(pin=True, cuda=True)).bytes
        self._mirror_address = library.device_pointer(shared.data_ptr(), lane.device.index)
        self._totals = shared[:_MIRROR_BYTES].view(torch.int64)
        self._budget_address = self._mirror_address + _MIRROR_BYTES
        self._budget = shared[_MIRROR_BYTES:].view(torch.int32)
        self.set_prefetch_budget(pool.num_slots)
        self._buffer_from_store = DeviceStaging(store.views, buffer, lane) if buffer else None
        self._buffer_from_pool = DeviceStaging(pool.tensors, buffer, lane) if buffer else None
        self._absent = DemandLists(store.num_experts, lane.device)
        self._kept = DemandLists(store.num_experts, lane.device)
        self.staging.copy((slot, slot) for slot in range(pool.num_slots))

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed, as the GPU has last written it."""
        num_free, num_in_flight = self._totals[8:10].tolist()
        return self.num_slots - num_free - num_in_flight

    @property
    def copier(self) -> "CopyEngine":
        """What `measure_bandwidth` asks for copies."""
        return CopyEngine(self.staging)

    @property
    def can_stream(self) -> bool:
        """Whether there is a stream buffer."""
        return self._buffer_from_store is not None

    @property
    def tokens_per_wave(self) -> int:
        """Tokens whose routed experts always fit into the slots."""
        return self.num_slots // self.top_k

    def num_waves(self, num_tokens: int) -> int:
        """How many waves of whole tokens a step of `num_tokens` takes at most, whatever its routing."""
        return math.ceil(num_tokens / self.tokens_per_wave)

    def serve(self, topk_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Bring what these tokens need: their slot ids, in the shape and type of `topk_ids`.

        `topk_ids` (T, K) int32 or int64, at most `tokens_per_wave` rows; `real` (T) int64, negative for padding, which
        gets some valid slots. A kernel that is launched next on this stream finds every record.
        """
        slot_ids, demand = torch.empty_like(topk_ids), self._demand
        self._library.plan_step(
            *(self._state, self.staging.slot_words, topk_ids, real, slot_ids),
            *(demand.loads, demand.num_loads, demand.late, demand.num_late),
            *(self._mirror_address, torch.cuda.current_stream(self._lane.device).cuda_stream),
        )
        self.staging.stage(demand)
        return slot_ids

    def stream(self, topk_ids: torch.Tensor, real: torch.Tensor) -> None:
        """Bring what these tokens need into the stream buffer, expert e to place e; residency does not change."""
        assert self._buffer_from_store is not None
        assert self._buffer_from_pool is not None
        absent, kept = self._absent, self._kept
        self._library.plan_stream(
            *(self._state, self.staging.slot_words, topk_ids, real),
            *(absent.loads, absent.num_loads, kept.loads, kept.num_loads),
            *(self._mirror_address, torch.cuda.current_stream(self._lane.device).cuda_stream),
        )
        self._buffer_from_store.stage(absent)
        self._buffer_from_pool.stage(kept)

    def prefetch(self, predicted: torch.Tensor, real: torch.Tensor) -> None:
        """Bring what is predicted and absent, on the lane's stream; what the next `serve` does not need and has not
        started by then is cancelled.

        `predicted` (R, P) int32 or int64, most wanted first, negative for none: what every row wants most comes first.
        `real` (R) int64, negative for padding.

        A prefetch and the next one of this layer share lists: the first must be through. Captures join the lane before
        they end, and before vLLM captures or replays it joins what was sent outside: what was forked inside is never
        joined outside, nor the other way round. In eager steps nobody joins, so the first layer whose lists are still
        in use does, for all layers of the step.
        """
        if self._joins_when_sent == self._lane.num_joins:
            self._lane.join()
        ahead = self._ahead
        self._library.plan_prefetch(
            *(self._state, self.staging.slot_words, predicted, real, self._budget_address),
            *(ahead.loads, ahead.num_loads, ahead.tickets),
            torch.cuda.current_stream(self._lane.device).cuda_stream,
        )
        self.staging.prefetch(ahead)
        self._joins_when_sent = self._lane.num_joins

    def set_prefetch_budget(self, num_records: int) -> None:
        """How many records a prefetch may bring from now on, 0 for none: also in graphs that were captured before."""
        self._budget[0] = num_records

    def totals(self) -> list[int]:
        """The totals in front of the planner's state (csrc/residency.h), as the GPU has last written them.

        Read from host memory that the GPU writes to: no synchronisation, and at most a step behind.
        """
        return self._totals.tolist()
