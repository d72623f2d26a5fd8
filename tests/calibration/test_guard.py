"""Choosing the layers of speculative execution, and the figures behind it, on a stand-in for the model."""

import math

import pytest
import torch
from toy_moe import make_gates

from vllm_expert_prefetch.calibration.accuracy import accuracy_json, accuracy_table, measure
from vllm_expert_prefetch.calibration.guard import MAX_INCREASE, first_tokens, with_guard
from vllm_expert_prefetch.prediction import Artifact, Card

VOCABULARY = 5


class Decoder:
    """Speculating in layer l moves this share of the true token's probability to the others."""

    def __init__(self, costs, noise=0.0):
        self._costs, self._noise = costs, noise
        self.tried = []

    def log_probs(self, tokens, layers):
        if layers:
            self.tried.append(sorted(layers))
        targets = torch.tensor(tokens[1:])
        noise = self._noise * (-1.0) ** torch.arange(len(targets)) if layers else torch.zeros(len(targets))
        true = 0.5 * (1 - sum(self._costs[layer] for layer in layers)) * torch.exp(noise)
        rows = ((1 - true) / (VOCABULARY - 1)).unsqueeze(1).repeat(1, VOCABULARY)
        return rows.scatter(1, targets.unsqueeze(1), true.unsqueeze(1)).log(), targets


WINDOWS = [[0, 1, 2, 3, 4, 0, 1], [4, 3, 2, 1, 0, 4]]


def quiet(*_):
    pass


def artifact(candidates):
    gates = make_gates()
    card = Card("toy", "", [gate.name for gate in gates], 1, {}, {}, 1, {}, guard={"candidates": candidates})
    return Artifact(card, None, torch.zeros(4, 8), torch.zeros(4, 8, 8))


def test_figures_are_those_computed_by_hand():
    exact, found = measure(Decoder({3: 0.2}), WINDOWS, {"speculative": frozenset({3})}, quiet)
    assert (exact.mode, exact.kl, exact.agreement, exact.increase, exact.tokens) == ("exact", 0, 1, 0, 11)
    assert exact.perplexity == pytest.approx(2)
    assert found.perplexity == pytest.approx(1 / 0.4)
    assert found.increase == pytest.approx(0.25)
    assert found.increase_error == pytest.approx(0, abs=1e-6)
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel=1e-4)
    assert found.layers == [3]


def test_agreement_counts_most_likely_tokens():
    found = measure(Decoder({0: 0.9}), WINDOWS, {"speculative": frozenset({0})}, quiet)[1]
    assert found.agreement == 0


def test_the_table_and_the_json_hold_every_mode():
    results = measure(Decoder({3: 0.2}), WINDOWS, {"speculative": frozenset({3})}, quiet)
    table = accuracy_table(results, 4)
    assert "11 tokens decoded in each mode" in table
    assert "+25.00 +- 0.00 %" in table
    assert accuracy_json(results, 4)["modes"]["speculative"]["layers"] == [3]


@pytest.mark.parametrize(
    ("costs", "allowed"),
    [
        ([0.001, 0.001, 0.001, 0.001], [1, 2, 3, 4]),
        ([0.001, 0.002, 0.004, 0.5], [1, 2, 3]),
        ([0.005, 0.004, 0.004, 0.001], [1, 2]),
        ([0.009, 0.009, 0.009, 0.009], [1]),
        ([0.2, 0.0, 0.0, 0.0], []),
    ],
)
def test_the_most_candidates_within_the_limit_are_allowed_and_were_measured_together(costs, allowed):
    decoder = Decoder(dict(enumerate(costs, 1)))
    found = with_guard(artifact([1, 2, 3, 4]), decoder, WINDOWS, quiet, min_tokens=11).card
    assert found.allow_list == allowed
    assert not allowed or allowed in decoder.tried
    assert found.guard["max_increase"] == MAX_INCREASE == 0.01
    assert found.guard["tokens"] == 11
    assert {one["layers"] for one in found.guard["measured"]} == {len(one) for one in decoder.tried}


def test_candidates_are_taken_in_their_order():
    costs = {1: 0.5, 2: 0.001, 3: 0.5, 4: 0.001}
    assert with_guard(artifact([4, 2, 1, 3]), Decoder(costs), WINDOWS, quiet, min_tokens=11).card.allow_list == [2, 4]


def test_what_is_not_sure_is_not_allowed():
    costs = dict.fromkeys([1, 2], 0.001)
    assert with_guard(artifact([1, 2]), Decoder(costs, noise=0.3), WINDOWS, quiet, min_tokens=11).card.allow_list == []


def test_few_tokens_decide_nothing():
    decoder = Decoder(dict.fromkeys([1, 2], 0.001))
    found = with_guard(artifact([1, 2]), decoder, WINDOWS, quiet).card
    assert found.allow_list == []
    assert found.guard["tokens"] == 11
    assert len(decoder.tried) == len(WINDOWS), "one look at all candidates is enough to see that"


def test_first_tokens_stops_at_the_number_and_leaves_short_pieces_out():
    windows = [[1] * 10, [2] * 3, [3] * 10, [4] * 10]
    assert first_tokens(windows, 18, shortest=5) == [[1] * 10, [3] * 8]
    assert first_tokens(windows, 12, shortest=5) == [[1] * 10]
    assert first_tokens(windows, 4, shortest=5) == []
