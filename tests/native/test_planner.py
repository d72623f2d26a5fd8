"""The C++ planner decides as the Python specification does, step for step."""

import random
from array import array

import pytest
import torch

from vllm_expert_prefetch.experts.native_planner import MUST_SETTLE, POLICY_NUMBERS, NativePlanner
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import ExpertCache, Load, Plan, Planner, Split, create_policy

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

NUM_STEPS = 1_000_000
STEPS_PER_WALK = 125
PARTS = 8
LANDED, QUEUED, COPYING = 0, 1, 2


class Twins:
    """One layer, planned twice, with prefetches whose progress both are told alike."""

    def __init__(self, rng, num_experts, num_slots, top_k, policy, waves, stream, filled):
        self.rng = rng
        self.num_experts, self.num_slots, self.top_k = num_experts, num_slots, top_k
        self.cache = ExpertCache(num_experts, num_slots, create_policy(policy))
        self.planner = Planner(self.cache, top_k, waves, stream)
        self.native = NativePlanner(host_library(), num_experts, num_slots, top_k, policy, waves, stream)
        self.words = array("i", [LANDED] * num_slots)
        self.word_tensor = torch.frombuffer(self.words, dtype=torch.int32)
        if filled:
            loads = self.cache.begin_loads(list(range(num_slots)), ())
            self.cache.complete([load.expert for load in loads], cold=True)
            self.native.fill()

    def prefetch(self, predicted, budget):
        self.settle(needed=None)
        plan = self.planner.plan_prefetch(predicted, budget)
        ids = torch.tensor(predicted, dtype=torch.int64)
        assert self.native.plan_prefetch(ids, budget, self.word_tensor) == plan
        for load in plan.loads:
            self.words[load.slot] = QUEUED

    def copies_advance(self):
        for expert in self.cache.in_flight:
            self.words[self.cache.slot_of[expert]] = self.rng.choice([LANDED, QUEUED, COPYING])

    def settle(self, needed):
        """Tell the specification what the native planner sees by itself; `needed` None cancels nothing."""
        in_flight = sorted(self.cache.in_flight, key=self.cache.slot_of.__getitem__)
        state = {expert: self.words[self.cache.slot_of[expert]] for expert in in_flight}
        landed = [expert for expert in in_flight if state[expert] == LANDED]
        late = [expert for expert in in_flight if state[expert] == QUEUED]
        self.planner.settle(landed, [expert for expert in late if needed is not None and expert not in needed])

    def step(self, ids, dtype):
        needed = {expert for expert in ids if expert >= 0}
        routed = torch.tensor([*ids, -1], dtype=dtype)
        slot_ids = torch.full_like(routed, -7)
        while True:
            self.settle(needed)
            must_settle = self.planner.must_settle(ids)
            split = self.native.plan(routed, len(ids), slot_ids, self.word_tensor)
            assert (split == MUST_SETTLE) == must_settle
            if not must_settle:
                break
            for expert in self.cache.in_flight:
                self.words[self.cache.slot_of[expert]] = LANDED
        plan = self.planner.plan(ids)
        self.planner.complete(plan)
        assert self.native.last_plan() == plan
        if plan.split is Split.NONE:
            slot_of = self.cache.slot_of
            assert slot_ids.tolist() == [slot_of[expert] if expert >= 0 else 0 for expert in ids] + [0]
        return plan

    def check(self):
        self.native.check_integrity()
        assert self.native.slot_of == self.cache.slot_of
        assert self.native.expert_in == self.cache.expert_in


def random_twins(rng, policy):
    num_experts = rng.randint(2, 40)
    top_k = rng.randint(1, min(8, num_experts))
    num_slots = rng.randint(top_k, num_experts)
    waves, stream, filled = rng.choice([0, 1, 2, 4, 8]), rng.random() < 0.3, rng.random() < 0.7
    return Twins(rng, num_experts, num_slots, top_k, policy, waves, stream, filled)


def random_ids(rng, twins):
    """A few tokens or many: whole rows of padding, partial ones, and rows that repeat an expert."""
    ids = []
    top_k, favourites = twins.top_k, max(twins.top_k, twins.num_experts // 3)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 2, 3, 8])):
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


@pytest.mark.parametrize("part", range(PARTS))
def test_every_plan_is_that_of_the_specification(part):
    rng = random.Random(f"native {part}")
    seen = set()
    for _ in range(NUM_STEPS // PARTS // STEPS_PER_WALK):
        policy = rng.choice(list(POLICY_NUMBERS))
        twins = random_twins(rng, policy)
        for _ in range(STEPS_PER_WALK):
            twins.copies_advance()
            if rng.random() < 0.2:
                predicted = [rng.randrange(-1, twins.num_experts) for _ in range(rng.randint(0, 8))]
                twins.prefetch(predicted, budget=rng.randint(0, 4))
                twins.copies_advance()
            plan = twins.step(random_ids(rng, twins), rng.choice([torch.int32, torch.int64]))
            seen.add((policy, plan.split, plan.num_late > 0, plan.num_used > 0, plan.num_unused > 0))
        twins.check()
    for policy in POLICY_NUMBERS:
        assert {split for name, split, *_ in seen if name == policy} == set(Split)
        assert {name for name, split, *flags in seen if split is Split.NONE and all(flags)} >= {policy}


@pytest.mark.parametrize("num_slots", range(1, 13))
def test_every_capacity_from_one_to_all_experts(num_slots):
    rng = random.Random(num_slots)
    twins = Twins(rng, 12, num_slots, 1, "lfru", 8, False, filled=True)
    for _ in range(400):
        twins.step([rng.randrange(12) for _ in range(rng.randint(1, 14))], torch.int32)
        twins.check()


def test_large_layers():
    rng = random.Random(5)
    twins = Twins(rng, 512, 100, 8, "lru", 4, False, filled=True)
    for _ in range(60):
        ids = [expert for _ in range(rng.choice([1, 8, 40])) for expert in rng.sample(range(512), 8)]
        twins.step(ids, torch.int32)
    twins.check()


def planner(num_experts=8, num_slots=4, top_k=2):
    return NativePlanner(host_library(), num_experts, num_slots, top_k, "lru", 8, False)


def plan(native, ids, words=4):
    ids = torch.tensor(ids, dtype=torch.int32)
    native.plan(ids, len(ids), torch.empty_like(ids), torch.zeros(words, dtype=torch.int32))
    return native.last_plan()


def test_an_empty_step_plans_nothing():
    assert plan(planner(), []) == Plan(Split.NONE, (), 0, 0, 0, 0)


def test_a_routed_id_beyond_the_experts_is_ignored_and_counted():
    native = planner()
    made = plan(native, [3, 8, 1_000_000])
    assert made.waves[0].loads == (Load(3, 0, -1),)
    assert native.state[20] == 2
    native.check_integrity()


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


def test_a_policy_that_only_python_has_is_refused():
    with pytest.raises(ValueError, match="no policy 'random': lru, lfu, lfru"):
        NativePlanner(host_library(), 8, 4, 2, "random", 8, False)


def test_tensors_of_the_wrong_kind_are_refused_before_anything_changes():
    native = planner()
    ids = torch.zeros(4, dtype=torch.int32)
    words = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="slot_words has 3 items, needs 4"):
        native.plan(ids, 4, torch.empty_like(ids), words[:3].clone())
    with pytest.raises(ValueError, match="ids has 4 items, needs 5"):
        native.plan(ids, 5, torch.empty_like(ids), words)
    with pytest.raises(TypeError, match="ids must be int32"):
        native.plan(ids.float(), 4, torch.empty_like(ids), words)
    with pytest.raises(ValueError, match="ids must be contiguous"):
        native.plan(torch.zeros(8, dtype=torch.int32)[::2], 4, torch.empty_like(ids), words)
    with pytest.raises(ValueError, match="was it made by planner_init"):
        host_library().planner_plan(torch.zeros(99, dtype=torch.int64), words, ids, 4, torch.empty_like(ids))
    assert native.expert_in == [-1] * 4


def test_a_layer_is_filled_once():
    native = planner()
    native.fill()
    assert native.expert_in == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="only an empty layer can be filled"):
        native.fill()
