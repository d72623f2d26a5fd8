"""Counting and measuring on a routing small enough to know by heart."""

import torch

from vllm_expert_prefetch.calibration.evaluation import evaluate
from vllm_expert_prefetch.calibration.tables import count_tables
from vllm_expert_prefetch.prediction.base import Signals
from vllm_expert_prefetch.prediction.baselines import FrequencyPredictor, PreviousPredictor, TransitionPredictor
from vllm_expert_prefetch.prediction.gates import Gate, Norm
from vllm_expert_prefetch.prediction.routing import Routing

EXPERTS, TOKENS = 5, 20
GATES = [Gate(f"layer{n}", torch.zeros(EXPERTS, 2), Norm(torch.ones(2), 0.0), Routing(1)) for n in range(2)]


def window():
    """Top-1: token t uses expert t mod 5 in layer 0 and the one after it in layer 1."""
    first = torch.arange(TOKENS).unsqueeze(1) % EXPERTS
    return [Signals(torch.zeros(TOKENS, 2), ids, torch.ones(TOKENS, 1)) for ids in (first, (first + 1) % EXPERTS)]


def test_transitions_follow_the_layer_and_then_the_next_token():
    _, transition = count_tables([window()], GATES)
    assert transition[0].tolist() == torch.eye(EXPERTS).roll(1, 1).tolist(), "expert e of layer 0 leads to e + 1"
    assert transition[1].tolist() == torch.eye(EXPERTS).tolist(), "expert e of layer 1 leads to e, one token on"


def test_experts_that_were_never_seen_lead_where_most_tokens_go():
    short = [Signals(*(value[:3] for value in own)) for own in window()]
    frequency, transition = count_tables([short], GATES)
    torch.testing.assert_close(frequency[0], torch.tensor([1, 1, 1, 0, 0]) / 3)
    torch.testing.assert_close(transition[0, 4], frequency[1])


def test_each_predictor_is_held_against_the_layer_it_speaks_of():
    frequency, transition = count_tables([window()], GATES)
    assert [one.recall for one in evaluate(TransitionPredictor(transition), [window()], 1)] == [1.0, 1.0]
    shares = [one.recall for one in evaluate(FrequencyPredictor(frequency), [window()], 2)]
    assert shares == [3 / (TOKENS - 1), 4 / TOKENS]


def test_the_previous_token_is_taken_in_the_order_of_the_text():
    """Each expert is used by two tokens in a row: the second one's guess is right, from the first token on."""
    twice = [Signals(*(value.repeat_interleave(2, 0) for value in own)) for own in window()]
    crossing, within = (one.recall for one in evaluate(PreviousPredictor(GATES), [twice], 1))
    assert within == TOKENS / (2 * TOKENS)
    assert crossing == TOKENS / (2 * TOKENS - 1)
