"""The C++ planner decides as the Python specification does, step for step: rows, copies, whole state and totals."""

import multiprocessing
import random
from array import array

import pytest
import torch

from vllm_expert_prefetch.cache.base import by_hotness
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import POLICIES, ExpertCache

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

NUM_STEPS = 500_000
STEPS_PER_WALK = 125
PARTS = 8
LANDED, QUEUED, COPYING = 0, 1, 2
RANKED, COLD, IN_FLIGHT, UNTOUCHED, DISPLACED = 1, 2, 4, 8, 16


class NativePlanner:
    """The library's planner on a state tensor of its own."""

    def __init__(self, num_experts, num_slots, top_k, policy):
        self.library = host_library()
        self.num_experts, self.num_slots = num_experts, num_slots
        self.state = torch.zeros(self.library.planner_words(num_experts, num_slots), dtype=torch.int64)
        self.library.planner_init(self.state, num_experts, num_slots, top_k, list(POLICIES).index(policy))
        self.loads = torch.zeros(num_experts, 2, dtype=torch.int32)

    def plan(self, ids, num_real, rows, words):
        return self.loads[: self.library.planner_plan(self.state, words, ids, num_real, rows, self.loads)].tolist()

    def plan_prefetch(self, predicted, budget, is_far, words):
        number = self.library.planner_plan_prefetch(self.state, words, predicted, budget, is_far, self.loads)
        return self.loads[:number].tolist()

    def plan_preload(self, predicted, words):
        return self.loads[: self.library.planner_plan_preload(self.state, words, predicted, self.loads)].tolist()

    @property
    def words(self):
        return Words._make(self.state[: len(Words._fields)].tolist())

    def table(self, number):
        """row_of, flags, last, count, expert_in (E each), free slots (C)."""
        sizes = [*[self.num_experts] * 5, self.num_slots]
        start = len(Words._fields) + sum(sizes[:number])
        return self.state[start : start + sizes[number]].tolist()


class Twins:
    """One layer, planned twice, with prefetches whose progress both are told alike."""

    def __init__(self, rng, num_experts, num_slots, top_k, policy):
        self.rng = rng
        self.num_experts, self.num_slots, self.top_k = num_experts, num_slots, top_k
        self.cache = ExpertCache(num_experts, num_slots, POLICIES[policy])
        self.native = NativePlanner(num_experts, num_slots, top_k, policy)
        self.words = array("i", [LANDED] * num_experts)
        self.word_tensor = torch.frombuffer(self.words, dtype=torch.int32)
        self.totals = dict.fromkeys(
            (
                *[
                    "steps",
                    "wide_steps",
                    "hits",
                    "late",
                    "misses",
                    "overflow",
                    "evictions",
                    "used",
                    "unused",
                    "displaced",
                ],
                "issued",
                "cancelled",
            ),
            0,
        )

    def prefetch(self, predicted, budget, is_far=False):
        self.settle(set(predicted))
        plan = self.cache.plan_prefetch(predicted, budget, is_far)
        loads = self.native.plan_prefetch(torch.tensor(predicted, dtype=torch.int64), budget, is_far, self.word_tensor)
        self.count_prefetch(plan, loads)

    def preload(self, predicted):
        self.settle(set(predicted))
        plan = self.cache.plan_preload(predicted)
        self.count_prefetch(
            plan, self.native.plan_preload(torch.tensor(predicted, dtype=torch.int32), self.word_tensor)
        )

    def count_prefetch(self, plan, loads):
        assert loads == [[load.expert, load.row] for load in plan.loads]
        for load in plan.loads:
            self.words[load.row] = QUEUED
        self.totals["issued"] += len(plan.loads)
        self.totals["evictions"] += sum(load.victim >= 0 for load in plan.loads)
        self.totals["unused"] += plan.num_unused

    def copies_advance(self):
        for expert in self.cache.in_flight:
            self.words[self.cache.row_of[expert]] = self.rng.choice([LANDED, QUEUED, COPYING])

    def settle(self, needed):
        """Tell the specification what the native planner sees by itself."""
        in_flight = sorted(self.cache.in_flight, key=self.cache.row_of.__getitem__)
        state = {expert: self.words[self.cache.row_of[expert]] for expert in in_flight}
        landed = [expert for expert in in_flight if state[expert] == LANDED]
        dropped = [e for e in in_flight if state[e] == QUEUED and e not in needed]
        self.cache.settle(landed, dropped)
        self.totals["cancelled"] += len(dropped)

    def step(self, ids, dtype, padding=(3, -1)):
        """One step of `ids`; `padding`: ids of rows that are none."""
        self.settle({expert for expert in ids if expert >= 0})
        plan = self.cache.plan(ids)
        routed = torch.tensor([*ids, *padding], dtype=dtype)
        rows = torch.full_like(routed, -7)
        loads = self.native.plan(routed, len(ids), rows, self.word_tensor)
        assert loads == [[load.expert, load.row] for load in plan.loads]
        assert rows.tolist() == plan.row_ids([*ids, *padding], len(ids))
        counts = {
            "steps": bool(plan.rows),
            "wide_steps": plan.is_wide,
            "hits": plan.num_hits,
            "late": len(plan.late),
            "misses": len(plan.loads),
            "overflow": sum(load.row >= self.num_slots for load in plan.loads),
            "evictions": plan.num_evictions,
            "used": plan.num_used,
            "unused": plan.num_unused,
            "displaced": plan.num_displaced,
        }
        for name, count in counts.items():
            self.totals[name] += count
        return plan

    def check(self):
        cache, native, words = self.cache, self.native, self.native.words
        cache.check_integrity()
        assert native.table(0) == cache.row_of
        assert native.table(4) == cache.expert_in
        assert native.table(5)[: words.num_free] == cache.free
        flags = [
            RANKED * (expert in cache.ranking.ranked)
            + COLD * (expert in cache.ranking.cold)
            + (IN_FLIGHT if expert in cache.in_flight else 0)
            + UNTOUCHED * (expert in cache.untouched)
            + DISPLACED * (expert in cache.displaced)
            for expert in range(self.num_experts)
        ]
        assert native.table(1) == flags
        for expert in cache.ranking.ranked:
            assert native.table(2)[expert] == cache.ranking.last[expert]
        ranking = cache.ranking
        pairs = zip(ranking.weighed_at, ranking.weight, strict=True)
        faded = [step % 2**32 << 32 | weight for step, weight in pairs]
        counts = [count % 2**64 for count in native.table(3)]
        assert counts == (faded if cache.policy is POLICIES["ewma"] else ranking.count)
        assert (words.tick, words.cold_tick) == (cache.ranking.tick, cache.ranking.cold_tick)
        assert (words.num_in_flight, words.num_preloaded) == (len(cache.in_flight), len(cache.preloaded))
        assert {name: getattr(words, name) for name in self.totals} == self.totals

        ranked = sorted(ranking.ranked, key=lambda expert: cache.policy(ranking, expert))
        assert by_hotness(native.state)[self.num_experts - len(ranked) :] == ranked


def random_twins(rng, policy):
    num_experts = rng.randint(2, 40)
    top_k = rng.randint(1, min(8, num_experts))
    return Twins(rng, num_experts, rng.randint(top_k, num_experts), top_k, policy)


def random_ids(rng, twins):
    """A few tokens or many: whole rows of padding, partial ones, and rows that repeat an expert."""
    ids = []
    top_k, favourites = twins.top_k, max(twins.top_k, twins.num_experts // 3)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 2, 3, 8, 3 * twins.num_experts // top_k])):
        row = rng.sample(range(twins.num_experts if rng.random() < 0.4 else favourites), top_k)
        kind = rng.random()
        if kind < 0.05:
            row = [-1] * top_k
        elif kind < 0.1:
            row[rng.randrange(top_k)] = -1
        elif kind < 0.15:
            row[0] = row[-1]
        ids += row
    return ids


def walk_part(part):
    """One of PARTS: random layers, random steps; AssertionError at the first difference."""
    rng = random.Random(f"native {part}")
    seen = set()
    for _ in range(NUM_STEPS // PARTS // STEPS_PER_WALK):
        policy = rng.choice(list(POLICIES))
        twins = random_twins(rng, policy)
        for _ in range(STEPS_PER_WALK):
            twins.copies_advance()
            if rng.random() < 0.2:
                predicted = [rng.randrange(-1, twins.num_experts) for _ in range(rng.randint(0, 8))]
                twins.prefetch(predicted, budget=rng.randint(0, 4), is_far=rng.random() < 0.5)
                twins.copies_advance()
            if rng.random() < 0.2:
                twins.preload(random_ids(rng, twins))
                preloads = bool(twins.cache.preloaded)
                twins.copies_advance()
            else:
                preloads = False
            plan = twins.step(random_ids(rng, twins), rng.choice([torch.int32, torch.int64]))
            overflows = any(load.row >= twins.num_slots for load in plan.loads)
            kinds = (
                bool(plan.late),
                plan.num_used > 0,
                plan.num_unused > 0,
                (preloads and overflows) or not plan.is_wide,
            )
            seen.add((policy, plan.is_wide, overflows, *kinds, bool(plan.awaited)))
        twins.check()
    for policy in POLICIES:
        for is_wide in (False, True):
            flags = [flags for name, wide, *flags in seen if (name, wide) == (policy, is_wide)]
            assert all(any(column) for column in zip(*flags, strict=True)), f"{policy}, {is_wide}: {flags}"


def test_every_plan_is_that_of_the_specification():
    walk_part(0)


@pytest.mark.slow
@pytest.mark.long
def test_every_plan_of_half_a_million_is_that_of_the_specification():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(walk_part, range(1, PARTS), chunksize=1)


@pytest.mark.parametrize("num_slots", range(1, 13))
def test_every_capacity_from_one_to_all_experts(num_slots):
    rng = random.Random(num_slots)
    twins = Twins(rng, 12, num_slots, 1, "lfru")
    for _ in range(400):
        twins.step([rng.randrange(12) for _ in range(rng.randint(1, 14))], torch.int32)
        twins.check()


@pytest.mark.parametrize("first", [2**31, 2**32])
def test_touches_fade_after_years_as_at_first(first):
    rng = random.Random(first)
    twins = Twins(rng, 24, 8, 2, "ewma")
    twins.native.state[Words._fields.index("steps")] = twins.cache.ranking.step = twins.totals["steps"] = first - 100
    for _ in range(300):
        twins.step(random_ids(rng, twins), torch.int32)
    twins.check()


def test_large_layers():
    rng = random.Random(5)
    twins = Twins(rng, 512, 100, 8, "lru")
    for _ in range(60):
        twins.step([e for _ in range(rng.choice([1, 8, 40])) for e in rng.sample(range(512), 8)], torch.int32)
    twins.check()


def test_the_words_have_the_names_that_python_knows():
    assert tuple(host_library().word_names().split()) == Words._fields


def test_a_recording_in_one_call_is_its_steps_one_by_one():
    rng = random.Random(6)
    for policy in POLICIES:
        twins = Twins(rng, 24, 9, 2, policy)
        twins.prefetch([1, 2, 3], 2)  # what is on its way when a recording begins has landed
        twins.copies_advance()
        twins.words[:] = array("i", [LANDED] * 9)
        begun = twins.native.state.clone()
        tokens = [rng.choice([0, 1, 1, 2, 3, 12]) for _ in range(80)]
        rows = [[rng.sample(range(24), 2) for _ in range(count)] for count in tokens]
        plans = [twins.step([expert for row in own for expert in row], torch.int32, ()) for own in rows]
        counts = torch.zeros(80, 5, dtype=torch.int32)
        ids = torch.tensor([row for own in rows for row in own], dtype=torch.int32)
        host_library().planner_plan_steps(begun, ids, torch.tensor(tokens, dtype=torch.int32), counts)
        assert counts.tolist() == [
            [
                *(len(plan.rows), len(plan.loads), sum(load.row >= 9 for load in plan.loads)),
                *(plan.num_evictions, plan.is_wide),
            ]
            for plan in plans
        ]
        assert begun.equal(twins.native.state)


def test_a_recording_that_contradicts_itself_is_refused():
    native = planner()
    ids, counts = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 5, dtype=torch.int32)

    def plan(ids, tokens, counts=counts):
        host_library().planner_plan_steps(native.state, ids, torch.tensor(tokens, dtype=torch.int32), counts)

    with pytest.raises(ValueError, match="step 1 has 3 tokens, of 3 there are 2 left"):
        plan(ids, [1, 3])
    with pytest.raises(ValueError, match="step 0 has -1 tokens"):
        plan(ids, [-1, 3])
    with pytest.raises(ValueError, match="two dimensions"):
        plan(ids.flatten(), [1, 2])
    with pytest.raises(ValueError, match="counts has 10 items, needs 15"):
        plan(ids, [1, 1, 1])
    with pytest.raises(TypeError, match="ids must be int32"):
        plan(ids.long(), [1, 2])


def planner(num_experts=8, num_slots=4, top_k=2):
    return NativePlanner(num_experts, num_slots, top_k, "lru")


def test_a_routed_id_beyond_the_experts_is_ignored_and_counted():
    native = planner()
    ids = torch.tensor([3, 8, 1_000_000], dtype=torch.int32)
    rows = torch.empty_like(ids)
    assert native.plan(ids, 3, rows, torch.zeros(8, dtype=torch.int32)) == [[3, 0]]
    assert rows.tolist() == [0, 0, 0]
    assert native.words.out_of_range == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "0 experts"),
        ((8, 9, 2), "9 slots"),
        ((8, 2, 3), "top-k 3"),
        ((5000, 8, 2), r"5000 experts \(1 to 4096\)"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        planner(*arguments)


def test_tensors_of_the_wrong_kind_are_refused_before_anything_changes():
    native = planner()
    ids = torch.zeros(4, dtype=torch.int32)
    words = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match="row_words has 3 items, needs 8"):
        native.plan(ids, 4, torch.empty_like(ids), words[:3].clone())
    with pytest.raises(ValueError, match="ids has 4 items, needs 5"):
        native.plan(ids, 5, torch.empty_like(ids), words)
    with pytest.raises(TypeError, match="ids must be int32"):
        native.plan(ids.float(), 4, torch.empty_like(ids), words)
    with pytest.raises(ValueError, match="ids must be contiguous"):
        native.plan(torch.zeros(8, dtype=torch.int32)[::2], 4, torch.empty_like(ids), words)
    with pytest.raises(ValueError, match="was it made by planner_init"):
        host_library().planner_plan(
            torch.zeros(99, dtype=torch.int64), words, ids, 4, torch.empty_like(ids), native.loads
        )
    assert native.table(4) == [-1] * 8
