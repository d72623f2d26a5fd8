"""The gate that closes where counts say that fetching does not pay."""

from itertools import pairwise

import pytest

from vllm_expert_prefetch.prediction.count_gate import CountGate, Outcomes

PAYS = Outcomes(32, saved=20, wasted=10, displaced=5)
DOES_NOT = Outcomes(32, saved=5, wasted=10, displaced=8)
WASTES = Outcomes(32, saved=5, wasted=60, displaced=0)
NOTHING = Outcomes(32, 0, 0, 0)


def run(gate, when_open, num_windows=4000):
    """The share of the windows in which the gate was open."""
    num_open = 0
    for _ in range(num_windows):
        num_open += gate.is_open
        gate.note(when_open if gate.is_open else NOTHING)
    return num_open / num_windows


@pytest.mark.parametrize("outcomes", [PAYS, NOTHING])
def test_where_prefetch_pays_or_does_nothing_it_stays_on(outcomes):
    assert run(CountGate(), outcomes) == 1.0


@pytest.mark.parametrize("outcomes", [DOES_NOT, WASTES])
def test_where_prefetch_does_not_pay_it_is_nearly_always_off(outcomes):
    assert 0 < run(CountGate(), outcomes) < 0.1


def test_it_is_tried_again_at_growing_intervals():
    gate, opened = CountGate(), []
    for step in range(3000):
        was_open = gate.is_open
        gate.note(DOES_NOT if was_open else NOTHING)
        if gate.is_open and not was_open:
            opened.append(step)
    gaps = [later - earlier for earlier, later in pairwise(opened)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 4 * gaps[0]


def test_a_gate_opens_again_when_prefetch_begins_to_pay():
    gate = CountGate()
    run(gate, DOES_NOT, 500)
    run(gate, PAYS, 300)
    assert run(gate, PAYS, 500) == 1.0


def test_an_idle_server_decides_nothing():
    gate = CountGate()
    assert run(gate, Outcomes(0, saved=0, wasted=3, displaced=3), 1000) == 1.0


def test_a_forced_gate_never_closes():
    assert run(CountGate(forced=True), DOES_NOT) == 1.0
