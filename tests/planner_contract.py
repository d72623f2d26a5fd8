"""The contract of `Planner` and `Plan`, checked from outside: what any implementation of them must satisfy.

`PlannedLayer` replays every plan on fake slots, which hold expert ids in place of weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_expert_prefetch.residency import ExpertCache, Plan, Planner, Split, Wave, create_policy
from vllm_expert_prefetch.residency.types import NO_EXPERT, NO_SLOT


@dataclass
class PlannedLayer:
    """One layer: a planner, and fake slots that change only by the loads of its plans."""

    num_experts: int
    num_slots: int
    top_k: int
    max_token_waves: int
    policy: str
    stream: bool = False
    filled: bool = True
    cache: ExpertCache = field(init=False)
    planner: Planner = field(init=False)
    contents: list[int] = field(init=False)
    """`contents[slot]` is the expert whose record lies there, from the loads alone."""

    def __post_init__(self) -> None:
        self.cache = ExpertCache(self.num_experts, self.num_slots, create_policy(self.policy, seed=3))
        self.planner = Planner(self.cache, self.top_k, self.max_token_waves, self.stream)
        self.contents = [NO_EXPERT] * self.num_slots
        if self.filled:
            loads = self.cache.begin_loads(list(range(self.num_slots)), ())
            self._apply(loads)
            self.cache.complete([load.expert for load in loads], cold=True)

    def step(self, ids: Sequence[int], also_in_flight: Sequence[int] = ()) -> Plan:
        """Plan, check and complete one step. `also_in_flight`: absent experts that are being prefetched meanwhile."""
        self._apply(self.planner.plan_prefetch(also_in_flight, len(also_in_flight)).loads)
        self.cache.check_integrity()
        if self.planner.must_settle(ids):
            self.planner.settle(list(self.cache.in_flight), ())
        in_flight = set(self.cache.in_flight)
        before = list(self.cache.slot_of)
        plan = self.planner.plan(ids)
        self.cache.check_integrity()
        self._check(plan, ids, before, in_flight)
        self.planner.complete(plan)
        self.planner.settle(list(self.cache.in_flight), ())
        self.cache.check_integrity()
        for slot, expert in enumerate(self.contents):
            assert self.cache.expert_in[slot] == expert, f"slot {slot} holds {expert} in truth"
        return plan

    def _apply(self, loads: Sequence[tuple[int, int, int]]) -> None:
        for expert, slot, victim in loads:
            assert self.contents[slot] == victim, f"slot {slot} held {self.contents[slot]}, the plan says {victim}"
            self.contents[slot] = expert

    def _check(self, plan: Plan, ids: Sequence[int], before: list[int], in_flight: set[int]) -> None:
        rows = [tuple(ids[start : start + self.top_k]) for start in range(0, len(ids), self.top_k)]
        needed = {expert for expert in ids if expert >= 0}
        check_split(plan, rows, self)
        check_coverage(plan, rows)
        check_counts(plan, needed, before, in_flight)
        for wave in plan.waves:
            assert set(wave.late) == in_flight.intersection(wave.experts), "whom to wait for"
            if plan.split is Split.STREAM:
                self._check_streamed(wave, before)
            else:
                self._check_wave(wave, in_flight)

    def _check_wave(self, wave: Wave, in_flight: set[int]) -> None:
        assert len(wave.experts) == len(wave.slots) <= self.num_slots
        assert len(set(wave.experts)) == len(wave.experts), f"an expert twice in {wave.experts}"
        assert len(set(wave.slots)) == len(wave.slots), f"a slot twice in {wave.slots}"
        assert set(wave.slots) <= set(range(self.num_slots))
        assert {load.expert for load in wave.loads} <= set(wave.experts)
        victims = {load.victim for load in wave.loads}
        assert not victims & set(wave.experts), "a slot that the wave needs is a victim"
        assert not victims & in_flight, "a slot in flight is a victim"
        self._apply(wave.loads)
        for expert, slot in zip(wave.experts, wave.slots, strict=True):
            assert self.contents[slot] == expert, f"the kernel would read {self.contents[slot]} for {expert}"

    def _check_streamed(self, wave: Wave, before: list[int]) -> None:
        """Every expert comes from the host or from the slot where it lies; the slots do not change."""
        assert self.cache.slot_of == before
        assert len(set(wave.experts)) == len(wave.experts)
        loaded = {load.expert for load in wave.loads}
        for load in wave.loads:
            assert load.slot == load.expert, "the place in the stream buffer is the expert's number"
            assert load.victim == NO_EXPERT
        for expert, slot in zip(wave.experts, wave.slots, strict=True):
            assert (slot == NO_SLOT) == (expert in loaded)
            if slot != NO_SLOT:
                assert self.contents[slot] == expert


def check_split(plan: Plan, rows: Sequence[tuple[int, ...]], layer: PlannedLayer) -> None:
    """Whether the step had to be divided, and how."""
    distinct_rows = {frozenset(expert for expert in row if expert >= 0) for row in rows} - {frozenset()}
    needed = frozenset().union(*distinct_rows)
    if len(needed) <= layer.num_slots:
        assert plan.split is Split.NONE
        assert len(plan.waves) == bool(needed)
    elif layer.stream:
        assert plan.split is Split.STREAM
        assert len(plan.waves) == 1
    elif plan.split is Split.TOKENS:
        assert 1 < len(plan.waves) <= layer.max_token_waves
    else:
        assert plan.split is Split.EXPERTS
        assert layer.max_token_waves < len(distinct_rows), "a wave for each kind of token would have been enough"


def check_coverage(plan: Plan, rows: Sequence[tuple[int, ...]]) -> None:
    """Every (token, expert) pair is computed exactly once."""
    needed = {expert for row in rows for expert in row if expert >= 0}
    if plan.split is Split.TOKENS:
        real = [index for index, row in enumerate(rows) if max(row) >= 0]
        assert all(wave.rows is not None for wave in plan.waves)
        assert sorted(index for wave in plan.waves for index in wave.rows or ()) == real
        for wave in plan.waves:
            in_rows = {expert for index in wave.rows or () for expert in rows[index] if expert >= 0}
            assert set(wave.experts) == in_rows, "a token's top-k is not whole, or an expert serves no token"
    else:
        assert all(wave.rows is None for wave in plan.waves)
        assert sorted(expert for wave in plan.waves for expert in wave.experts) == sorted(needed)


def check_counts(plan: Plan, needed: set[int], before: list[int], in_flight: set[int]) -> None:
    """Lookups, loads and evictions, counted again from the waves."""
    loads = [load for wave in plan.waves for load in wave.loads]
    assert plan.num_hits + plan.num_late + plan.num_misses == sum(len(wave.experts) for wave in plan.waves)
    assert plan.num_misses == len(loads)
    assert plan.num_evictions == sum(load.victim != NO_EXPERT for load in loads)
    assert plan.num_late == sum(len(wave.late) for wave in plan.waves)
    if plan.split is not Split.TOKENS:
        resident = {expert for expert in needed if before[expert] != NO_SLOT} - in_flight
        assert plan.num_hits == len(resident)
