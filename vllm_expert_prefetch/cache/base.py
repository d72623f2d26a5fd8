"""The contract of the expert cache: what serving and look-ahead ask for, whatever the platform.

* `serve`: one step of a layer; every record it needs is there before a kernel that is launched next.
* `prefetch`: copies that a guess asks for, behind what is queued already. A guess has a distance: how many layers ahead
  of the one that computes its layer is. A far guess, of a distance above 1, is only for a link that would idle.
* `preload`: the same for a wide step of the layer that comes next, overflow rows included.
* `set_budget`: how many records one prefetch may bring, for each distance.
* `add_ghosts`: larger caches that hold no records, for which every step is planned and counted as well.
* `words`: what happened so far, as last written; reading it waits for nothing.
* `check_integrity`: the books against each other.

One implementation per platform: `host` (C++ on the CPU platform) and `device` (CUDA).
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.memory.row_space import RowSpace
from vllm_expert_prefetch.native.library import host_library
from vllm_expert_prefetch.residency import POLICIES, Ranking

Rows = int | torch.Tensor
"""Which rows of a step are tokens. On the host their number: the first ones are. On a GPU int64 (T), negative for
padding: a tensor that vLLM fills before each replay of a captured step."""


class LayerCache(ABC):
    """C slots and E - C overflow rows for the experts of one MoE layer."""

    on_device: ClassVar[bool]
    """As `Caches` has it."""
    state: torch.Tensor
    """The planner's, int64, on its device: see csrc/residency.h."""

    def __init__(self, store: HostStore, space: RowSpace, num_slots: int, top_k: int) -> None:
        self.store = store
        self.tensors = space
        self.num_experts, self.num_slots, self.top_k = store.num_experts, num_slots, top_k
        self.record_bytes = store.record_bytes
        self.expert_map: torch.Tensor | None = None
        """Where this rank has a share of the experts: (routed experts + 1,) int32, their numbers here or -1; the last
        is -1, where negative ids lead."""

    @abstractmethod
    def serve(self, topk_ids: torch.Tensor, rows: Rows, speculated: bool = False) -> torch.Tensor:
        """Serve one step: plan it, bring what is absent, and return the row of each id.

        `topk_ids` (T, K) int32 or int64, negative for none; the result has the same shape and dtype. A negative id
        stays -1; other ids of padding rows get some row that is there. `speculated`: the step executes a guess.
        Changes residency and the words. On a GPU nothing is awaited: a kernel launched next on this stream finds every
        record. Raises RuntimeError once the cache is closed.
        """

    @abstractmethod
    def prefetch(self, predicted: torch.Tensor, rows: Rows, distance: int = 1) -> None:
        """Queue copies of `predicted` experts that are neither resident nor on their way: as many as the budget says.

        `predicted` (R, P) or (P,) int32 or int64, most wanted first, negative for none. Cancels copies for this layer
        that have not begun and are predicted no more. A far guess may bring as many fewer as wait for the link, and in
        place of no expert that was needed within a round. Returns at once.
        """

    @abstractmethod
    def preload(self, predicted: torch.Tensor, rows: Rows) -> None:
        """Queue copies of all `predicted` experts, neither resident nor on their way, ahead of a step of this layer,
        the next to be served.

        `predicted` (R, P) int32 or int64, of the step's tokens in their order, each token's most wanted first, negative
        for none. Where the first top-k of each are at most C experts, it is a `prefetch`. Else what the last tokens
        want takes slots as in a wide step, and the others take overflow rows: in an area that the layer being served
        now does not use.
        """

    @abstractmethod
    def set_budget(self, num_records: int, num_guesses: int, distance: int = 1) -> None:
        """From now on one prefetch may bring so many records, 0 for none, of the first `num_guesses` of each row of a
        guess: also in graphs that were captured before."""

    @abstractmethod
    def takes_guesses(self, distance: int = 1) -> bool:
        """Whether a guess may be of use. On a GPU always: the budget is read when a captured step runs."""

    def add_ghosts(self, num_slots: Sequence[int], mirror: torch.Tensor) -> None:
        """From now on plan every step for ghost caches as well: planners of `num_slots` (G) slots each, of this layer's
        policy, that hold no record and know of no prefetch. `mirror` (G, len(Words)) int64, of `Caches.add_ghosts`:
        their words, written after each step.

        Changes no residency and none of this cache's words. Raises ValueError where the numbers do not fit.
        """
        policy = list(POLICIES)[self.words().policy]
        states = [initial_state(self.num_experts, slots, self.top_k, policy) for slots in num_slots]
        self._add_ghosts(num_slots, torch.cat(states), mirror)

    @abstractmethod
    def _add_ghosts(self, num_slots: Sequence[int], states: torch.Tensor, mirror: torch.Tensor) -> None:
        """`states`: fresh ones of all ghosts, one after another, int64 on the CPU."""

    @abstractmethod
    def words(self) -> Words:
        """The words in front of the planner's state, as last written. Changes nothing, waits for nothing."""

    def join(self) -> None:  # noqa: B027 - nothing to do on the host
        """Order what is launched next after every prefetch so far, as `Caches.join` does."""

    @abstractmethod
    def measure_copy(self) -> float:
        """Seconds that one record takes from the host store into a row. Not while steps run; counted nowhere."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError, saying which, when an invariant of `residency.ExpertCache` is broken. For tests."""

    def local(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """What `serve` and `prefetch` take: for ids as the router gives them, of the same shape and dtype, the numbers
        of these experts among this rank's; -1 for those of other ranks and for negative ids."""
        return expert_ids if self.expert_map is None else mapped(self.expert_map, expert_ids)

    @property
    def num_routed(self) -> int:
        """Experts that the router chooses from, those of other ranks included."""
        return self.num_experts if self.expert_map is None else len(self.expert_map) - 1

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""
        return self.words().num_resident


class Caches(ABC):
    """The caches of one worker's MoE layers, which share a link, a prefetch lane, and the tensor of their words."""

    engine_name: ClassVar[str]
    on_device: ClassVar[bool]
    """Whether decisions are made on a GPU, without the host."""

    def __init__(self, num_layers: int, mirror: torch.Tensor, link: EmulatedLink | None, depth: int) -> None:
        """`mirror` (L, len(Words)) int64: row l holds the words of MoE layer l, as last written. `depth`: the greatest
        distance of a guess."""
        self.layers: list[LayerCache | None] = [None] * num_layers
        """By number among the MoE layers; None where every expert is resident, and nothing is planned."""
        self.mirror = mirror
        self.link = link
        self.depth = depth
        self.ghost_mirror: torch.Tensor | None = None
        """(L, G, len(Words)) int64: the words of each layer's ghost caches, as last written; None without any."""
        self.preloaded: LayerCache | None = None
        """The layer that is next, if copies for it may be on their way to overflow rows."""

    @abstractmethod
    def add(
        self, number: int, store: HostStore, space: RowSpace, num_slots: int, top_k: int, policy: str
    ) -> LayerCache:
        """The cache of MoE layer `number`, all slots free. Raises ValueError where the numbers do not fit."""

    def add_ghosts(self, scales: Sequence[float]) -> None:
        """From now on each layer also plans its steps for ghost caches of so many times its slots, rounded down, the
        experts at most.

        Raises ValueError where that cannot be planned here.
        """
        mirror = self._create_ghost_mirror(len(scales))
        for number, cache in enumerate(self.layers):
            if cache is not None:
                slots = [min(cache.num_experts, int(scale * cache.num_slots)) for scale in scales]
                cache.add_ghosts(slots, mirror[number])
        self.ghost_mirror = mirror

    def _create_ghost_mirror(self, num_ghosts: int) -> torch.Tensor:
        """`ghost_mirror`, zeros, in memory that the planner can write to."""
        return torch.zeros(len(self.layers), num_ghosts, len(Words._fields), dtype=torch.int64)

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Within it, predictions and `prefetch` may run beside the layer's kernel; the next `serve` comes after them.

        Nothing on the host, where they run at once.
        """
        return contextlib.nullcontext()

    def measure_bandwidth(self) -> float:
        """Bytes per second of copies of one record each, one of every layer, its fastest of three; 0 without a cache.

        Three passes over the layers, so that a record is not still in the processor's own cache the second time.
        """
        caches = [cache for cache in self.layers if cache is not None]
        passes = [[cache.measure_copy() for cache in caches] for _ in range(3)]
        seconds = sum(map(min, zip(*passes, strict=True)))
        return sum(cache.record_bytes for cache in caches) / seconds if seconds else 0.0

    def claim_area(self, cache: LayerCache, topk_ids: torch.Tensor, rows: Rows) -> None:
        """Called by each layer before it plans a step: nothing is on its way to overflow rows but for this layer.

        Only a step that broke off can have left something behind. One of no token, for that layer, ends it.
        """
        preloaded, self.preloaded = self.preloaded, None
        if preloaded is not None and preloaded is not cache:
            preloaded.serve(topk_ids[:0], 0 if isinstance(rows, int) else rows[:0])

    @abstractmethod
    def join(self) -> None:
        """Order what is launched next after every prefetch so far; nothing to do on the host."""

    @abstractmethod
    def close(self) -> None:
        """End the prefetch lane and drop what is queued; later calls raise RuntimeError."""


def initial_state(num_experts: int, num_slots: int, top_k: int, policy: str) -> torch.Tensor:
    """A planner's state with every slot free, int64 on the CPU. Raises ValueError, with the numbers."""
    library: Any = host_library()
    state = torch.zeros(library.planner_words(num_experts, num_slots), dtype=torch.int64)
    library.planner_init(state, num_experts, num_slots, top_k, list(POLICIES).index(policy))
    return state


def mapped(expert_map: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Where `expert_map` (its last item for -1) leads each of `expert_ids`, of their shape and dtype."""
    return expert_map[expert_ids.long()].to(expert_ids.dtype)


def check_tables(row_of: list[int], expert_in: list[int], flags: list[int], free: list[int], words: Words) -> None:
    """Raise AssertionError when the tables behind the words (csrc/residency.h) contradict each other."""
    ranked, in_flight = 1, 4
    placed = {expert: row for expert, row in enumerate(row_of) if row >= 0}
    inverse = {expert: row for row, expert in enumerate(expert_in) if expert >= 0}
    assert placed == inverse, f"row_of and expert_in are not inverse: {placed} and {inverse}"
    preloaded = {expert for expert, row in placed.items() if row >= words.num_slots}
    assert words.num_preloaded == len(preloaded), f"{words.num_preloaded} counted, preloaded are {preloaded}"
    states = {expert: flag & (ranked | in_flight) for expert, flag in enumerate(flags) if flag & (ranked | in_flight)}
    assert states.keys() | preloaded == placed.keys(), f"ranked or in flight are {states.keys()} of {placed.keys()}"
    assert set(states.values()) <= {ranked, in_flight}, f"both ranked and in flight: {states}"
    assert words.num_in_flight == list(states.values()).count(in_flight), f"{words.num_in_flight} counted: {states}"
    empty = [slot for slot, expert in enumerate(expert_in[: words.num_slots]) if expert < 0]
    assert sorted(free[: words.num_free]) == empty, f"free list {free[: words.num_free]}, empty slots {empty}"


def tables_of(state: torch.Tensor) -> tuple[Words, list[list[int]]]:
    """A planner's whole state, an int64 tensor: its words; row_of, flags, last, count, expert_in and free slots."""
    numbers = state.tolist()
    words = Words._make(numbers[: len(Words._fields)])
    tables, start = [], len(Words._fields)
    for size in [*[words.num_experts] * 5, words.num_slots]:
        tables.append(numbers[start : start + size])
        start += size
    return words, tables


def by_hotness(state: torch.Tensor) -> list[int]:
    """Every expert of a planner's whole state as its policy ranks them, the hottest last, behind all without a slot."""
    ranked, cold = 1, 2
    words, (_, flags, last, count, _, _) = tables_of(state)
    ranking = Ranking(words.num_experts, words.tick, words.steps)
    ranking.cold = {expert for expert, flag in enumerate(flags) if flag & cold}
    ranking.last, ranking.count = last, count
    ranking.weight = [own & 0xFFFFFFFF for own in count]
    ranking.weighed_at = [words.steps - (words.steps - (own >> 32) & 0xFFFFFFFF) for own in count]
    policy = list(POLICIES.values())[words.policy]
    return sorted(range(words.num_experts), key=lambda expert: (flags[expert] & ranked, policy(ranking, expert)))


def check_state(state: torch.Tensor) -> None:
    """`check_tables` of a planner's whole state."""
    words, (row_of, flags, _, _, expert_in, free) = tables_of(state)
    check_tables(row_of, expert_in, flags, free, words)
