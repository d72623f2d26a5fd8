"""The order in which guesses are fetched, how many of them, and the gate that closes where fetching does not pay."""

import pytest
import torch

from vllm_expert_prefetch.prediction import Prediction
from vllm_expert_prefetch.prediction.schedule import Budget, SelfGate, most_wanted

NUM_STEPS = 4000


def prediction(rows):
    ids = torch.tensor([[expert for expert, _ in row] for row in rows])
    return Prediction(ids, torch.tensor([[weight for _, weight in row] for row in rows]))


def test_one_token_is_fetched_for_in_the_order_of_its_guesses():
    assert most_wanted(prediction([[(5, 0.1), (2, 0.7), (3, 0.2)]]), 8).tolist() == [5, 2, 3]


def test_a_batch_is_fetched_for_by_the_summed_weight_of_its_guesses():
    guesses = prediction([[(1, 0.5), (2, 0.3)], [(2, 0.4), (3, 0.45)], [(1, 0.1), (7, 0.2)]])
    assert most_wanted(guesses, 8).tolist() == [2, 1, 3, 7]


def test_a_guess_without_weight_comes_last_and_is_not_forgotten():
    guesses = prediction([[(4, 0.0), (6, 0.3)], [(6, 0.2), (0, 0.1)]])
    assert most_wanted(guesses, 8).tolist() == [6, 0, 4]


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


def run(gate, cost_open, cost_closed, num_steps=NUM_STEPS):
    """How many of the steps the gate was open, when steps cost so much with prefetch and so much without."""
    num_open = 0
    for _ in range(num_steps):
        num_open += gate.is_open
        gate.note(cost_open if gate.is_open else cost_closed)
    return num_open


def test_where_prefetch_pays_it_is_nearly_always_on():
    assert run(SelfGate(), 1.0, 2.0) > 0.9 * NUM_STEPS


@pytest.mark.parametrize("cost_open", [1.0, 1.5, 30.0])
def test_where_prefetch_does_not_pay_it_is_nearly_always_off(cost_open):
    assert run(SelfGate(), cost_open, 1.0) < 0.1 * NUM_STEPS


def test_a_gate_opens_again_when_prefetch_begins_to_pay_and_closes_when_it_ceases_to():
    gate = SelfGate()
    run(gate, 2.0, 1.0)
    run(gate, 1.0, 2.0, 2000)
    assert run(gate, 1.0, 2.0, 1000) > 900
    run(gate, 2.0, 1.0, 2000)
    assert run(gate, 2.0, 1.0, 1000) < 150


def test_a_forced_gate_never_closes():
    assert run(SelfGate(forced=True), 100.0, 1.0) == NUM_STEPS
