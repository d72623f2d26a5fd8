"""The residency of one layer: which expert sits in which slot, and what a step or a guess changes about it."""

import heapq
from collections.abc import Collection, Iterable, Iterator

from vllm_expert_prefetch.residency.policies import Policy, Ranking
from vllm_expert_prefetch.residency.types import (
    ABSENT,
    IN_FLIGHT,
    NO_EXPERT,
    NO_ROW,
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

    `row_of[expert]` is a row or -1 and `expert_in[row]` an expert or -1; the two are inverse at all times. Rows below C
    are the slots. An overflow row holds an expert only from a `plan_preload` to the layer's next step, which gives it
    back; what a step itself copies there is booked nowhere. Copies of a step are booked when they are planned: whoever
    runs the step makes sure that they land before the kernel. Only prefetches are IN_FLIGHT, from `plan_prefetch` or
    `plan_preload` until a step needs them or `settle` says what became of them. `untouched` are the experts brought by
    a prefetch that no step has needed yet; in the end each is counted as used or unused, or was dropped. `displaced`
    are the ABSENT experts that a prefetch evicted.
    """

    def __init__(self, num_experts: int, num_slots: int, policy: Policy) -> None:
        if not 0 < num_slots <= num_experts:
            raise ValueError(f"need 1 to {num_experts} slots for {num_experts} experts, got {num_slots}")
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.policy = policy
        self.ranking = Ranking(num_experts)
        self.row_of = [NO_ROW] * num_experts
        self.expert_in = [NO_EXPERT] * num_experts
        self.in_flight: set[int] = set()
        self.untouched: set[int] = set()
        self.displaced: set[int] = set()
        self.free = list(range(num_slots - 1, -1, -1))
        """Slots that hold nothing and wait for nothing; the last one is taken first."""

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""
        return len(self.ranking.ranked)

    def lookup(self, expert: int) -> Residency:
        """The state of `expert`."""
        if self.row_of[expert] == NO_ROW:
            return ABSENT
        return IN_FLIGHT if expert in self.in_flight else RESIDENT

    def plan(self, ids: Iterable[int]) -> Plan:
        """Plan one step that needs the experts `ids`, in the order of its tokens; others than 0 to E - 1 are ignored.

        A narrow step, of at most C experts, puts what it misses into slots: free ones, then those of the policy's
        victims. A wide step must neither flush what decoding uses nor leave the slots cold. What its last tokens miss
        takes free slots, then those of experts that it does not need and that are cold or stale, and ranks cold there.
        What finds no slot takes an overflow row. What was preloaded into overflow rows is gone after the step.
        """
        ids = self._known(ids)
        last_at = {expert: index for index, expert in enumerate(ids)}
        needed = dict.fromkeys(ids)
        is_wide = len(needed) > self.num_slots
        used, displaced = self.untouched & needed.keys(), self.displaced & needed.keys()
        self.untouched -= used
        self.displaced -= displaced
        missing = [expert for expert in needed if self.row_of[expert] == NO_ROW]
        late = [expert for expert in needed if expert in self.in_flight]
        hits = [expert for expert in needed if self.lookup(expert) == RESIDENT]
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
        overflow = self._free_overflow_rows()
        loads += [Load(expert, next(overflow), NO_EXPERT) for expert in missing[num_in_slots:]]
        if is_wide:
            for expert in missing[:num_in_slots]:
                self.ranking.add_cold(expert)
        else:
            for expert in (*late, *missing[:num_in_slots]):
                self.ranking.touch(expert)
        self.ranking.step += bool(needed)
        row_of = {load.expert: load.row for load in loads}
        rows = {expert: row_of.get(expert, self.row_of[expert]) for expert in needed}
        unneeded = [expert for expert in self.preloaded if expert not in needed]
        awaited = tuple(self.row_of[expert] for expert in unneeded if expert in self.in_flight)
        for expert in self.preloaded:
            self.ranking.discard(expert)
            self.in_flight.discard(expert)
            self._vacate(expert)
        self.untouched.difference_update(unneeded)
        num_unused += len(unneeded)
        return Plan(is_wide, rows, tuple(loads), tuple(late), len(used), num_unused, len(displaced), awaited)

    def plan_prefetch(self, predicted: Iterable[int], budget: int, is_far: bool = False) -> PrefetchPlan:
        """Plan copies for `predicted` experts, most wanted first, and mark them IN_FLIGHT: at most `budget` of them.

        Ids are ignored as in `plan`. No predicted expert is a victim, nor one in flight; when victims run out, the
        least wanted are left out. `is_far`: predicted from more than one layer away; only what is cold, or was not
        needed for a round, is a victim then.
        """
        wanted = dict.fromkeys(self._known(predicted))
        absent = [expert for expert in wanted if self.row_of[expert] == NO_ROW][: max(0, budget)]
        victims = self._victims(len(absent) - len(self.free), wanted, FAR_ROUNDS if is_far else 0)
        num_unused = len(self.untouched.intersection(victims))
        return self._prefetched(self._place(absent[: len(self.free) + len(victims)], victims), num_unused)

    def plan_preload(self, predicted: Iterable[int]) -> PrefetchPlan:
        """Plan copies for all `predicted` experts, in the order of their tokens, ahead of a wide step; mark them
        IN_FLIGHT.

        Ids are ignored as in `plan`. What the last tokens want takes slots as in a wide step: free ones, then those of
        experts that are not predicted and that are cold or stale. The others take overflow rows, of which there are
        enough for every expert.
        """
        ids = self._known(predicted)
        last_at = {expert: index for index, expert in enumerate(ids)}
        absent = [expert for expert in sorted(last_at, key=lambda e: -last_at[e]) if self.row_of[expert] == NO_ROW]
        victims = self._victims(len(absent) - len(self.free), last_at, STALE_ROUNDS)
        num_unused = len(self.untouched.intersection(victims))
        num_in_slots = min(len(absent), len(self.free) + len(victims))
        loads = self._place(absent[:num_in_slots], victims)
        for expert, row in zip(absent[num_in_slots:], self._free_overflow_rows(), strict=False):
            self._put(expert, row)
            loads.append(Load(expert, row, NO_EXPERT))
        return self._prefetched(loads, num_unused)

    def _prefetched(self, loads: list[Load], num_unused: int) -> PrefetchPlan:
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
            if self.row_of[expert] < self.num_slots:
                self.ranking.add_cold(expert)
        for expert in dropped:
            self.in_flight.remove(expert)
            self.untouched.discard(expert)
            row = self._vacate(expert)
            if row < self.num_slots:
                self.free.append(row)

    @property
    def preloaded(self) -> list[int]:
        """Experts in overflow rows, by row."""
        return [expert for expert in self.expert_in[self.num_slots :] if expert != NO_EXPERT]

    def _free_overflow_rows(self) -> Iterator[int]:
        return (row for row in range(self.num_slots, self.num_experts) if self.expert_in[row] == NO_EXPERT)

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
            self._put(expert, slot)
            loads.append(Load(expert, slot, victim))
        return loads

    def _put(self, expert: int, row: int) -> None:
        self.row_of[expert] = row
        self.expert_in[row] = expert

    def _evict(self, expert: int) -> int:
        self.ranking.discard(expert)
        self.untouched.discard(expert)
        return self._vacate(expert)

    def _vacate(self, expert: int) -> int:
        row = self.row_of[expert]
        self.row_of[expert] = NO_ROW
        self.expert_in[row] = NO_EXPERT
        return row

    def check_integrity(self) -> None:
        """Raise AssertionError, saying which, when an invariant of this class is broken."""
        placed = {expert: row for expert, row in enumerate(self.row_of) if row != NO_ROW}
        inverse = {expert: row for row, expert in enumerate(self.expert_in) if expert != NO_EXPERT}
        assert placed == inverse, f"row_of and expert_in are not inverse: {placed} and {inverse}"
        assert self.in_flight <= placed.keys(), f"in flight without a row: {self.in_flight - placed.keys()}"
        assert self.untouched <= placed.keys(), f"prefetched without a row: {self.untouched - placed.keys()}"
        assert not self.displaced & placed.keys(), f"displaced and placed: {self.displaced & placed.keys()}"
        resident = placed.keys() - self.in_flight - set(self.preloaded)
        assert self.ranking.ranked == resident, f"ranked are {self.ranking.ranked}, resident are {resident}"
        assert self.ranking.cold <= resident, f"cold and not resident: {self.ranking.cold - resident}"
        empty = {slot for slot, expert in enumerate(self.expert_in[: self.num_slots]) if expert == NO_EXPERT}
        assert sorted(self.free) == sorted(empty), f"free list {self.free}, empty slots {empty}"
