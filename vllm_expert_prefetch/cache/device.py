"""The expert cache on a GPU: planned and copied by kernels, nothing decided on the host.

Every step only launches kernels on tensors that stay where they are, so that it can be captured in a CUDA graph: a
replay plans with the ids of *its* step. Nothing here allocates, synchronises or reads a result on the way, but for
`measure_copy` and `check_integrity`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_expert_prefetch.cache.base import Caches, LayerCache, Rows, check_state, initial_state
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.row_space import RowSpace
from vllm_expert_prefetch.native.library import cuda_library

_MEASURED_COPIES = 8


@dataclass(frozen=True)
class DeviceOptions:
    """Grid sizes in blocks of 512 threads (one fits beside others on an SM), and how often a prefetch may yield."""

    num_demand_blocks: int = 16
    num_prefetch_blocks: int = 8
    chunk_bytes: int = 64 * 1024


class Orders:
    """What a plan leaves for the kernel that copies. All int32 on the GPU: `loads` (room, 2) of (expert, row),
    `num_loads` (1); `late` (room): rows that a step waits for, or the tickets of a prefetch's loads; `num_late` (1).
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self.loads = torch.zeros((room, 2), dtype=torch.int32, device=device)
        self.late = torch.zeros(room, dtype=torch.int32, device=device)
        self.num_loads, self.num_late = torch.zeros(2, dtype=torch.int32, device=device).split(1)


class DeviceCache(LayerCache):
    """One layer: its planner's state, the words of its rows (csrc/slot_state.h) and its orders, in GPU memory.

    At most one prefetch of a layer and distance is on its way: its orders must stay as they are until it has ended.
    `prefetch` joins the side stream where that is needed.
    """

    on_device = True

    def __init__(
        self,
        caches: "DeviceCaches",
        number: int,
        store: HostStore,
        space: RowSpace,
        num_slots: int,
        top_k: int,
        policy: str,
    ) -> None:
        super().__init__(store, space, num_slots, top_k)
        library, device = caches.library, caches.device
        self._caches, self._library, self.number = caches, library, number
        self._segments = _segment_table(library, store, space, device)
        library.check_layout(self._segments, self.num_experts)
        library.load_plan_kernels(self.num_experts, num_slots, device.index)
        state = initial_state(self.num_experts, num_slots, top_k, policy)
        self.state = state.to(device)
        self.board = torch.zeros(library.board_ints(self.num_experts), dtype=torch.int32, device=device)
        self.row_words = self.board[: self.num_experts]
        self.demand = Orders(self.num_experts, device)
        self.ahead = [Orders(self.num_experts, device) for _ in range(caches.depth)]
        """By distance, the nearest first."""
        self._ghosts: tuple[torch.Tensor | None, torch.Tensor | None, int] = None, None, 0
        """Their states, slots, and where their words go, as the GPU sees it."""
        self._mirror, self._mirror_address = caches.mirror[number], caches.mirror_address(number)
        self._mirror.copy_(state[: len(self._mirror)])
        for distance in range(1, caches.depth + 1):
            self.set_budget(num_slots, self.num_experts, distance)

    def serve(self, topk_ids: torch.Tensor, rows: Rows, speculated: bool = False) -> torch.Tensor:
        self._caches.claim_area(self, topk_ids, rows)
        topk_ids, orders = topk_ids.contiguous(), self.demand
        row_ids = torch.empty_like(topk_ids)
        self._caches.await_plans()
        self._library.plan_step(
            *(self.state, self.board, self._caches.lane, topk_ids, rows, row_ids),
            *(orders.loads, orders.num_loads, orders.late, orders.num_late),
            *(self._mirror_address, speculated, *self._ghosts, self._caches.current_stream()),
        )
        self.gather()
        return row_ids

    def gather(self) -> None:
        """Copy what `demand` names, then wait for its late slots, on the current stream."""
        orders, caches = self.demand, self._caches
        self._library.gather_records(
            *(self._segments, self.num_experts),
            *(orders.loads, orders.num_loads, orders.late, orders.num_late, self.board),
            *(caches.lane, caches.options.num_demand_blocks, caches.current_stream()),
        )

    def prefetch(self, predicted: torch.Tensor, rows: Rows, distance: int = 1) -> None:
        self._plan_ahead(predicted, rows, distance, False)

    def preload(self, predicted: torch.Tensor, rows: Rows) -> None:
        self._caches.preloaded = self
        self._plan_ahead(predicted, rows, 1, True)

    def _plan_ahead(self, predicted: torch.Tensor, rows: Rows, distance: int, preloads: bool) -> None:
        assert isinstance(rows, torch.Tensor)
        if predicted.dim() == 1:
            predicted = predicted.unsqueeze(0)
        if len(predicted) == 1 < len(rows):  # one guess for all tokens
            rows = rows.amax(0, keepdim=True)
        orders, caches = self.ahead[distance - 1], self._caches
        caches.join_if_busy(self.number, distance)
        self._library.plan_prefetch(
            *(self.state, self.board, caches.lane, predicted.contiguous(), rows),
            *(caches.budget_address(self.number, distance), distance > 1, preloads),
            *(orders.loads, orders.num_loads, orders.late, caches.current_stream()),
        )
        self.copy_ahead(distance)

    def copy_ahead(self, distance: int = 1) -> None:
        """Copy what `ahead` names on the side stream, after what is on the current stream now."""
        orders, caches = self.ahead[distance - 1], self._caches
        self._library.prefetch_records(
            *(self._segments, self.num_experts),
            *(orders.loads, orders.late, orders.num_loads, self.board, caches.lane),
            *(caches.options.num_prefetch_blocks, caches.options.chunk_bytes, caches.fork(self.number, distance)),
        )

    def set_budget(self, num_records: int, num_guesses: int, distance: int = 1) -> None:
        words = self._caches.budgets[self.number, distance - 1]
        words[0], words[1] = num_records, num_guesses

    def takes_guesses(self, distance: int = 1) -> bool:
        return True

    def _add_ghosts(self, num_slots: Sequence[int], states: torch.Tensor, mirror: torch.Tensor) -> None:
        library, device = self._library, self._caches.device
        library.load_plan_kernels(self.num_experts, max(num_slots), device.index)
        self._ghosts = (
            states.to(device),
            torch.tensor(num_slots, dtype=torch.int64, device="cpu"),
            mirror.data_ptr() + self._caches.ghosts_moved,
        )

    def words(self) -> Words:
        return Words._make(self._mirror.tolist())

    def join(self) -> None:
        self._caches.join()

    def measure_copy(self) -> float:
        row = self.num_experts - 1
        self.demand.loads[0] = torch.tensor((row, row), dtype=torch.int32)
        self.demand.num_loads.fill_(1)
        self.demand.num_late.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.gather()
        start.record()
        for _ in range(_MEASURED_COPIES):
            self.gather()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / _MEASURED_COPIES

    def check_integrity(self) -> None:
        check_state(self.state)


class DeviceCaches(Caches):
    """What the layers of one GPU share: the streams of prefetches, what demands and prefetches tell each other (Lane in
    csrc/record.h), and the host memory that the GPU writes words to and reads budgets from.

    Predictions and their plans are forked from the stream of the steps, and joined before the next layer is planned;
    copies are forked from the plans, and joined before their orders are used again. In eager steps the first layer
    whose orders are still in use joins, for all layers. Captures join before they end, and before vLLM captures
    or replays it joins what was sent outside: what was forked inside is never joined outside, nor the other way round.
    vLLM's offloader hooks call `join` there: `sync_prev_onload` (before a capture or a replay) and `join_after_forward`
    (before a capture ends).
    """

    engine_name = "cuda"
    on_device = True

    def __init__(
        self, num_layers: int, device: torch.device, options: DeviceOptions | None = None, depth: int = 1
    ) -> None:
        library: Any = cuda_library()
        self.library = library
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.options = options or DeviceOptions()
        mirror_bytes = 8 * num_layers * len(Words._fields)
        shared = HostMemory(mirror_bytes + 8 * num_layers * depth, HostMemoryOptions(pin=True, cuda=True)).bytes
        super().__init__(num_layers, shared[:mirror_bytes].view(torch.int64).view(num_layers, -1), None, depth)
        self.budgets = shared[mirror_bytes:].view(torch.int32).view(num_layers, depth, 2)
        """(L, depth, 2) int32: how many records a prefetch may bring, and how many guesses of each row count. Every run
        of a plan reads those of its layer and distance."""
        self._shared_address: int = library.device_pointer(shared.data_ptr(), self.device.index)
        library.load_gather_kernels(self.device.index)
        self.lane = torch.zeros(library.lane_ints(), dtype=torch.int32, device=self.device)
        # Of high priority: a copy that starts late hides behind less.
        self.stream, self._planner = (torch.cuda.Stream(self.device, priority=-1) for _ in range(2))
        self._forked, self._landed, self._begun, self._planned = (torch.cuda.Event() for _ in range(4))
        self._busy: set[tuple[int, int]] = set()
        """(layer, distance) of prefetches that were not joined."""
        self.ghosts_moved = 0
        """From where the words of ghost caches are in host memory to where the GPU sees them."""
        self._is_planning = False
        self._is_closed = False

    def add(
        self, number: int, store: HostStore, space: RowSpace, num_slots: int, top_k: int, policy: str
    ) -> DeviceCache:
        cache = DeviceCache(self, number, store, space, num_slots, top_k, policy)
        self.layers[number] = cache
        return cache

    def _create_ghost_mirror(self, num_ghosts: int) -> torch.Tensor:
        like = super()._create_ghost_mirror(num_ghosts)
        shared = HostMemory(like.nbytes, HostMemoryOptions(pin=True, cuda=True)).bytes
        base = shared.data_ptr()
        self.ghosts_moved = self.library.device_pointer(base, self.device.index) - base
        return shared[: like.nbytes].view(torch.int64).view_as(like)

    def mirror_address(self, number: int) -> int:
        """Of the words of a layer, as the GPU sees it."""
        return self._shared_address + number * 8 * self.mirror.shape[1]

    def budget_address(self, number: int, distance: int = 1) -> int:
        """Of the budget of a layer and distance, as the GPU sees it."""
        return self._shared_address + self.mirror.nbytes + 8 * (number * self.depth + distance - 1)

    def current_stream(self) -> int:
        """The handle of the stream that steps run on. Raises RuntimeError once closed."""
        if self._is_closed:
            raise RuntimeError("expert_prefetch: the expert caches are closed")
        return torch.cuda.current_stream(self.device).cuda_stream

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._begun.record(torch.cuda.current_stream(self.device))
        self._planner.wait_event(self._begun)
        with torch.cuda.stream(self._planner):
            yield
        self._planned.record(self._planner)
        self._is_planning = True

    def await_plans(self) -> None:
        """Order the current stream after what was launched `aside`."""
        if self._is_planning:
            torch.cuda.current_stream(self.device).wait_event(self._planned)
            self._is_planning = False

    def fork(self, number: int, distance: int) -> int:
        """Order the side stream after everything on the current one, for a prefetch of layer `number`; its handle."""
        self._forked.record(torch.cuda.current_stream(self.device))
        self.stream.wait_event(self._forked)
        self._busy.add((number, distance))
        return self.stream.cuda_stream

    def join(self) -> None:
        self.await_plans()
        self._join_copies()

    def _join_copies(self) -> None:
        if self._busy:
            self._landed.record(self.stream)
            torch.cuda.current_stream(self.device).wait_event(self._landed)
            self._busy.clear()

    def join_if_busy(self, number: int, distance: int) -> None:
        """Join all copies if a prefetch of this layer and distance has not been joined yet."""
        if (number, distance) in self._busy:
            self._join_copies()

    def num_errors(self) -> int:
        """Loads and waits that kernels refused since the start (csrc/cuda/gather_kernels.cuh). Synchronises."""
        return sum(int(cache.board[-1].item()) for cache in self.layers if isinstance(cache, DeviceCache))

    def close(self) -> None:
        self._is_closed = True
        self.stream.synchronize()


def _segment_table(library: Any, store: HostStore, space: RowSpace, device: torch.device) -> torch.Tensor:
    """One row per expert tensor, int64 on the CPU: address in the host store as the GPU sees it, stride there, address
    of the rows, row bytes."""
    assert store.memory is not None, "a GPU reads what is page-locked for it"
    base = store.memory.bytes.data_ptr()
    moved = library.device_pointer(base, device.index) - base  # asked for where the mapping begins: there it is defined
    return torch.tensor(
        [
            (
                view.data_ptr() + moved,
                view.stride(0) * view.element_size(),
                space[name].data_ptr(),
                view[0].nbytes,
            )
            for name, view in store.views.items()
        ],
        dtype=torch.int64,
    )
