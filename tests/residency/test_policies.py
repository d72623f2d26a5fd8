"""Eviction policies: hand-computed victims with room for four experts, and what all policies share."""

import pytest

from vllm_expert_prefetch.residency import POLICIES, ExpertCache, Ranking

NUM_SLOTS = 4


def victims_of(policy, requests):
    """The victims, in order, when 4 slots serve one expert per step; -1 stands for a free slot."""
    cache = ExpertCache(16, NUM_SLOTS, POLICIES[policy])
    return [load.victim for expert in requests for load in cache.plan([expert]).loads]


def order_of(policy, ranking):
    """The ranked experts, the first to leave first."""
    return sorted(ranking.ranked, key=lambda expert: POLICIES[policy](ranking, expert))


def ranked(hot, cold=()):
    ranking = Ranking(16)
    for expert in hot:
        ranking.touch(expert)
    for expert in cold:
        ranking.add_cold(expert)
    return ranking


def test_lru_evicts_what_was_not_asked_for_longest():
    # 0 is touched again before 4 comes, so 1 leaves first; asking for 1 again evicts 2, and so on round the cache.
    assert victims_of("lru", [0, 1, 2, 3, 0, 4, 1, 3, 5, 0]) == [-1, -1, -1, -1, 1, 2, 0, 4]


def test_lfu_evicts_what_was_asked_for_least_and_the_older_among_equals():
    # Counts 3, 2, 1, 1: 2 leaves for 4, 3 for 5. 2 comes back with its old count, so 4, 5 and 6 leave before it.
    # 6 and 7, asked for twice by then, leave 1 as the oldest of those with two.
    assert victims_of("lfu", [0, 0, 0, 1, 1, 2, 3, 4, 5, 2, 6, 7, 6, 7]) == [-1] * 4 + [2, 3, 4, 5, 6, 7, 1]


def test_lfru_keeps_the_frequent_longer_than_lru_and_lets_it_age_unlike_lfu():
    # Counts over ages at the ninth step: 4/5 for 0, against 1/3 for 2 and 1/2 for 3: the old favourite 0 stays, where
    # lru would have evicted it first. At the last step it is 4/11, against 2/3, 1 and 2 for 4, 5 and 6: 0 leaves,
    # where lfu would have evicted 4.
    requests = [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert victims_of("lfru", requests) == [-1] * 4 + [1, 2, 3, 4, 5, 6, 7, 0]
    assert victims_of("lru", requests)[4] == 0
    assert victims_of("lfu", requests)[-1] == 4


def test_ewma_halves_a_touch_every_twelve_steps_and_straight_in_between():
    ranking = ranked(hot=[0, 0, 1])
    one = ranking.weight[1]
    for step, halves in ((0, 2), (6, 1.5), (12, 1), (24, 0.5), (30, 0.375)):
        ranking.step = step
        assert ranking.faded(0) == 2 * ranking.faded(1) == one * halves
    ranking.touch(1)
    assert (ranking.weight[1], ranking.weighed_at[1]) == (one + one * 0.1875, 30)
    ranking.step = 10**6
    assert ranking.faded(0) == 0


def test_ewma_keeps_the_frequent_longer_than_lru_and_forgets_them_unlike_lfu():
    # Four touches of 0 outweigh the single ones of 1, 2 and 3 when 4 comes, 24 steps later not those of 4, 5 and 6.
    assert victims_of("ewma", [0, 0, 0, 0, 1, 2, 3, 4]) == [-1, -1, -1, -1, 1]
    rounds = [4, 5, 6] * 9
    assert victims_of("ewma", [0, 0, 0, 0, 1, 2, 3, *rounds, 7])[-1] == 0
    assert victims_of("lfu", [*[0] * 20, 1, 2, 3, *rounds, 7])[-1] == 4
    assert victims_of("lru", [0, 0, 0, 0, 1, 2, 3, 4])[-1] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_cold_experts_leave_first_and_the_newest_of_them_before_the_others(policy):
    assert order_of(policy, ranked(hot=[0, 1], cold=[2, 3])) == [3, 2, 0, 1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cold_expert_leaves_first_however_often_it_was_used_before(policy):
    ranking = ranked(hot=[1, *[0] * 20, 2])
    ranking.discard(0)
    ranking.add_cold(0)
    assert order_of(policy, ranking)[0] == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("warm", [lambda ranking: ranking.touch(3), lambda ranking: ranking.keep([3], 5)])
def test_a_needed_expert_is_cold_no_more(policy, warm):
    ranking = ranked(hot=[0, 1], cold=[2, 3])
    warm(ranking)
    assert order_of(policy, ranking)[0] == 2
    assert ranking.cold == {2}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_two_experts_are_wanted_alike(policy):
    ranking = ranked(hot=[0, 1], cold=[2, 3])
    ranking.keep([2, 3], 6)  # the same touch for both
    assert len({POLICIES[policy](ranking, expert) for expert in ranking.ranked}) == 4
    assert order_of(policy, ranking)[2 if policy == "lru" else 0] == 2, "the lower number leaves first"


def test_what_was_removed_is_no_longer_ranked_and_its_touches_are_kept():
    ranking = ranked(hot=[0, 0], cold=[1])
    ranking.discard(0)
    ranking.discard(1)
    assert (ranking.ranked, ranking.cold, ranking.count[0]) == (set(), set(), 2)
