"""Steps with look-ahead and without it: the shorter ones are found, and nothing else decides."""

import random

import pytest

from vllm_expert_prefetch.lookahead.step_valve import StepValve


def run(valve, num_steps, take):
    """`take(is_open)`: seconds of a step of one sequence. For each step, whether it looked ahead."""
    looked = []
    for _ in range(num_steps):
        looked.append(valve.is_open)
        valve.note(take(valve.is_open), 1)
    return looked


def taking(with_it, without, noise=0.02, seed=0):
    rng = random.Random(seed)
    return lambda is_open: (with_it if is_open else without) * rng.gauss(1, noise)


@pytest.mark.parametrize(("with_it", "is_open"), [(0.9, True), (1.1, False), (1.0, False)])
def test_the_shorter_step_is_found_and_held(with_it, is_open):
    looked = run(StepValve(), 20_000, taking(with_it, 1.0))
    share = sum(looked[1000:]) / len(looked[1000:])
    assert share > 0.98 if is_open else share < 0.02


def test_it_begins_open_and_takes_turns_in_a_trial():
    looked = run(StepValve(), 256, taking(1.1, 1.0))
    assert all(looked[:128]), "layers find out first how far each looks"
    assert looked[128:] == ([True] * 16 + [False] * 16) * 4


def test_what_changes_is_noticed():
    valve = StepValve()
    run(valve, 3_000, taking(1.1, 1.0))
    assert not valve.is_open
    looked = run(valve, 20_000, taking(0.9, 1.0))
    assert valve.is_open
    assert sum(looked) > 10_000


def test_numbers_of_sequences_are_compared_with_themselves():
    """Steps of eight sequences happen to come while the valve is open."""
    valve = StepValve()
    for step in range(256):
        sequences = 8 if valve.is_open and step % 2 else 1
        valve.note((0.9 if valve.is_open else 1.0) * sequences, sequences)
    assert valve.is_open


def test_a_trial_that_compares_nothing_changes_nothing():
    valve = StepValve()
    for _ in range(256):
        valve.note(1.0, 2 if valve.is_open else 1)
    assert valve.is_open


def test_a_few_steps_that_others_held_up_say_nothing():
    valve, take = StepValve(), taking(0.9, 1.0)
    for step in range(256):
        valve.note(take(valve.is_open) + (20 if valve.is_open and step % 20 == 0 else 0), 1)
    assert valve.is_open
