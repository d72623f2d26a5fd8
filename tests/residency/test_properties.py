"""Any steps and prefetches: every needed expert has a row of its own, nobody who is needed leaves, every slot is
accounted for, and who leaves is who leaves by a second account of the rules."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_expert_prefetch.residency import POLICIES, ExpertCache, Load, Plan, PrefetchPlan
from vllm_expert_prefetch.residency.types import NO_EXPERT, NO_ROW


class Ages:
    """Who leaves first, with an age for each hot expert where `Ranking` has a clock.

    The age is the number of experts that were needed since; `cold` tells which expert came cold as the how manieth.
    """

    def __init__(self):
        self.hot, self.cold, self.touches = {}, {}, Counter()
        self.num_needed = self.num_cold = 0
        self.num_steps = 0
        self.fading = {}  # expert -> units of 2^-20 touches, and the step they are of

    def faded(self, expert):
        """Half after twelve steps, three quarters after six, a quarter after 24."""
        units, step = self.fading.get(expert, (0, 0))
        halvings, rest = (self.num_steps - step) // 12, (self.num_steps - step) % 12
        return units * (24 - rest) // 24 // 2**halvings

    def touch(self, expert):
        self.num_needed += 1
        self.hot = {other: age + 1 for other, age in self.hot.items()} | {expert: 0}
        self.cold.pop(expert, None)
        self.touches[expert] += 1
        self.fading[expert] = self.faded(expert) + 2**20, self.num_steps

    def keep(self, experts, num_needed):
        self.num_needed += num_needed
        self.hot = {other: age + num_needed * (other not in experts) for other, age in self.hot.items()}
        for expert in experts:
            self.hot.setdefault(expert, 0)
            self.cold.pop(expert, None)

    def add_cold(self, expert):
        self.num_cold += 1
        self.cold[expert] = self.num_cold

    def forget(self, expert):
        self.hot.pop(expert, None)
        self.cold.pop(expert, None)

    def first_to_leave_first(self, policy, experts):
        def claim(expert):
            is_cold = expert in self.cold
            age = self.num_needed + self.cold[expert] if is_cold else self.hot[expert]
            touches = self.touches[expert]
            weights = {"lru": 0, "lfu": touches, "lfru": touches / (age + 1), "ewma": self.faded(expert)}
            return (not is_cold, weights[policy], -age, expert)

        return sorted(experts, key=claim)


class CheckedCache:
    """An `ExpertCache`, every plan of which is compared with what the rules say."""

    def __init__(self, num_experts, num_slots, policy):
        self.policy = policy
        self.cache = ExpertCache(num_experts, num_slots, POLICIES[policy])
        self.ages = Ages()
        self.untouched, self.displaced = set(), set()
        self.preloaded = {}  # expert -> overflow row

    def step(self, ids):
        cache, ages = self.cache, self.ages
        needed = list(dict.fromkeys(expert for expert in ids if 0 <= expert < cache.num_experts))
        is_wide = len(needed) > cache.num_slots
        missing = [expert for expert in needed if cache.row_of[expert] == NO_ROW]
        late = [expert for expert in needed if expert in cache.in_flight]
        hits = [expert for expert in needed if expert not in missing and expert not in late]
        slots = {expert: cache.row_of[expert] for expert in needed}
        unneeded = self.preloaded.keys() - set(needed)
        awaited = sorted(self.preloaded[expert] for expert in unneeded & cache.in_flight)
        overflow = [row for row in range(cache.num_slots, cache.num_experts) if row not in self.preloaded.values()]
        if is_wide:
            missing.sort(key=lambda expert: ids[::-1].index(expert))
            ages.keep([*hits, *late], len(needed))
        else:
            for expert in hits:
                ages.touch(expert)
        leaving = [
            expert
            for expert in (ages.cold.keys() | ages.hot.keys()) - set(needed)
            if not is_wide or expert in ages.cold or ages.hot[expert] > 8 * cache.num_slots
        ]
        loads, num_unused = self.place(missing, leaving)
        for expert, row in zip(missing[len(loads) :], overflow, strict=False):
            loads.append(Load(expert, row, NO_EXPERT))
        for expert in [] if is_wide else late:
            ages.touch(expert)
        for expert in [load.expert for load in loads if load.row < cache.num_slots]:
            ages.add_cold(expert) if is_wide else ages.touch(expert)
        ages.num_steps += bool(needed)
        rows = slots | {load.expert: load.row for load in loads}
        num_used, num_displaced = len(self.untouched & set(needed)), len(self.displaced & set(needed))
        self.untouched -= set(needed) | unneeded
        self.displaced -= set(needed)
        for expert in self.preloaded:
            ages.forget(expert)
        self.preloaded = {}

        plan = cache.plan(ids)
        counts = num_used, num_unused + len(unneeded), num_displaced
        assert plan == Plan(is_wide, rows, tuple(loads), tuple(late), *counts, tuple(awaited))
        assert not set(plan.awaited) & set(plan.rows.values())
        assert list(plan.rows) == needed
        assert len(set(plan.rows.values())) == len(needed), "two experts in one row"
        assert all(0 <= row < cache.num_experts for row in plan.rows.values())
        assert not {load.victim for load in plan.loads} & (set(needed) | cache.in_flight)
        assert plan.num_hits == len(hits)
        self.check()

    def prefetch(self, predicted, budget, is_far):
        cache = self.cache
        wanted = list(dict.fromkeys(expert for expert in predicted if 0 <= expert < cache.num_experts))
        leaving = (self.ages.cold.keys() | self.ages.hot.keys()) - set(wanted)
        if is_far:
            leaving = {e for e in leaving if e in self.ages.cold or self.ages.hot[e] > cache.num_slots}
        loads, num_unused = self.place([e for e in wanted if cache.row_of[e] == NO_ROW][: max(0, budget)], leaving)
        brought = {load.expert for load in loads}
        self.untouched |= brought
        self.displaced = (self.displaced | {load.victim for load in loads}) - brought - {NO_EXPERT}

        assert cache.plan_prefetch(predicted, budget, is_far) == PrefetchPlan(tuple(loads), num_unused)
        assert brought <= cache.in_flight
        self.check()

    def preload(self, predicted):
        cache, ages = self.cache, self.ages
        wanted = [expert for expert in predicted if 0 <= expert < cache.num_experts]
        wanted = list(dict.fromkeys(reversed(wanted)))
        missing = [expert for expert in wanted if cache.row_of[expert] == NO_ROW]
        leaving = [e for e in ages.hot if ages.hot[e] > 8 * cache.num_slots]
        loads, num_unused = self.place(missing, {*leaving, *ages.cold} - set(wanted))
        overflow = [row for row in range(cache.num_slots, cache.num_experts) if row not in self.preloaded.values()]
        for expert, row in zip(missing[len(loads) :], overflow, strict=False):
            loads.append(Load(expert, row, NO_EXPERT))
            self.preloaded[expert] = row
        self.untouched |= set(missing)
        self.displaced = (self.displaced | {load.victim for load in loads}) - set(missing) - {NO_EXPERT}

        assert cache.plan_preload(predicted) == PrefetchPlan(tuple(loads), num_unused)
        assert len(loads) == len(missing), "there is a row for every expert"
        assert set(missing) <= cache.in_flight
        self.check()

    def settle(self, choices):
        in_flight = sorted(self.cache.in_flight)
        landed = [expert for expert, choice in zip(in_flight, choices, strict=False) if choice == "land"]
        dropped = [expert for expert, choice in zip(in_flight, choices, strict=False) if choice == "drop"]
        for expert in landed:
            if expert not in self.preloaded:
                self.ages.add_cold(expert)
        self.preloaded = {expert: row for expert, row in self.preloaded.items() if expert not in dropped}
        self.untouched -= set(dropped)
        self.cache.settle(landed, dropped)
        self.check()

    def place(self, experts, leaving):
        """Loads of `experts` into free slots and those of `leaving`, as many as there are; and the unused victims."""
        cache = self.cache
        places = [(slot, NO_EXPERT) for slot in reversed(cache.free)]
        places += [(cache.row_of[e], e) for e in self.ages.first_to_leave_first(self.policy, leaving)]
        loads = [Load(expert, *place) for expert, place in zip(experts, places, strict=False)]
        victims = {load.victim for load in loads}
        for expert in victims:
            self.ages.forget(expert)
        num_unused = len(self.untouched & victims)
        self.untouched -= victims
        return loads, num_unused

    def check(self):
        cache = self.cache
        cache.check_integrity()
        assert cache.num_slots == len(cache.free) + cache.num_resident + len(cache.in_flight - self.preloaded.keys())
        assert cache.preloaded == sorted(self.preloaded, key=self.preloaded.__getitem__)
        assert cache.ranking.ranked == self.ages.hot.keys() | self.ages.cold.keys()
        assert cache.ranking.cold == self.ages.cold.keys()
        assert (cache.untouched, cache.displaced) == (self.untouched, self.displaced)


@st.composite
def walks(draw):
    """(experts, slots, policy, operations); ids may be stray."""
    num_experts = draw(st.integers(1, 12))
    ids = st.integers(-2, num_experts + 1) | st.integers(0, max(0, num_experts // 3))
    operation = st.one_of(
        st.tuples(st.just("step"), st.lists(ids, max_size=3)),
        st.tuples(st.just("step"), st.lists(ids, max_size=2 * num_experts)),
        st.tuples(st.just("prefetch"), st.lists(ids, max_size=5), st.integers(-1, 4), st.booleans()),
        st.tuples(st.just("preload"), st.lists(ids, max_size=2 * num_experts)),
        st.tuples(st.just("settle"), st.lists(st.sampled_from(["land", "drop", "stay"]), max_size=4)),
    )
    operations = draw(st.lists(operation, min_size=1, max_size=40))
    return num_experts, draw(st.integers(1, num_experts)), draw(st.sampled_from(list(POLICIES))), operations


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(walks())
def test_every_plan_keeps_the_rules(walk):
    num_experts, num_slots, policy, operations = walk
    cache = CheckedCache(num_experts, num_slots, policy)
    for name, *arguments in operations:
        getattr(cache, name)(*arguments)
