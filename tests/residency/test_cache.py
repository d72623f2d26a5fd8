"""What a step, a guess and a settled prefetch do to one layer: scenarios by hand."""

import re

import pytest

from vllm_expert_prefetch.residency import ABSENT, IN_FLIGHT, POLICIES, RESIDENT, ExpertCache, Load, Plan, PrefetchPlan
from vllm_expert_prefetch.residency.cache import STALE_ROUNDS

NUM_EXPERTS, NUM_SLOTS = 8, 4


def empty(policy="lru"):
    return ExpertCache(NUM_EXPERTS, NUM_SLOTS, POLICIES[policy])


def filled(policy="lru"):
    """Experts 0 to 3 in slots 0 to 3, touched once each; 0 is the oldest."""
    cache = empty(policy)
    cache.plan([0, 1, 2, 3])
    return cache


def victims(loads):
    return [load.victim for load in loads]


def test_a_new_cache_holds_nothing():
    cache = empty()
    assert {cache.lookup(expert) for expert in range(NUM_EXPERTS)} == {ABSENT}
    assert cache.num_resident == 0
    cache.check_integrity()


@pytest.mark.parametrize("num_slots", [0, -1, NUM_EXPERTS + 1])
def test_a_number_of_slots_that_makes_no_sense_is_refused(num_slots):
    with pytest.raises(ValueError, match=f"need 1 to 8 slots for 8 experts, got {num_slots}"):
        ExpertCache(NUM_EXPERTS, num_slots, POLICIES["lru"])


def test_a_narrow_step_takes_free_slots_before_those_of_victims():
    cache = empty()
    assert cache.plan([0, 1, 2]) == Plan(
        False, {0: 0, 1: 1, 2: 2}, (Load(0, 0, -1), Load(1, 1, -1), Load(2, 2, -1)), ()
    )
    plan = cache.plan([6, 2, 7, 6])
    assert plan == Plan(False, {6: 3, 2: 2, 7: 0}, (Load(6, 3, -1), Load(7, 0, 0)), ())
    assert (plan.num_hits, plan.num_evictions) == (1, 1)
    assert (cache.lookup(0), cache.lookup(7), cache.num_resident) == (ABSENT, RESIDENT, 4)


def test_a_step_that_needs_exactly_the_slots_there_are_is_narrow():
    plan = filled().plan([4, 5, 6, 7])
    assert not plan.is_wide
    assert [load.row for load in plan.loads] == victims(plan.loads) == [0, 1, 2, 3]


def test_a_narrow_step_that_finds_no_victim_takes_overflow_rows():
    cache = filled()
    cache.plan_prefetch([4, 5, 6], budget=3)
    plan = cache.plan([3, 7, 0])
    assert plan == Plan(False, {3: 3, 7: 4, 0: 5}, (Load(7, 4, -1), Load(0, 5, -1)), (), num_displaced=1)
    assert (cache.lookup(7), cache.in_flight) == (ABSENT, {4, 5, 6})
    cache.check_integrity()


def test_a_step_without_an_expert_does_nothing():
    cache = filled()
    assert cache.plan([-1, -1]) == Plan(False, {}, (), ())
    assert cache.ranking.tick == NUM_SLOTS


def test_an_id_beyond_the_experts_is_ignored():
    cache = filled()
    assert cache.plan([9, 8, 1]).rows == {1: 1}
    assert cache.plan_prefetch([8, -3, 1_000_000], budget=3).loads == ()


def test_a_wide_step_gives_slots_to_what_its_latest_tokens_miss_and_numbers_the_overflow_rows():
    plan = empty().plan([0, 1, 2, 3, 4, 5, 1])
    in_slots = (Load(1, 0, -1), Load(5, 1, -1), Load(4, 2, -1), Load(3, 3, -1))
    assert plan == Plan(True, {0: 5, 1: 0, 2: 4, 3: 3, 4: 2, 5: 1}, (*in_slots, Load(2, 4, -1), Load(0, 5, -1)), ())


def test_a_wide_step_leaves_hot_experts_in_their_slots():
    cache = filled()
    plan = cache.plan([4, 5, 6, 7, 0])
    assert plan.loads == (Load(7, 4, -1), Load(6, 5, -1), Load(5, 6, -1), Load(4, 7, -1))
    assert cache.expert_in[:4] == [0, 1, 2, 3]
    assert plan.num_hits == 1


def test_a_wide_step_evicts_cold_experts():
    cache = filled()
    (load,) = cache.plan_prefetch([6], budget=1).loads
    cache.settle([6], ())
    plan = cache.plan([3, 4, 5, 7, 1])
    assert plan.loads == (Load(7, load.row, 6), Load(5, 4, -1), Load(4, 5, -1))
    assert plan.num_unused == 1


def test_a_wide_step_evicts_an_expert_that_was_not_needed_for_eight_rounds():
    for num_touches, stale in ((25, []), (26, [1]), (27, [1, 2])):
        cache = filled()
        for _ in range(num_touches):
            cache.plan([0])
        # At the fifth expert of the wide step the clock shows 4 + touches + 5; 1 was touched at 2.
        plan = cache.plan([0, 4, 5, 6, 7])
        assert [victim for victim in victims(plan.loads) if victim >= 0] == stale
    assert STALE_ROUNDS * NUM_SLOTS == 32


def test_a_wide_step_keeps_the_order_of_the_hot_experts_it_needs_and_lets_the_others_age():
    cache = filled()
    cache.plan([3, 0, 4, 5, 6])
    assert victims(cache.plan([4, 5, 6, 7]).loads) == [1, 2, 0, 3]


def test_a_wide_step_makes_the_cold_experts_hot_that_it_needs():
    cache = empty()
    cache.plan([0, 1, 2, 3, 4, 5])
    assert cache.ranking.cold == {2, 3, 4, 5}
    plan = cache.plan([5, 0, 1, 6, 7])
    assert plan.loads == (Load(7, 3, 2), Load(6, 2, 3), Load(1, 1, 4), Load(0, 4, -1))
    assert cache.ranking.cold == {7, 6, 1}


def test_what_a_wide_step_brings_leaves_first_the_newest_before_all_others():
    cache = empty()
    cache.plan([6, 7])
    cache.plan([0, 1, 2, 3, 4])
    assert cache.ranking.cold == {3, 4}
    assert victims(cache.plan([0, 1, 2]).loads) == [3, 4, 6]


def test_ticks_count_what_was_needed_and_only_narrow_steps_count_touches():
    cache = filled()
    cache.plan([0, 1, 4, 5, 6])
    assert (cache.ranking.tick, cache.ranking.count) == (9, [1] * 4 + [0] * 4)
    cache.plan([0, 4])
    assert (cache.ranking.tick, cache.ranking.count) == (11, [2, 1, 1, 1, 1, 0, 0, 0])


def test_a_prefetch_brings_the_most_wanted_within_its_budget():
    cache = filled()
    assert cache.plan_prefetch([-1, 7, 5, 7, 0, 6], budget=2) == PrefetchPlan((Load(7, 1, 1), Load(5, 2, 2)), 0)
    assert [cache.lookup(expert) for expert in (5, 6, 7, 1)] == [IN_FLIGHT, ABSENT, IN_FLIGHT, ABSENT]
    assert cache.num_resident == 2
    cache.check_integrity()


@pytest.mark.parametrize("budget", [0, -1])
def test_a_prefetch_without_a_budget_does_nothing(budget):
    cache = empty()
    assert cache.plan_prefetch([1, 2], budget) == PrefetchPlan((), 0)
    assert cache.in_flight == set()


def test_a_prefetch_spends_no_budget_on_what_is_there_or_on_its_way():
    cache = filled()
    cache.plan_prefetch([4], budget=1)
    assert [load.expert for load in cache.plan_prefetch([4, 3, 5], budget=1).loads] == [5]


def test_a_far_guess_evicts_only_what_is_cold_or_was_not_needed_for_a_round():
    cache = ExpertCache(8, NUM_SLOTS, POLICIES["lru"])
    for expert in (0, 1, 2, 3):
        cache.plan([expert])
    assert cache.plan_prefetch([4, 5], budget=2, is_far=True).loads == ()
    cache.plan([3])  # five touches: the first one is four touches ago
    assert cache.plan_prefetch([4, 5], budget=2, is_far=True).loads == ()
    cache.plan([3])
    assert [load.victim for load in cache.plan_prefetch([4, 5], budget=2, is_far=True).loads] == [0]
    cache.settle([4], [])
    assert [load.victim for load in cache.plan_prefetch([5], budget=1, is_far=True).loads] == [4], "cold"
    assert [load.victim for load in cache.plan_prefetch([6], budget=1).loads] == [1], "a near guess takes any"


def test_a_prefetch_evicts_nobody_that_is_predicted_or_in_flight():
    cache = filled()
    cache.plan_prefetch([4], budget=1)  # in place of 0
    plan = cache.plan_prefetch([1, 5, 6, 3, 7], budget=4)
    assert plan.loads == (Load(5, 2, 2),)
    assert cache.expert_in[:4] == [4, 1, 5, 3]


def test_a_prefetched_expert_is_cold_until_it_is_needed():
    cache = filled()
    (load,) = cache.plan_prefetch([4], budget=1).loads
    cache.settle([4], ())
    assert (cache.lookup(4), cache.ranking.cold) == (RESIDENT, {4})
    assert cache.plan([4]).num_used == 1
    assert cache.ranking.cold == set()
    assert cache.plan([4]).num_used == 0
    assert cache.row_of[4] == load.row


def test_a_cancelled_prefetch_leaves_a_free_slot():
    cache = filled()
    (load,) = cache.plan_prefetch([4], budget=1).loads
    cache.settle((), [4])
    assert (cache.lookup(4), cache.free, cache.untouched) == (ABSENT, [load.row], set())
    assert cache.plan([5]).loads == (Load(5, load.row, -1),)
    cache.check_integrity()


@pytest.mark.parametrize("others", [[], [1, 5, 6, 7]], ids=["narrow", "wide"])
def test_a_needed_prefetch_that_has_not_landed_is_late_and_then_hot(others):
    cache = filled()
    cache.plan_prefetch([4], budget=1)
    plan = cache.plan([4, *others])
    assert (plan.late, plan.num_used, plan.rows[4]) == ((4,), 1, 0)
    assert (cache.lookup(4), cache.in_flight) == (RESIDENT, set())
    assert 4 in cache.ranking.ranked - cache.ranking.cold
    cache.check_integrity()


def test_a_prefetch_that_left_without_having_been_needed_is_unused():
    cache = filled()
    cache.plan_prefetch([4, 5], budget=2)
    cache.settle([4, 5], ())
    assert cache.plan([6]).num_unused == 1
    assert cache.plan_prefetch([7], budget=1).num_unused == 1
    assert cache.untouched == {7}


def test_a_miss_on_what_a_prefetch_evicted_is_displaced_and_counted_once():
    cache = filled()
    cache.plan_prefetch([4, 5], budget=2)
    cache.settle([4, 5], ())
    assert cache.displaced == {0, 1}
    assert cache.plan([0]).num_displaced == 1
    assert cache.plan([0]).num_displaced == 0
    assert cache.displaced == {1}


def test_what_a_step_evicted_is_not_displaced():
    cache = filled()
    cache.plan([4])
    assert cache.plan([0]).num_displaced == 0


def test_an_expert_that_a_prefetch_brings_back_is_displaced_no_more():
    cache = filled()
    cache.plan_prefetch([4], budget=1)
    cache.plan_prefetch([0], budget=1)
    plan = cache.plan([0])
    assert (plan.late, plan.num_displaced) == ((0,), 0)


def test_row_ids_say_where_each_entry_finds_its_expert_and_send_padding_to_a_row_that_is_there():
    plan = filled().plan([2, 0, -1, 9])
    assert plan.row_ids([2, 0, -1, 9, 0, -1, 7], num_real=4) == [2, 0, -1, 2, 2, -1, 2]
    assert plan.row_ids([2, 0, -1, 9, 0, -1, 7], num_real=7) == [2, 0, -1, 2, 0, -1, 2]
    assert filled().plan([]).row_ids([5, -1], num_real=0) == [0, -1]


def swap_two_slots(cache):
    cache.expert_in[0], cache.expert_in[1] = cache.expert_in[1], cache.expert_in[0]


def put_two_experts_in_a_slot(cache):
    cache.row_of[5] = 0


def fly_without_a_row(cache):
    cache.in_flight.add(6)


def expect_what_is_absent(cache):
    cache.untouched.add(6)


def miss_what_is_there(cache):
    cache.displaced.add(0)


def stop_ranking_a_resident(cache):
    cache.ranking.ranked.remove(0)


def rank_what_is_in_flight(cache):
    cache.in_flight.add(1)


def rank_an_absent_one(cache):
    cache.ranking.ranked.add(7)


def cool_an_absent_one(cache):
    cache.ranking.cold.add(7)


def free_an_occupied_slot(cache):
    cache.free.append(0)


def lose_a_free_slot(cache):
    cache.free.remove(3)


def free_a_slot_twice(cache):
    cache.free.append(3)


@pytest.mark.parametrize(
    ("corrupt", "words"),
    [
        (swap_two_slots, "not inverse"),
        (put_two_experts_in_a_slot, "not inverse"),
        (fly_without_a_row, "in flight without a row: {6}"),
        (expect_what_is_absent, "prefetched without a row: {6}"),
        (miss_what_is_there, "displaced and placed: {0}"),
        (stop_ranking_a_resident, "ranked are"),
        (rank_what_is_in_flight, "ranked are"),
        (rank_an_absent_one, "ranked are"),
        (cool_an_absent_one, "cold and not resident: {7}"),
        (free_an_occupied_slot, "free list"),
        (lose_a_free_slot, "free list"),
        (free_a_slot_twice, "free list"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_integrity_sees_and_names_every_corruption(corrupt, words):
    cache = empty()
    cache.plan([0, 1, 2])
    cache.check_integrity()
    corrupt(cache)
    with pytest.raises(AssertionError, match=re.escape(words)):
        cache.check_integrity()
