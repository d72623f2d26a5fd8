"""The residency of one layer: which expert sits in which slot, and what a step or a guess changes about it."""

import heapq
from collections.abc import Collection, Iterable

from vllm_expert_prefetch.residency.policies import Policy, Ranking
from vllm_expert_prefetch.residency.types import (
    ABSENT,
    IN_FLIGHT,
    NO_EXPERT,
    NO_SLOT,
    RESIDENT,
    Load,
    Plan,
    PrefetchPlan,
    Residency,
)

STALE_ROUNDS = 8
"""A wide step may evict an expert that was not needed while every slot was touched so many times on average."""
FAR_ROUNDS = 1
"""The same for a prefetch that was predicted from more than one layer away."""


class ExpertCache:
    """C slots for the E experts of one layer, and E - C overflow rows for what a step needs beyond them.

    `slot_of[expert]` is a slot or -1 and `expert_in[slot]` an expert or -1; the two are inverse at all times. Copies of
    a step are booked when they are planned: whoever runs the step makes sure that they land before the kernel. Only
    prefetches are IN_FLIGHT, from `plan_prefetch` until a step needs them or `settle` says what became of them.
    `untouched` are the experts brought by a prefetch that no step has needed yet; in the end each is counted as used or
    unused, or was dropped. `displaced` are the ABSENT experts that a prefetch evicted.
    """

    def __init__(self, num_experts: int, num_slots: int, policy: Policy) -> None:
        if not 0 < num_slots <= num_experts:
            raise ValueError(f"need 1 to {num_experts} slots for {num_experts} experts, got {num_slots}")
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.policy = policy
        self.ranking = Ranking(num_experts)
        self.slot_of = [NO_SLOT] * num_experts
        self.expert_in = [NO_EXPERT] * num_slots
        self.in_flight: set[int] = set()
        self.untouched: set[int] = set()
        self.displaced: set[int] = set()
        self.free = list(range(num_slots - 1, -1, -1))
        """Slots that hold nothing and wait for nothing; the last one is taken first."""

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""
        return self.num_slots - len(self.free) - len(self.in_flight)

    def lookup(self, expert: int) -> Residency:
        """The state of `expert`."""
        if self.slot_of[expert] == NO_SLOT:
            return ABSENT
        return IN_FLIGHT if expert in self.in_flight else RESIDENT

    def plan(self, ids: Iterable[int]) -> Plan:
        """Plan one step that needs the experts `ids`, in the order of its tokens; others than 0 to E - 1 are ignored.

        A narrow step, of at most C experts, puts what it misses into slots: free ones, then those of the policy's
        victims. A wide step must neither flush what decoding uses nor leave the slots cold. What its last tokens miss
        takes free slots, then those of experts that it does not need and that are cold or stale, and ranks cold there.
        What finds no slot takes an overflow row.
        """
        ids = self._known(ids)
        last_at = {expert: index for index, expert in enumerate(ids)}
        needed = dict.fromkeys(ids)
        is_wide = len(needed) > self.num_slots
        used, displaced = self.untouched & needed.keys(), self.displaced & needed.keys()
        self.untouched -= used
        self.displaced -= displaced
        missing = [expert for expert in needed if self.slot_of[expert] == NO_SLOT]
        late = [expert for expert in needed if expert in self.in_flight]
        hits = [expert for expert in needed if expert in self.ranking.ranked]
        self.in_flight.difference_update(late)
        if is_wide:
            missing.sort(key=lambda expert: -last_at[expert])
            self.ranking.keep([*hits, *late], len(needed))
        else:
            for expert in hits:
                self.ranking.touch(expert)
        victims = self._victims(len(missing) - len(self.free), needed, STALE_ROUNDS if is_wide else 0)
        num_unused = len(self.untouched.intersection(victims))
        num_in_slots = min(len(missing), len(self.free) + len(victims))
        loads = self._place(missing[:num_in_slots], victims)
        loads += [
            Load(expert, self.num_slots + index, NO_EXPERT) for index, expert in enumerate(missing[num_in_slots:])
        ]
        if is_wide:
            for expert in missing[:num_in_slots]:
                self.ranking.add_cold(expert)
        else:
            for expert in (*late, *missing[:num_in_slots]):
                self.ranking.touch(expert)
        self.ranking.step += bool(needed)
        row_of = {load.expert: load.row for load in loads}
        rows = {expert: row_of.get(expert, self.slot_of[expert]) for expert in needed}
        return Plan(is_wide, rows, tuple(loads), tuple(late), len(used), num_unused, len(displaced))

    def plan_prefetch(self, predicted: Iterable[int], budget: int, is_far: bool = False) -> PrefetchPlan:
        """Plan copies for `predicted` experts, most wanted first, and mark them IN_FLIGHT: at most `budget` of them.

        Ids are ignored as in `plan`. No predicted expert is a victim, nor one in flight; when victims run out, the
        least wanted are left out. `is_far`: predicted from more than one layer away; only what is cold, or was not
        needed for a round, is a victim then.
        """
        wanted = dict.fromkeys(self._known(predicted))
        absent = [expert for expert in wanted if self.slot_of[expert] == NO_SLOT][: max(0, budget)]
        victims = self._victims(len(absent) - len(self.free), wanted, FAR_ROUNDS if is_far else 0)
        num_unused = len(self.untouched.intersection(victims))
        loads = self._place(absent[: len(self.free) + len(victims)], victims)
        brought = [load.expert for load in loads]
        self.in_flight.update(brought)
        self.untouched.update(brought)
        self.displaced.difference_update(brought)
        self.displaced.update(load.victim for load in loads if load.victim != NO_EXPERT)
        return PrefetchPlan(tuple(loads), num_unused)

    def settle(self, landed: Iterable[int], dropped: Iterable[int]) -> None:
        """Experts in flight whose prefetch has landed, and those whose copy was cancelled before it started.

        A prefetched expert ranks as cold until a step needs it: a wrong prediction leaves first.
        """
        for expert in landed:
            self.in_flight.remove(expert)
            self.ranking.add_cold(expert)
        for expert in dropped:
            self.in_flight.remove(expert)
            self.untouched.discard(expert)
            self.free.append(self._vacate(expert))

    def _known(self, ids: Iterable[int]) -> list[int]:
        return [expert for expert in ids if 0 <= expert < self.num_experts]

    def _victims(self, count: int, protected: Collection[int], spared_rounds: int) -> list[int]:
        """At most `count` experts that may leave, the first to leave first; `spared_rounds` > 0: only cold ones, and
        those that were not needed while every slot was touched so many times on average.
        """
        if count <= 0:
            return []
        ranking = self.ranking
        candidates = [expert for expert in ranking.ranked if expert not in protected]
        if spared_rounds:
            stale = ranking.tick - spared_rounds * self.num_slots
            candidates = [e for e in candidates if e in ranking.cold or ranking.last[e] < stale]
        return heapq.nsmallest(count, candidates, key=lambda expert: self.policy(ranking, expert))

    def _place(self, experts: list[int], victims: list[int]) -> list[Load]:
        """Give each of `experts` a slot: free ones first, then those of `victims`, who are then ABSENT."""
        leaving = iter(victims)
        loads = []
        for expert in experts:
            victim = NO_EXPERT if self.free else next(leaving)
            slot = self.free.pop() if victim == NO_EXPERT else self._evict(victim)
            self.slot_of[expert] = slot
            self.expert_in[slot] = expert
            loads.append(Load(expert, slot, victim))
        return loads

    def _evict(self, expert: int) -> int:
        self.ranking.remove(expert)
        self.untouched.discard(expert)
        return self._vacate(expert)

    def _vacate(self, expert: int) -> int:
        slot = self.slot_of[expert]
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
        assert self.ranking.ranked == resident, f"ranked are {self.ranking.ranked}, resident are {resident}"
        assert self.ranking.cold <= resident, f"cold and not resident: {self.ranking.cold - resident}"
        empty = {slot for slot, expert in enumerate(self.expert_in) if expert == NO_EXPERT}
        assert sorted(self.free) == sorted(empty), f"free list {self.free}, empty slots {empty}"
