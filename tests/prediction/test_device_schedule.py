"""What is decided where nothing waits for a GPU: a batch's guesses in tensors of fixed size, gates that count."""

from itertools import pairwise

import pytest
import torch

from vllm_expert_prefetch.prediction import Prediction
from vllm_expert_prefetch.prediction.device_schedule import CountGate, Outcomes, most_wanted_of
from vllm_expert_prefetch.prediction.schedule import most_wanted

NUM_EXPERTS = 12


def guesses(num_rows, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(count)
    return Prediction(ids, weights)


def rows(prediction, chosen):
    return Prediction(prediction.ids[chosen], prediction.weights[chosen])


def named(wanted):
    return [expert for expert in wanted[0].tolist() if expert >= 0]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_a_batch_is_fetched_for_in_the_order_that_the_host_would_choose(num_rows):
    prediction, real = guesses(num_rows), torch.arange(num_rows)
    wanted, some = most_wanted_of(prediction, real, NUM_EXPERTS)
    assert wanted.shape == (1, min(3 * num_rows, NUM_EXPERTS))
    assert named(wanted) == most_wanted(prediction, NUM_EXPERTS).tolist()
    assert some.shape == (1,)
    assert int(some) >= 0


def test_padding_never_contributes_whatever_its_rows_hold():
    prediction = guesses(6)
    real = torch.tensor([3, -1, 9, -1, 0, -1])
    prediction.weights[real < 0] = float("nan")
    wanted, _ = most_wanted_of(prediction, real, NUM_EXPERTS)
    assert named(wanted) == most_wanted(rows(prediction, real >= 0), NUM_EXPERTS).tolist()


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_step_without_real_rows_says_so(num_rows):
    _, some = most_wanted_of(guesses(num_rows), torch.full((num_rows,), -1), NUM_EXPERTS)
    assert int(some) < 0


def test_one_guess_for_all_counts_where_any_row_is_real():
    prediction = guesses(1)
    wanted, some = most_wanted_of(prediction, torch.tensor([-1, 5, -1]), NUM_EXPERTS)
    assert torch.equal(wanted, prediction.ids)
    assert int(some) >= 0


def test_a_prediction_may_speak_of_the_first_rows_only():
    prediction = guesses(2)
    wanted, _ = most_wanted_of(prediction, torch.tensor([1, -1, 5, 6]), NUM_EXPERTS)
    assert named(wanted) == prediction.ids[0].tolist()


def test_a_guess_without_weight_comes_last_and_is_not_forgotten():
    prediction = Prediction(torch.tensor([[4, 6], [6, 0]]), torch.tensor([[0.0, 0.3], [0.2, 0.1]]))
    assert named(most_wanted_of(prediction, torch.zeros(2, dtype=torch.int64), NUM_EXPERTS)[0]) == [6, 0, 4]


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
