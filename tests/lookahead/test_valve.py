"""How many guesses are fetched, and the valve that closes where fetching does not pay."""

import random
from itertools import pairwise

import pytest

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.lookahead.valve import Budget, Valve

NUM_STEPS = 4000


def words(**named):
    return Words(*[0] * len(Words._fields))._replace(**named)


PAYS = words(steps=32, used=20, unused=10, displaced=5)
DOES_NOT = words(steps=32, used=5, unused=10, displaced=8)
WASTES = words(steps=32, used=5, unused=60)
CLAIMS = words(steps=32, used=20, claimed=20, displaced=1)
NOTHING = words(steps=32)


def test_while_nothing_is_known_the_slots_are_the_budget():
    budget = Budget(record_seconds=1.0, most=6)
    assert (budget.num_records, budget.has_time) == (6, True)


@pytest.mark.parametrize(
    ("window", "records", "has_time"),
    [(0.0, 1, False), (0.9, 1, False), (1.0, 1, True), (2.1, 3, True), (99.0, 6, True)],
)
def test_what_the_link_can_begin_is_fetched_and_a_less_likely_guess_where_a_whole_record_fits(
    window, records, has_time
):
    budget = Budget(record_seconds=1.0, most=6)
    for _ in range(100):
        budget.note(window)
    assert (budget.num_records, budget.has_time) == (records, has_time)


def test_a_budget_follows_the_time_there_is_and_not_a_single_step():
    budget = Budget(record_seconds=1.0, most=6)
    for _ in range(100):
        budget.note(1.0)
    budget.note(5.0)
    assert budget.num_records == 2
    for _ in range(100):
        budget.note(5.0)
    assert budget.num_records == 5


def run_timed(valve, cost_open, cost_closed, num_steps=NUM_STEPS):
    """How many of the steps the valve was open, when steps cost so much with prefetch and so much without."""
    num_open = 0
    for _ in range(num_steps):
        num_open += valve.depth > 0
        cost = cost_open if valve.depth > 0 else cost_closed
        valve.note(words(steps=1, stall_ns=int(0.5e9 * cost)), 0.5 * cost)
    return num_open


def timed(forced=False):
    return Valve(forced, is_timed=True)


def test_where_prefetch_saves_time_it_is_nearly_always_on():
    assert run_timed(timed(), 1.0, 2.0) > 0.9 * NUM_STEPS


@pytest.mark.parametrize("cost_open", [1.0, 1.5, 30.0])
def test_where_prefetch_saves_no_time_it_is_nearly_always_off(cost_open):
    assert run_timed(timed(), cost_open, 1.0) < 0.1 * NUM_STEPS


def test_time_spent_on_guessing_counts():
    valve, num_open = timed(), 0
    for _ in range(NUM_STEPS):
        num_open += valve.depth > 0
        valve.note(words(steps=1, stall_ns=10**9), 0.5 if valve.depth > 0 else 0.0)
    assert num_open < 0.1 * NUM_STEPS


def test_a_timed_valve_opens_again_when_prefetch_begins_to_pay_and_closes_when_it_ceases_to():
    valve = timed()
    run_timed(valve, 2.0, 1.0)
    run_timed(valve, 1.0, 2.0, 2000)
    assert run_timed(valve, 1.0, 2.0, 1000) > 900
    run_timed(valve, 2.0, 1.0, 2000)
    assert run_timed(valve, 2.0, 1.0, 1000) < 150


def test_wide_steps_do_not_count():
    valve = timed()
    for _ in range(1000):
        valve.note(words(steps=1, wide_steps=1, stall_ns=10**9), 0.0)
    assert valve.depth > 0


def test_what_a_prompt_used_of_a_preload_does_not_pay_for_decode_steps():
    valve = counted()
    for _ in range(4):
        valve.note(DOES_NOT, 0.0)
        valve.note(PAYS._replace(wide_steps=1, used=10_000), 0.0)
    assert valve.depth == 0


def run_counted(valve, when_open, num_windows=4000):
    """The share of the windows in which the valve was open."""
    num_open = 0
    for _ in range(num_windows):
        num_open += valve.depth > 0
        valve.note(when_open if valve.depth > 0 else NOTHING, 0.0)
    return num_open / num_windows


def counted(forced=False):
    return Valve(forced, is_timed=False)


@pytest.mark.parametrize("delta", [PAYS, NOTHING])
def test_where_prefetch_saves_misses_or_does_nothing_it_stays_on(delta):
    assert run_counted(counted(), delta) == 1.0


@pytest.mark.parametrize("delta", [DOES_NOT, WASTES, CLAIMS])
def test_where_prefetch_saves_no_misses_it_is_nearly_always_off(delta):
    assert 0 < run_counted(counted(), delta) < 0.1


def test_a_counting_valve_is_tried_again_at_growing_intervals():
    valve, opened = counted(), []
    for step in range(3000):
        was_open = valve.depth > 0
        valve.note(DOES_NOT if was_open else NOTHING, 0.0)
        if valve.depth > 0 and not was_open:
            opened.append(step)
    gaps = [later - earlier for earlier, later in pairwise(opened)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 3 * gaps[0]


def test_a_counting_valve_opens_again_when_prefetch_begins_to_pay():
    valve = counted()
    run_counted(valve, DOES_NOT, 500)
    run_counted(valve, PAYS, 300)
    assert run_counted(valve, PAYS, 500) == 1.0


def test_an_idle_server_decides_nothing():
    assert run_counted(counted(), words(unused=3, displaced=3), 1000) == 1.0


@pytest.mark.parametrize("is_timed", [True, False])
def test_a_forced_valve_never_closes(is_timed):
    valve = Valve(forced=True, is_timed=is_timed)
    for _ in range(1000):
        valve.note(DOES_NOT._replace(stall_ns=10**12), 1.0)
        assert valve.depth > 0


def run_deep(valve, costs, num_steps):
    """The shares of the steps that each depth was open, where steps cost so much."""
    seen = [0] * len(costs)
    for _ in range(num_steps):
        seen[valve.depth] += 1
        valve.note(words(steps=1, stall_ns=int(1e9 * costs[valve.depth])), 0.0)
    return [number / num_steps for number in seen]


@pytest.mark.parametrize(
    ("costs", "best"),
    [((5, 4, 3, 2, 1), 4), ((5, 3, 2, 2, 2), 2), ((5, 2, 4, 4, 4), 1), ((1, 2, 3, 4, 5), 0), ((5, 6, 6, 2, 6), 3)],
)
def test_the_cheapest_depth_is_held_and_a_draw_is_the_nearer_ones(costs, best):
    shares = run_deep(Valve(False, True, 4), costs, 8000)
    assert shares[best] > 0.85
    assert min(shares) > 0, "every depth is tried"


def run_guessing(valve, waiting, guessing, num_steps):
    """The shares of the steps that each depth was open, where each distance's guess takes so long and saves nothing."""
    seen = [0] * 5
    for _ in range(num_steps):
        seen[valve.depth] += 1
        valve.note(words(steps=1, stall_ns=int(1e9 * waiting)), guessing * valve.depth)
    return [number / num_steps for number in seen]


def test_where_guessing_takes_as_long_as_waiting_nothing_farther_is_tried():
    shares = run_guessing(Valve(False, True, 4), 1.0, 1.0, 400)
    assert shares[0] > 0.9
    assert shares[1:] == [0.04, 0, 0, 0], "one window, where it begins"


def test_a_valve_that_could_not_pay_tries_anew_as_soon_as_waiting_takes_longer():
    valve = Valve(False, True, 4)
    run_guessing(valve, 1.0, 1.0, 400)
    shares = run_deep(valve, (9, 5, 1, 5, 5), 400)
    assert shares[2] > 0.5


def test_a_valve_goes_deeper_when_that_begins_to_pay():
    valve = Valve(False, True, 4)
    run_deep(valve, (3, 2, 2, 2, 2), 4000)
    assert run_deep(valve, (3, 2, 1, 1, 1), 20_000)[2] > 0.7


def test_a_counting_valve_takes_distances_away_until_prefetch_pays():
    valve = Valve(False, False, 3)
    deltas = (NOTHING, PAYS, DOES_NOT, DOES_NOT)
    seen = [0] * 4
    for _ in range(4000):
        seen[valve.depth] += 1
        valve.note(deltas[valve.depth], 0.0)
    assert seen[1] > 0.9 * 4000
    assert seen[0] == 0
    assert seen[2] > 0, "tried again"
    deltas = (PAYS,) * 4
    for _ in range(4000):
        valve.note(deltas[valve.depth], 0.0)
    assert valve.depth == 3


def run_by_chance(valve, rates, guessing, num_steps, seed):
    """The mean seconds of a step, where each depth misses at such a rate, a miss takes a second, and each distance's
    guess takes `guessing`."""
    chance, total = random.Random(seed), 0.0
    for _ in range(num_steps):
        missed, spent = chance.random() < rates[valve.depth], guessing * valve.depth
        valve.note(words(steps=1, misses=int(missed), stall_ns=int(1e9 * missed)), spent)
        total += missed + spent
    return total / num_steps


@pytest.mark.parametrize(
    ("rates", "guessing", "most"),
    [
        ((0.08, 0.03, 0.03, 0.03, 0.03), 0.08, 0.1),
        ((0.02, 0.01, 0.01, 0.01, 0.01), 0.08, 0.03),
        ((0.8, 0.4), 0.08, 0.53),
    ],
)
def test_misses_that_come_by_chance_are_no_gain(rates, guessing, most):
    """The least that is possible: 0.08, 0.02 and 0.48 s."""
    valves = [Valve(False, True, len(rates) - 1) for _ in range(40)]
    costs = [run_by_chance(valve, rates, guessing, 1000, seed) for seed, valve in enumerate(valves)]
    assert sum(costs) / len(costs) < most
