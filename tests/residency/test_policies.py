"""Eviction policies: hand-computed victims with room for four experts, and the contract they share."""

import random

import pytest

from vllm_expert_prefetch.residency import POLICIES, ExpertCache, Planner, create_policy

RANKING_POLICIES = ["lru", "lfu", "lfru"]
NUM_SLOTS = 4


def victims_of(policy, requests):
    """The victims, in order, when 4 slots serve one expert per step; -1 stands for a free slot."""
    planner = Planner(ExpertCache(16, NUM_SLOTS, create_policy(policy)), top_k=1, max_token_waves=0)
    victims = []
    for expert in requests:
        plan = planner.plan([expert])
        victims += [load.victim for load in plan.waves[0].loads]
        planner.complete(plan)
    return victims


def policy_with(name, experts, cold=(), seed=0):
    """A policy that ranks `experts` and then `cold`, each inserted in order."""
    policy = create_policy(name, seed)
    for expert in experts:
        policy.insert(expert)
    for expert in cold:
        policy.insert(expert, cold=True)
    return policy


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


def test_random_victims_are_the_same_for_a_seed_and_others_for_another():
    def answers(seed):
        policy = policy_with("random", range(NUM_SLOTS), seed=seed)
        chosen = []
        for newcomer in range(NUM_SLOTS, 40):
            (victim,) = policy.victims(1, ())
            policy.remove(victim)
            policy.insert(newcomer)
            chosen.append(victim)
        return chosen

    assert answers(seed=5) == answers(seed=5)
    assert answers(seed=5) != answers(seed=6)


def test_random_spares_and_favours_nobody():
    counts = dict.fromkeys(range(NUM_SLOTS), 0)
    for seed in range(400):
        for victim in policy_with("random", range(NUM_SLOTS), seed=seed).victims(1, ()):
            counts[victim] += 1
    assert min(counts.values()) > 60  # of 100 expected


def test_random_draws_anew_after_every_eviction():
    policy = policy_with("random", range(NUM_SLOTS))
    drawn = set()
    for _ in range(40):
        (victim,) = policy.victims(1, ())
        policy.remove(victim)
        policy.insert(victim)
        drawn.add(victim)
    assert drawn == set(range(NUM_SLOTS))


@pytest.mark.parametrize("name", RANKING_POLICIES)
def test_cold_experts_leave_first(name):
    policy = policy_with(name, [0, 1], cold=[2, 3])
    assert set(policy.victims(2, ())) == {2, 3}
    assert set(policy.victims(NUM_SLOTS, ())[2:]) == {0, 1}


@pytest.mark.parametrize("name", RANKING_POLICIES)
def test_cold_experts_leave_first_however_often_they_were_used_before(name):
    policy = policy_with(name, [0, 1])
    for _ in range(20):
        policy.touch(0)
    policy.remove(0)
    policy.insert(0, cold=True)
    assert policy.victims(1, ()) == [0]


@pytest.mark.parametrize("name", RANKING_POLICIES)
def test_a_touch_warms_a_cold_expert(name):
    policy = policy_with(name, [0, 1], cold=[2, 3])
    for _ in range(3):
        policy.touch(3)
    assert policy.victims(1, ()) == [2]
    assert policy.victims(NUM_SLOTS, ())[-1] == 3


@pytest.mark.parametrize("name", RANKING_POLICIES)
def test_an_expert_that_left_cold_may_come_back_warm(name):
    policy = policy_with(name, [0, 1], cold=[2])
    policy.remove(2)
    policy.insert(2)
    assert policy.victims(1, ()) == [0]


@pytest.mark.parametrize("name", POLICIES)
def test_protected_experts_are_never_returned(name):
    policy = policy_with(name, range(NUM_SLOTS))
    for protected in ({0}, {1, 3}, {0, 1, 2}, {0, 1, 2, 3}):
        assert set(policy.victims(NUM_SLOTS, protected)) == set(range(NUM_SLOTS)) - protected


@pytest.mark.parametrize("name", POLICIES)
def test_no_more_victims_than_asked_for_and_none_twice(name):
    policy = policy_with(name, range(NUM_SLOTS))
    for count in range(NUM_SLOTS + 2):
        victims = policy.victims(count, ())
        assert len(victims) == len(set(victims)) == min(count, NUM_SLOTS)


@pytest.mark.parametrize("name", POLICIES)
def test_asking_for_victims_changes_nothing(name):
    rng = random.Random(name)
    asked, unasked = (policy_with(name, [0, 1, 2], cold=[3], seed=9) for _ in range(2))
    for newcomer in range(4, 60):
        for _ in range(3):
            asked.victims(rng.randint(0, 4), {rng.randrange(newcomer)})
        (victim,) = unasked.victims(1, ())
        assert asked.victims(1, ()) == [victim]
        for policy in (asked, unasked):
            policy.remove(victim)
            policy.insert(newcomer)
            policy.touch(newcomer)


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_removed_is_no_longer_ranked(name):
    policy = policy_with(name, range(NUM_SLOTS))
    policy.remove(1)
    assert policy.ranked() == {0, 2, 3} == set(policy.victims(NUM_SLOTS, ()))
