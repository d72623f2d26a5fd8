"""The residency state machine of one layer."""

import random

import pytest

from vllm_expert_prefetch.residency import ABSENT, IN_FLIGHT, POLICIES, RESIDENT, ExpertCache, Load, create_policy

NUM_EXPERTS = 8
NUM_SLOTS = 4


@pytest.fixture
def cache():
    """8 experts, 4 slots, all empty."""
    return ExpertCache(NUM_EXPERTS, NUM_SLOTS, create_policy("lru"))


def filled(policy="lru"):
    """Experts 0 to 3 in slots 0 to 3; 0 is the oldest."""
    cache = ExpertCache(NUM_EXPERTS, NUM_SLOTS, create_policy(policy))
    cache.complete([load.expert for load in cache.begin_loads([0, 1, 2, 3], ())])
    return cache


def everything(cache):
    """All that a caller could notice."""
    order = cache.policy.victims(NUM_SLOTS, ())
    return list(cache.slot_of), list(cache.expert_in), set(cache.in_flight), cache.policy.ranked(), order


def states(cache):
    return [cache.lookup(expert) for expert in range(NUM_EXPERTS)]


def test_a_new_cache_holds_nothing(cache):
    assert states(cache) == [ABSENT] * NUM_EXPERTS
    assert cache.num_resident == 0
    cache.check_integrity()


def test_an_expert_is_in_flight_until_its_load_is_complete(cache):
    loads = cache.begin_loads([5, 6], ())
    assert loads == (Load(5, 0, -1), Load(6, 1, -1))
    assert [cache.lookup(expert) for expert in (4, 5, 6)] == [ABSENT, IN_FLIGHT, IN_FLIGHT]
    assert cache.num_resident == 0
    cache.complete([5])
    assert [cache.lookup(expert) for expert in (5, 6)] == [RESIDENT, IN_FLIGHT]
    assert cache.num_resident == 1
    cache.check_integrity()


def test_a_victim_becomes_absent_and_its_slot_serves_the_new_expert():
    cache = filled()
    loads = cache.begin_loads([7], ())
    assert loads == (Load(expert=7, slot=0, victim=0),)
    assert (cache.lookup(0), cache.lookup(7)) == (ABSENT, IN_FLIGHT)
    assert (cache.slot_of[0], cache.slot_of[7], cache.expert_in[0]) == (-1, 0, 7)
    cache.check_integrity()


def test_free_slots_are_used_before_anyone_is_evicted(cache):
    cache.complete([load.expert for load in cache.begin_loads([0, 1, 2], ())])
    assert cache.begin_loads([6, 7], ()) == (Load(6, 3, -1), Load(7, 0, 0))


@pytest.mark.parametrize("policy", POLICIES)
def test_loads_that_do_not_all_fit_change_nothing(policy):
    cache = filled(policy)
    cache.complete([load.expert for load in cache.begin_loads([4], ())])
    before = everything(cache)
    protected = set(cache.policy.victims(2, ()))
    with pytest.raises(RuntimeError, match=r"3 loads need 3 victims and only 2 of 4 slots"):
        cache.begin_loads([expert for expert in range(NUM_EXPERTS) if cache.lookup(expert) is ABSENT][:3], protected)
    assert everything(cache) == before
    cache.check_integrity()


def test_loads_that_do_not_all_fit_leave_the_free_slots_free(cache):
    cache.complete([load.expert for load in cache.begin_loads([0, 1], ())])
    before = everything(cache)
    with pytest.raises(RuntimeError, match="victims"):
        cache.begin_loads([4, 5, 6], {0, 1})
    assert everything(cache) == before
    assert cache.begin_loads([4, 5], {0, 1}) == (Load(4, 2, -1), Load(5, 3, -1))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_slot_in_flight_is_never_a_victim(policy):
    cache = filled(policy)
    first = cache.begin_loads([4, 5], ())
    second = cache.begin_loads([6, 7], ())
    assert not {load.slot for load in first} & {load.slot for load in second}
    with pytest.raises(RuntimeError, match="only 0 of 4"):
        cache.begin_loads([next(iter({0, 1, 2, 3} - set(cache.expert_in)))], ())
    cache.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_protected_expert_is_never_a_victim(policy):
    for protected in range(NUM_SLOTS):
        loads = filled(policy).begin_loads([4, 5, 6], {protected})
        assert {load.victim for load in loads} == set(range(NUM_SLOTS)) - {protected}


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_and_experts_stay_inverse_and_add_up_on_random_walks(policy):
    rng = random.Random(f"cache {policy}")
    cache = filled(policy)
    pending = []
    for _ in range(500):
        if pending and rng.random() < 0.5:
            cache.complete(pending.pop(rng.randrange(len(pending))), cold=rng.random() < 0.3)
        else:
            absent = [expert for expert in range(NUM_EXPERTS) if cache.lookup(expert) is ABSENT]
            room = NUM_SLOTS - len(cache.in_flight)
            experts = rng.sample(absent, min(len(absent), rng.randint(0, room)))
            cache.begin_loads(experts, ())
            pending.append(experts)
        cache.check_integrity()
        placed = [slot for slot in cache.slot_of if slot >= 0]
        assert len(set(placed)) == len(placed)
        assert all(cache.expert_in[cache.slot_of[e]] == e for e in range(NUM_EXPERTS) if cache.slot_of[e] >= 0)
        assert sorted(states(cache)).count(IN_FLIGHT) + cache.num_resident == len(placed) == NUM_SLOTS


@pytest.mark.parametrize("num_slots", [0, -1, NUM_EXPERTS + 1])
def test_a_number_of_slots_that_makes_no_sense_is_refused(num_slots):
    with pytest.raises(ValueError, match=f"need 1 to 8 slots for 8 experts, got {num_slots}"):
        ExpertCache(NUM_EXPERTS, num_slots, create_policy("lru"))


def swap_two_slots(cache):
    cache.expert_in[0], cache.expert_in[1] = cache.expert_in[1], cache.expert_in[0]


def forget_a_slot(cache):
    cache.slot_of[2] = -1


def put_an_expert_in_two_slots(cache):
    cache.expert_in[3] = 2
    cache.slot_of[3] = -1
    cache.slot_of[2] = 3
    cache.policy.remove(3)


def put_two_experts_in_a_slot(cache):
    cache.slot_of[5] = 0


def fly_without_a_slot(cache):
    cache.in_flight.add(6)


def rank_what_is_in_flight(cache):
    cache.in_flight.add(1)


def stop_ranking_a_resident(cache):
    cache.policy.remove(0)


def rank_an_absent_one(cache):
    cache.policy.insert(7)


def free_an_occupied_slot(cache):
    cache._free.append(0)


def lose_a_free_slot(cache):
    cache.policy.remove(3)
    cache.slot_of[3], cache.expert_in[3] = -1, -1


def free_a_slot_twice(cache):
    lose_a_free_slot(cache)
    cache._free += [3, 3]


@pytest.mark.parametrize(
    ("corrupt", "words"),
    [
        (swap_two_slots, "not inverse"),
        (forget_a_slot, "not inverse"),
        (put_two_experts_in_a_slot, "not inverse"),
        (put_an_expert_in_two_slots, "is not the slot count"),
        (fly_without_a_slot, "in flight without a slot"),
        (rank_what_is_in_flight, "policy ranks"),
        (stop_ranking_a_resident, "policy ranks"),
        (rank_an_absent_one, "policy ranks"),
        (free_an_occupied_slot, "free list"),
        (lose_a_free_slot, "free list"),
        (free_a_slot_twice, "free list"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_integrity_sees_and_names_every_corruption(corrupt, words):
    cache = filled()
    cache.check_integrity()
    corrupt(cache)
    with pytest.raises(AssertionError, match=words):
        cache.check_integrity()
