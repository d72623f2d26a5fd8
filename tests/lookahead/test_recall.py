"""Recall on the host: what is compared with what, and that no counter falls."""

import pytest
import torch
from counter_files import make_counters

from vllm_expert_prefetch.lookahead.recall import Recall
from vllm_expert_prefetch.metrics.counters import read_counters
from vllm_expert_prefetch.metrics.definitions import INDEX
from vllm_expert_prefetch.prediction.base import Signals

NUM_LAYERS = 3
TRUE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.9, 0.3], [0.5, 0.5]])


@pytest.fixture
def counters(tmp_path):
    return make_counters(tmp_path, layers=("0", "1", "2"))


def run_step(recall, guesses, weights=WEIGHTS):
    """One step of two tokens; `guesses`: layer -> ids guessed for it."""
    for layer, guess in guesses.items():
        recall.expect(layer, torch.tensor(guess))
    for layer in range(NUM_LAYERS):
        recall.compare(layer, Signals(torch.empty(2, 4), TRUE, weights), len(TRUE))


def test_each_layer_is_held_against_its_own_guesses(counters):
    recall = Recall(NUM_LAYERS, NUM_LAYERS - 1, torch.device("cpu"), on_device=False)
    # Token by token: one of two among the first two and both among all three; both of two.
    run_step(recall, {1: [[0, 7, 1], [3, 2, 9]]})
    recall.publish(counters)
    for series, value in {
        "scored_tokens_total": 2,
        "recall_routed_total": 4,
        "recall_found_total/top_k": 3,
        "recall_found_total/fetched": 4,
        "missing_gate_mass_total": 0.25,
    }.items():
        assert counters.get(series) == pytest.approx(value)
        snapshot = read_counters(counters.path)
        in_layers = [snapshot.value(f"layer_{series}", layer) for layer in range(NUM_LAYERS)]
        assert in_layers == pytest.approx([0, value, 0])


def test_one_step_in_so_many_of_those_with_guesses_is_compared(counters):
    recall = Recall(NUM_LAYERS, NUM_LAYERS - 1, torch.device("cpu"), on_device=False)
    for _ in range(2 * Recall.scored_every):
        run_step(recall, {})
        run_step(recall, {2: [[0, 1]]})
    recall.publish(counters)
    assert counters.get("scored_tokens_total") == 2 * len(TRUE)


def test_a_missing_mass_of_nothing_never_falls(counters):
    """Differences of a growing sum are rounded: a sum of whole shares may seem to have grown by more than one each."""
    recall = Recall(NUM_LAYERS, NUM_LAYERS - 1, torch.device("cpu"), on_device=False)
    recall.scored_every = 1
    torch.manual_seed(0)
    written = []
    counters.add = lambda index, amount: written.append((index, amount))
    for guess in ([[0, 1], [2, 3]], [[0, 9], [2, 3]]) * 500:
        run_step(recall, {1: guess}, torch.rand(2, 2).softmax(-1))
        recall.publish(counters)
    amounts = [amount for index, amount in written if index == INDEX["missing_gate_mass_total"]]
    assert len(amounts) == 1000
    assert min(amounts) >= 0
    assert max(amounts) > 0.1
