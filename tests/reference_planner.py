"""The planner's decisions by brute force: plain lists, the whole history kept, everything computed anew each time.

It knows lru, lfu and lfru; random victims have no reference.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_expert_prefetch.residency import Load, Plan, Split, Wave
from vllm_expert_prefetch.residency.types import NO_EXPERT, NO_SLOT

Group = tuple[list[int], tuple[int, ...] | None]
"""Experts of a wave in order, and its token rows."""


@dataclass
class ReferencePlanner:
    """Same arguments and same plans as `Planner`; a plan is complete when the next one is asked for."""

    num_slots: int
    top_k: int
    max_token_waves: int
    policy: str
    stream: bool = False
    slots: list[int] = field(init=False)
    touched: list[int] = field(default_factory=list)
    """Every touch since the beginning, in order."""
    cold: list[tuple[int, int]] = field(default_factory=list)
    """(expert, number of touches when it came) of residents brought by wide steps, in order of arrival."""

    def __post_init__(self) -> None:
        self.slots = [NO_EXPERT] * self.num_slots

    def fill(self) -> None:
        """Experts 0, 1, 2... in all slots, cold."""
        self._load(list(range(self.num_slots)), set(), cold=True)

    def plan(self, ids: Sequence[int]) -> Plan:
        """Plan and complete one step."""
        rows = [[expert for expert in ids[i : i + self.top_k] if expert >= 0] for i in range(0, len(ids), self.top_k)]
        needed = list(dict.fromkeys(expert for row in rows for expert in row))
        if not needed:
            return Plan(Split.NONE, (), 0, 0, 0, 0)
        if len(needed) <= self.num_slots:
            for expert in needed:
                if expert in self.slots:
                    self._touch(expert)
            return self._run(Split.NONE, [(needed, None)])
        if self.stream:
            return self._stream(needed)
        groups = self._by_tokens(rows)
        return self._run(Split.TOKENS, groups) if groups else self._run(Split.EXPERTS, self._by_experts(needed))

    def _run(self, split: Split, groups: Iterable[Group]) -> Plan:
        waves: list[Wave] = []
        for experts, rows in groups:
            absent = [expert for expert in experts if expert not in self.slots]
            stay = set(experts)
            if split is Split.EXPERTS and waves and waves[-1].loads:
                stay = set(self.slots) - {load.expert for load in waves[-1].loads}
            loads = self._load(absent, stay, cold=split is not Split.NONE)
            waves.append(Wave(tuple(experts), tuple(self.slots.index(e) for e in experts), loads, rows))
        num_lookups = sum(len(wave.experts) for wave in waves)
        loads = tuple(load for wave in waves for load in wave.loads)
        num_evictions = len([load for load in loads if load.victim != NO_EXPERT])
        return Plan(split, tuple(waves), num_lookups - len(loads), 0, len(loads), num_evictions)

    def _stream(self, needed: list[int]) -> Plan:
        slots = tuple(self.slots.index(expert) if expert in self.slots else NO_SLOT for expert in needed)
        loads = tuple(Load(expert, expert, NO_EXPERT) for expert in needed if expert not in self.slots)
        wave = Wave(tuple(needed), slots, loads, None)
        return Plan(Split.STREAM, (wave,), len(needed) - len(loads), 0, len(loads), 0)

    def _by_tokens(self, rows: list[list[int]]) -> list[Group] | None:
        """Kinds of token, in order of appearance, each into the first wave with room; the cached ones first."""
        kinds: dict[frozenset[int], list[int]] = {}
        for index, row in enumerate(rows):
            if row:
                kinds.setdefault(frozenset(row), []).append(index)
        cached = [kind for kind in kinds if kind <= set(self.slots)]
        waves = [(set().union(*cached), sorted(row for kind in cached for row in kinds[kind]))] if cached else []
        for kind in kinds:
            if kind in cached:
                continue
            fitting = next((wave for wave in waves if len(wave[0] | kind) <= self.num_slots), None)
            if fitting is None:
                fitting = (set(), [])
                waves.append(fitting)
            fitting[0].update(kind)
            fitting[1].extend(kinds[kind])
        if len(waves) > self.max_token_waves:
            return None
        return [(sorted(experts), tuple(indices)) for experts, indices in waves]

    def _by_experts(self, needed: list[int]) -> list[Group]:
        present = [expert for expert in needed if expert in self.slots]
        absent = [expert for expert in needed if expert not in self.slots]
        size = max(1, self.num_slots // 2)
        chunks = [absent[start : start + size] for start in range(0, len(absent), size)]
        return [(chunk, None) for chunk in [present, *chunks] if chunk]

    def _load(self, absent: list[int], stay: set[int], cold: bool) -> tuple[Load, ...]:
        free = [slot for slot, expert in enumerate(self.slots) if expert == NO_EXPERT]
        leaving = [expert for expert in self._ranking() if expert not in stay]
        places = [(slot, NO_EXPERT) for slot in free] + [(self.slots.index(victim), victim) for victim in leaving]
        loads = tuple(Load(e, slot, victim) for e, (slot, victim) in zip(absent, places, strict=False))
        for expert, slot, victim in loads:
            self.slots[slot] = expert
            self.cold = [entry for entry in self.cold if entry[0] != victim]
        for expert in absent:
            if cold:
                self.cold.append((expert, len(self.touched)))
            else:
                self._touch(expert)
        return loads

    def _touch(self, expert: int) -> None:
        self.touched.append(expert)
        self.cold = [entry for entry in self.cold if entry[0] != expert]

    def _ranking(self) -> list[int]:
        """Residents, the first to leave first: cold ones before all others, then by the policy's own rule."""
        arrival = dict(self.cold)
        last = {expert: number for number, expert in enumerate(self.touched, 1)} | arrival
        residents = [expert for expert in self.slots if expert != NO_EXPERT]
        if self.policy == "lru":
            hot = sorted((expert for expert in residents if expert not in arrival), key=last.__getitem__)
            return [*reversed(arrival), *hot]
        age = {expert: len(self.touched) - last[expert] + 1 for expert in residents}
        count = {e: self.touched.count(e) / (age[e] if self.policy == "lfru" else 1) for e in residents}
        return sorted(residents, key=lambda e: (e not in arrival, count[e], last[e], e))
