"""The residency of one layer: which expert sits in which slot, as a state machine over plain integers."""

from collections.abc import Container, Iterable

from vllm_expert_prefetch.residency.policies import EvictionPolicy
from vllm_expert_prefetch.residency.types import ABSENT, IN_FLIGHT, NO_EXPERT, NO_SLOT, RESIDENT, Load, Residency


class ExpertCache:
    """C slots for the E experts of one layer.

    `slot_of[expert]` is a slot or -1 and `expert_in[slot]` an expert or -1; the two are inverse at all times.
    An expert is ABSENT, then IN_FLIGHT between `begin_loads` and `complete`, then RESIDENT until it is a victim.
    IN_FLIGHT experts are never victims: the policy only ranks RESIDENT ones. `untouched` are the experts brought by a
    prefetch that no step has needed yet; in the end each is counted in `num_used` or `num_unused`, or was dropped.
    `displaced` are the ABSENT experts that a prefetch evicted; needed again, they are counted in `num_displaced`.
    """

    def __init__(self, num_experts: int, num_slots: int, policy: EvictionPolicy) -> None:
        if not 0 < num_slots <= num_experts:
            raise ValueError(f"need 1 to {num_experts} slots for {num_experts} experts, got {num_slots}")
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of = [NO_SLOT] * num_experts
        self.expert_in = [NO_EXPERT] * num_slots
        self.in_flight: set[int] = set()
        self.untouched: set[int] = set()
        self.displaced: set[int] = set()
        self.num_used = 0
        self.num_unused = 0
        self.num_displaced = 0
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that hold nothing and wait for nothing."""
        return len(self._free)

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""
        return self.num_slots - len(self._free) - len(self.in_flight)

    def lookup(self, expert: int) -> Residency:
        """The state of `expert`."""
        if self.slot_of[expert] == NO_SLOT:
            return ABSENT
        return IN_FLIGHT if expert in self.in_flight else RESIDENT

    def begin_loads(self, experts: list[int], protected: Container[int]) -> tuple[Load, ...]:
        """Give a slot to each of `experts` (all ABSENT), evicting outside `protected`: ABSENT -> IN_FLIGHT.

        Either every expert gets a slot or nothing changes and RuntimeError is raised.
        """
        num_victims = max(0, len(experts) - len(self._free))
        victims = self.policy.victims(num_victims, protected) if num_victims else []
        if len(victims) < num_victims:
            raise RuntimeError(
                f"{len(experts)} loads need {num_victims} victims and only {len(victims)} of {self.num_slots} slots "
                "are neither protected nor in flight"
            )
        num_free = len(experts) - num_victims
        loads = [self._place(expert, self._free.pop(), NO_EXPERT) for expert in experts[:num_free]]
        loads += [
            self._place(expert, self._evict(victim), victim)
            for expert, victim in zip(experts[num_free:], victims, strict=True)
        ]
        return tuple(loads)

    def need(self, experts: Iterable[int]) -> None:
        """A step needs `experts`: prefetched ones among them have been of use, displaced ones would have been."""
        if self.untouched:
            used = self.untouched.intersection(experts)
            self.untouched -= used
            self.num_used += len(used)
        if self.displaced:
            missed = self.displaced.intersection(experts)
            self.displaced -= missed
            self.num_displaced += len(missed)

    def complete(self, experts: Iterable[int], cold: bool = False) -> None:
        """The copies of `experts` have landed: IN_FLIGHT -> RESIDENT. `cold`: see `EvictionPolicy.insert`."""
        for expert in experts:
            self.in_flight.remove(expert)
            self.policy.insert(expert, cold)

    def drop(self, expert: int) -> None:
        """The copy of `expert` was cancelled before it started: IN_FLIGHT -> ABSENT."""
        slot = self.slot_of[expert]
        self.in_flight.remove(expert)
        self.untouched.discard(expert)
        self.slot_of[expert] = NO_SLOT
        self.expert_in[slot] = NO_EXPERT
        self._free.append(slot)

    def _place(self, expert: int, slot: int, victim: int) -> Load:
        self.slot_of[expert] = slot
        self.expert_in[slot] = expert
        self.displaced.discard(expert)
        self.in_flight.add(expert)
        return Load(expert, slot, victim)

    def _evict(self, expert: int) -> int:
        slot = self.slot_of[expert]
        self.policy.remove(expert)
        if expert in self.untouched:
            self.untouched.remove(expert)
            self.num_unused += 1
        self.slot_of[expert] = NO_SLOT
        self.expert_in[slot] = NO_EXPERT
        return slot

    def check_integrity(self) -> None:
        """Raise AssertionError, saying which, when an invariant of this class is broken."""
        placed = {expert: slot for expert, slot in enumerate(self.slot_of) if slot != NO_SLOT}
        inverse = {expert: slot for slot, expert in enumerate(self.expert_in) if expert != NO_EXPERT}
        assert placed == inverse, f"slot_of and expert_in are not inverse: {placed} and {inverse}"
        assert self.in_flight <= placed.keys(), f"in flight without a slot: {self.in_flight - placed.keys()}"
        assert self.untouched <= placed.keys(), f"prefetched without a slot: {self.untouched - placed.keys()}"
        assert not self.displaced & placed.keys(), f"displaced and placed: {self.displaced & placed.keys()}"
        resident = placed.keys() - self.in_flight
        assert self.policy.ranked() == resident, f"policy ranks {self.policy.ranked()}, resident are {resident}"
        empty = {slot for slot, expert in enumerate(self.expert_in) if expert == NO_EXPERT}
        assert sorted(self._free) == sorted(empty), f"free list {self._free}, empty slots {empty}"
        assert len(self._free) + len(placed) == self.num_slots, "free + in flight + resident is not the slot count"
