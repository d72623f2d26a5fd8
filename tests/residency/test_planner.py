"""Plans: scenarios by hand, a brute-force reference, and random walks over the contract."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_contract import PlannedLayer
from reference_planner import ReferencePlanner

from vllm_expert_prefetch.residency import POLICIES, RESIDENT, ExpertCache, Load, Plan, Planner, Split, Wave
from vllm_expert_prefetch.residency import create_policy as policy_of

WALKS = 24
STEPS_PER_WALK = 220
KEPT = [0, 1, 4, 5, 6, 7, 2, 3]
"""Rows of two: {0, 1} and {2, 3} are cached in a filled layer of four slots, {4, 5} and {6, 7} are not."""


def small_layer(max_token_waves=8, stream=False, policy="lru"):
    """Experts 0 to 3 of 8 in slots 0 to 3, all cold, so that lru evicts 3, then 2, 1 and 0; two experts per token."""
    return PlannedLayer(8, 4, 2, max_token_waves, policy, stream)


def test_a_narrow_step_is_one_wave():
    plan = small_layer().step([0, 1, 1, 5])
    wave = Wave((0, 1, 5), (0, 1, 3), (Load(expert=5, slot=3, victim=3),), None)
    assert plan == Plan(Split.NONE, (wave,), num_hits=2, num_late=0, num_misses=1, num_evictions=1)


def test_a_step_that_needs_exactly_the_slots_there_are_is_one_wave():
    plan = small_layer().step([4, 5, 6, 7])
    assert plan.split is Split.NONE
    assert [load.victim for load in plan.waves[0].loads] == [3, 2, 1, 0]
    assert (plan.num_hits, plan.num_misses, plan.num_evictions) == (0, 4, 4)


def test_free_slots_are_not_counted_as_evictions():
    plan = PlannedLayer(8, 4, 2, 8, "lru", filled=False).step([0, 5])
    assert plan.waves[0].loads == (Load(0, 0, -1), Load(5, 1, -1))
    assert (plan.num_misses, plan.num_evictions) == (2, 0)


def test_split_by_tokens_serves_the_tokens_that_are_cached_first():
    plan = small_layer().step(KEPT)
    cached = Wave((0, 1, 2, 3), (0, 1, 2, 3), (), (0, 3))
    loads = (Load(4, 3, 3), Load(5, 2, 2), Load(6, 1, 1), Load(7, 0, 0))
    assert plan == Plan(Split.TOKENS, (cached, Wave((4, 5, 6, 7), (3, 2, 1, 0), loads, (1, 2))), 4, 0, 4, 4)


def test_split_by_tokens_up_to_the_number_of_waves_allowed():
    far_apart = [4, 5, 6, 7, 4, 6, 5, 7, 0, 4, 1, 5]
    num_waves = len(small_layer().step(far_apart).waves)
    assert num_waves > 1
    assert small_layer(max_token_waves=num_waves).step(far_apart).split is Split.TOKENS
    assert small_layer(max_token_waves=num_waves - 1).step(far_apart).split is Split.EXPERTS


def test_split_by_experts_uses_what_is_there_and_half_of_the_slots():
    layer = small_layer(max_token_waves=0)
    plan = layer.step(KEPT)
    present = Wave((0, 1, 2, 3), (0, 1, 2, 3), (), None)
    first = Wave((4, 5), (3, 2), (Load(4, 3, 3), Load(5, 2, 2)), None)
    second = Wave((6, 7), (2, 3), (Load(6, 2, 5), Load(7, 3, 4)), None)
    assert plan == Plan(Split.EXPERTS, (present, first, second), 4, 0, 4, 4)
    assert layer.cache.expert_in == [0, 1, 6, 7]


def test_a_streamed_step_uses_the_slots_and_leaves_them_alone():
    layer = small_layer(stream=True)
    order = layer.cache.policy.victims(4, ())
    plan = layer.step([0, 1, 4, 5, 6, 2])
    wave = Wave((0, 1, 4, 5, 6, 2), (0, 1, -1, -1, -1, 2), (Load(4, 4, -1), Load(5, 5, -1), Load(6, 6, -1)), None)
    assert plan == Plan(Split.STREAM, (wave,), num_hits=3, num_late=0, num_misses=3, num_evictions=0)
    assert layer.cache.policy.victims(4, ()) == order


def test_an_expert_that_something_else_is_bringing_is_late_and_not_loaded_again():
    plan = small_layer().step([0, 5], also_in_flight=[5])
    assert (plan.num_hits, plan.num_late, plan.num_misses) == (1, 1, 0)
    assert plan.waves[0].loads == ()


def test_a_wave_split_step_has_every_prefetch_settled_first():
    layer = small_layer(max_token_waves=0)
    plan = layer.step([0, 1, 4, 5, 6, 2], also_in_flight=[4])  # 4 takes the place of 3, and ranks as cold
    assert [(wave.experts, wave.loads) for wave in plan.waves] == [
        ((0, 1, 4, 2), ()),
        ((5, 6), (Load(5, 3, 4), Load(6, 2, 2))),
    ]
    assert (plan.num_hits, plan.num_late, plan.num_misses) == (4, 0, 2)
    assert (plan.num_used, plan.num_unused) == (1, 0)


def test_a_streamed_step_waits_for_a_late_expert_and_takes_it_from_its_slot():
    layer = small_layer(stream=True)
    plan = layer.step([0, 1, 4, 5, 6, 2], also_in_flight=[4])
    wave = Wave((0, 1, 4, 5, 6, 2), (0, 1, 3, -1, -1, 2), (Load(5, 5, -1), Load(6, 6, -1)), None, (4,))
    assert plan == Plan(Split.STREAM, (wave,), 3, 1, 2, 0, num_used=1)


def test_a_step_is_refused_while_prefetches_leave_it_too_few_slots():
    planner = small_layer().planner
    planner.plan_prefetch([4, 5], budget=2)
    assert not planner.must_settle([0, 1])
    assert planner.must_settle([0, 1, 6])
    with pytest.raises(RuntimeError, match="2 prefetches must be settled"):
        planner.plan([0, 1, 6])
    planner.settle(landed=[4], dropped=[5])
    assert not planner.must_settle([0, 1, 6])
    assert planner.plan([0, 1, 6]).num_unused == 0  # the free slot serves
    assert planner.cache.in_flight == {6}


def test_a_prefetch_brings_the_most_wanted_that_are_absent():
    planner = small_layer().planner
    plan = planner.plan_prefetch([6, 0, 6, -1, 5, 7], budget=2)
    assert plan.loads == (Load(6, 3, 3), Load(5, 2, 2))
    assert plan.num_evictions == 2
    assert planner.plan_prefetch([5, 6], budget=2).loads == ()  # in flight already
    assert planner.plan_prefetch([7], budget=0).loads == ()


def test_a_prefetch_evicts_nothing_that_is_predicted_or_in_flight():
    planner = small_layer().planner
    assert planner.plan_prefetch([3, 2, 4, 5, 6, 7], budget=4).loads == (Load(4, 1, 1), Load(5, 0, 0))
    assert planner.plan_prefetch([3, 2, 6], budget=4).loads == ()


def test_a_dropped_prefetch_frees_its_slot_and_is_not_counted():
    planner = small_layer().planner
    planner.plan_prefetch([4], budget=1)
    planner.settle(landed=(), dropped=[4])
    assert planner.cache.expert_in == [0, 1, 2, -1]
    plan = planner.plan([5])
    assert plan.waves[0].loads == (Load(5, 3, -1),)
    assert (plan.num_used, plan.num_unused) == (0, 0)


def test_a_prediction_is_used_once_or_evicted_unused():
    layer = small_layer()
    assert layer.step([0], also_in_flight=[4, 5]).num_used == 0
    plan = layer.step([4, 6])  # 4 is of use; 5, the coldest, makes room for 6
    assert (plan.num_used, plan.num_unused) == (1, 1)
    plan = layer.step([4, 7])
    assert (plan.num_used, plan.num_unused) == (0, 0)


def test_a_prefetch_that_evicts_an_untouched_prefetch_counts_it():
    planner = small_layer().planner
    planner.plan_prefetch([4], budget=1)
    planner.settle([4], ())
    assert planner.plan_prefetch([5], budget=1) == ((Load(5, 3, 4),), 1, 1)


def test_the_loads_of_a_plan_are_in_flight_until_it_is_complete():
    cache = ExpertCache(8, 4, policy_of("lru"))
    planner = Planner(cache, 2, 8)
    plan = planner.plan([5, 6])
    assert cache.in_flight == {5, 6}
    planner.complete(plan)
    assert [cache.lookup(expert) for expert in (5, 6)] == [RESIDENT, RESIDENT]


@pytest.mark.parametrize("ids", [[], [-1, -1], [-1] * 40])
def test_padding_changes_nothing(ids):
    layer = small_layer()
    before = layer.cache.policy.victims(4, ())
    assert layer.step(ids) == Plan(Split.NONE, (), 0, 0, 0, 0)
    assert layer.cache.policy.victims(4, ()) == before


@pytest.mark.parametrize("wide", [KEPT, [*KEPT, 0, 4, 1, 5, 2, 6]])
@pytest.mark.parametrize("options", [{"max_token_waves": 0}, {"max_token_waves": 8}, {"stream": True}])
def test_padding_inside_a_step_changes_no_decision(wide, options):
    padded = [-1, -1, *wide[:4], -1, -1, *wide[4:], -1, -1]
    plain, with_padding = small_layer(**options), small_layer(**options)
    first, second = plain.step(wide), with_padding.step(padded)
    assert [(wave.experts, wave.loads) for wave in first.waves] == [(wave.experts, wave.loads) for wave in second.waves]
    assert plain.cache.expert_in == with_padding.cache.expert_in


def test_a_wide_step_does_not_promote_what_it_hits():
    layer = small_layer(max_token_waves=0)
    layer.step([3, 2])  # now 1 and 0 are cold and leave first
    layer.step(KEPT)
    assert {2, 3} <= set(layer.cache.expert_in)
    assert set(layer.cache.policy.victims(2, ())) == {6, 7}  # what the wide step brought


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [1, 2, 5, 8, 17])
def test_a_wide_step_leaves_at_least_half_of_the_slots_alone(policy, num_slots):
    rng = random.Random(f"{policy} {num_slots}")
    layer = PlannedLayer(40, num_slots, 1, 0, policy)
    for _ in range(30):
        layer.step([rng.randrange(40)])
        before = list(layer.cache.expert_in)
        plan = layer.step(rng.sample(range(40), 38))
        assert plan.split is Split.EXPERTS
        left = sum(old != new for old, new in zip(before, layer.cache.expert_in, strict=True))
        assert left <= max(1, num_slots // 2)


def test_fewer_slots_than_a_token_needs_are_refused():
    with pytest.raises(ValueError, match="a token needs 5 experts at once and the layer has 4 slots"):
        Planner(ExpertCache(8, 4, policy_of("lru")), top_k=5, max_token_waves=8)


def random_layer(rng, policy):
    num_experts = rng.randint(2, 40)
    top_k = rng.randint(1, min(8, num_experts))
    num_slots = rng.randint(top_k, num_experts)
    waves = rng.choice([0, 1, 2, 4, 8])
    return PlannedLayer(num_experts, num_slots, top_k, waves, policy, rng.random() < 0.25, filled=rng.random() < 0.7)


def random_ids(rng, layer):
    """Skewed routing of a few tokens or many: whole rows of padding, partial ones, and rows that repeat an expert."""
    experts = range(layer.num_experts)
    favourites = range(max(layer.top_k, layer.num_experts // 3))
    ids = []
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8, 20])):
        row = rng.sample(favourites if rng.random() < 0.6 else experts, layer.top_k)
        kind = rng.random()
        if kind < 0.05:
            row = [-1] * layer.top_k
        elif kind < 0.1:
            row[rng.randrange(layer.top_k)] = -1
        elif kind < 0.15:
            row[rng.randrange(layer.top_k)] = row[0]
        ids += row
    return ids


def random_others(rng, layer):
    """Absent experts that are being prefetched while a step arrives, needed by it or not."""
    absent = [expert for expert in range(layer.num_experts) if layer.cache.slot_of[expert] < 0]
    return rng.sample(absent, min(len(absent), rng.choice([0, 0, 0, 1, 2, 3])))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_plan_of_random_walks_keeps_the_contract(policy):
    splits, some_were_late = set(), False
    for walk in range(WALKS):
        rng = random.Random(f"{policy} {walk}")
        layer = random_layer(rng, policy)
        for _ in range(STEPS_PER_WALK):
            ids = random_ids(rng, layer)
            plan = layer.step(ids, random_others(rng, layer))
            splits.add(plan.split)
            some_were_late |= plan.num_late > 0
    assert splits == set(Split)
    assert some_were_late


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru"])
def test_every_plan_of_random_walks_is_the_brute_force_one(policy):
    for walk in range(WALKS):
        rng = random.Random(f"reference {policy} {walk}")
        layer = random_layer(rng, policy)
        reference = ReferencePlanner(layer.num_slots, layer.top_k, layer.max_token_waves, policy, layer.stream)
        if layer.filled:
            reference.fill()
        for _ in range(60):
            ids = random_ids(rng, layer)
            assert layer.step(ids) == reference.plan(ids)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_planners_fed_alike_decide_alike(policy):
    for walk in range(4):
        rng = random.Random(f"twins {policy} {walk}")
        shape = rng.getstate()
        one = random_layer(rng, policy)
        rng.setstate(shape)
        other = random_layer(rng, policy)
        for _ in range(60):
            ids = random_ids(rng, one)
            assert one.step(ids) == other.step(ids)


@st.composite
def small_walks(draw):
    """A tiny layer and a few steps for it: small enough to shrink to something readable."""
    num_experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(3, num_experts)))
    num_slots = draw(st.integers(top_k, num_experts))
    expert = st.integers(-1, num_experts - 1)
    row = st.lists(expert, min_size=top_k, max_size=top_k)
    steps = draw(st.lists(st.lists(row, max_size=5), max_size=6))
    waves, policy = draw(st.sampled_from([0, 1, 2, 8])), draw(st.sampled_from(["lru", "lfu", "lfru"]))
    return (num_slots, top_k, waves, policy, draw(st.booleans())), num_experts, steps


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(small_walks())
def test_every_plan_of_a_tiny_layer_is_the_brute_force_one(walk):
    arguments, num_experts, steps = walk
    layer, reference = PlannedLayer(num_experts, *arguments, filled=False), ReferencePlanner(*arguments)
    for rows in steps:
        ids = [expert for row in rows for expert in row]
        assert layer.step(ids) == reference.plan(ids)
