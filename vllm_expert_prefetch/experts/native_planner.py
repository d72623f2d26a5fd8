"""The C++ planner (csrc/residency.h): the decisions of `residency.Planner`, step for step, on one int64 tensor."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from vllm_expert_prefetch.residency import Load, Plan, PrefetchPlan, Split, Wave

POLICY_NUMBERS = {"lru": 0, "lfu": 1, "lfru": 2}
"""The eviction policies that the native planner has; `random` is for studies with the Python one."""

MUST_SETTLE = -1
"""What `plan` returns while prefetches leave the step too few slots (`residency.Planner.must_settle`)."""

HEAD_WORDS = 9
HEADER_WORDS = 24
_RANKED, _IN_FLIGHT = 1, 4
_PLACED = _RANKED | _IN_FLIGHT


class NativePlanner:
    """The planner of one layer. `library` is `native.library.host_library()`.

    `state` is the int64 tensor (CPU) that holds everything; csrc/residency.h says which word is what. Wherever a method
    takes `slot_words`, that is an int32 tensor (C) in the protocol of csrc/slot_state.h: it says which prefetches have
    landed, and a prefetch that a step does not need is cancelled there.
    """

    def __init__(
        self,
        library: Any,
        num_experts: int,
        num_slots: int,
        top_k: int,
        policy: str,
        max_token_waves: int,
        stream: bool,
    ) -> None:
        """Raises ValueError with the numbers when they do not fit each other."""
        if policy not in POLICY_NUMBERS:
            raise ValueError(f"the native planner has no policy {policy!r}: {', '.join(POLICY_NUMBERS)}")
        self.library = library
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.state = torch.zeros(library.planner_words(num_experts, num_slots), dtype=torch.int64)
        library.planner_init(self.state, num_experts, num_slots, top_k, POLICY_NUMBERS[policy], max_token_waves, stream)

    def fill(self) -> None:
        """Note that expert s lies in slot s, cold, for every slot s. Raises ValueError unless every slot is free."""
        self.library.planner_fill(self.state)

    @property
    def slot_of(self) -> list[int]:
        """Slot of each expert, -1 for an absent one."""
        return self.state[HEADER_WORDS : HEADER_WORDS + self.num_experts].tolist()

    @property
    def expert_in(self) -> list[int]:
        """Expert in each slot, -1 for a free one."""
        start = HEADER_WORDS + 4 * self.num_experts
        return self.state[start : start + self.num_slots].tolist()

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""
        num_free, num_in_flight = self.state[8:10].tolist()
        return int(self.num_slots - num_free - num_in_flight)

    def check_integrity(self) -> None:
        """Raise AssertionError, saying which, when an invariant of `residency.ExpertCache` is broken."""
        slot_of, expert_in = self.slot_of, self.expert_in
        placed = {expert: slot for expert, slot in enumerate(slot_of) if slot >= 0}
        inverse = {expert: slot for slot, expert in enumerate(expert_in) if expert >= 0}
        assert placed == inverse, f"slot_of and expert_in are not inverse: {placed} and {inverse}"
        flags = self.state[HEADER_WORDS + self.num_experts :][: self.num_experts].tolist()
        states = {expert: flag & _PLACED for expert, flag in enumerate(flags) if flag & _PLACED}
        assert states.keys() == placed.keys(), f"ranked or in flight are {states.keys()}, placed are {placed.keys()}"
        assert set(states.values()) <= {_RANKED, _IN_FLIGHT}, f"both or neither ranked and in flight: {states}"
        num_free, num_in_flight = self.state[8:10].tolist()
        assert num_in_flight == list(states.values()).count(_IN_FLIGHT), f"{num_in_flight} counted in flight: {states}"
        free = self.state[-self.num_slots :][:num_free].tolist()
        empty = [slot for slot, expert in enumerate(expert_in) if expert < 0]
        assert sorted(free) == empty, f"free list {free}, empty slots {empty}"

    def plan(self, ids: torch.Tensor, num_ids: int, slot_ids: torch.Tensor, slot_words: torch.Tensor) -> int:
        """Plan one step and do its bookkeeping, as `Planner.plan` and `complete` do together.

        `ids`: int32 or int64, of which the first `num_ids` count. `slot_ids`: of the same type and length, receives the
        slot of each id of a narrow step, 0 for padding. Returns a `Split` or MUST_SETTLE.
        """
        return int(self.library.planner_plan(self.state, slot_words, ids, num_ids, slot_ids))

    def plan_prefetch(self, predicted: torch.Tensor, budget: int, slot_words: torch.Tensor) -> PrefetchPlan:
        """Plan copies for `predicted` (int32 or int64), most wanted first; see `Planner.plan_prefetch`."""
        self.library.planner_plan_prefetch(self.state, slot_words, predicted, budget)
        num_loads, num_evictions, num_unused, *words = last_plan_words(self.library)
        return PrefetchPlan(_loads(words[: 3 * num_loads]), num_evictions, num_unused)

    def last_plan(self) -> Plan:
        """The plan that the calling thread has made last."""
        return decode_plan(last_plan_words(self.library))


def last_plan_words(library: Any) -> list[int]:
    """The words of the plan that the calling thread has made last; csrc/host/planner.h has their order."""
    words = torch.empty(512, dtype=torch.int32)
    size = library.planner_last_plan(words)
    if size > len(words):
        words = torch.empty(size, dtype=torch.int32)
        library.planner_last_plan(words)
    return words[:size].tolist()


def decode_plan(words: Sequence[int]) -> Plan:
    """The plan behind its words."""
    split, num_waves, *counts = words[:HEAD_WORDS]
    rest = iter(words[HEAD_WORDS:])
    waves = []
    for _ in range(num_waves):
        num_experts, num_loads, num_late, num_rows = islice(rest, 4)
        experts, slots = tuple(islice(rest, num_experts)), tuple(islice(rest, num_experts))
        loads = _loads(list(islice(rest, 3 * num_loads)))
        late = tuple(islice(rest, num_late))
        waves.append(Wave(experts, slots, loads, None if num_rows < 0 else tuple(islice(rest, num_rows)), late))
    return Plan(Split(split), tuple(waves), *counts)


def _loads(words: Sequence[int]) -> tuple[Load, ...]:
    return tuple(Load(*words[start : start + 3]) for start in range(0, len(words), 3))
