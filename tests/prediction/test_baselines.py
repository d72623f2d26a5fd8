"""Predictors without a look at the hidden state, and what every predictor has in common."""

import pytest
import torch
from toy_moe import EXPERTS, LAYERS, TOP_K, make_gates, make_model, tokens

from vllm_expert_prefetch.calibration.evaluation import evaluate
from vllm_expert_prefetch.prediction import (
    Artifact,
    ArtifactError,
    Card,
    Ingredients,
    Prediction,
    Predictor,
    Signals,
    with_next_token,
)
from vllm_expert_prefetch.prediction import create_predictor as create
from vllm_expert_prefetch.prediction.baselines import (
    FrequencyPredictor,
    OraclePredictor,
    PreviousPredictor,
    TransitionPredictor,
)
from vllm_expert_prefetch.prediction.composed import ComposedPredictor
from vllm_expert_prefetch.prediction.truth import quality, score


class GarbagePredictor(Predictor):
    """Test double: random experts, whatever it is shown."""

    name = "garbage"
    crosses_tokens = True

    def __init__(self, num_layers, num_experts, seed=0):
        super().__init__(num_layers)
        self._num_experts = num_experts
        self._generator = torch.Generator().manual_seed(seed)

    def predict(self, source, signals, count):
        scores = torch.rand(signals.topk_ids.shape[0], self._num_experts, generator=self._generator)
        return Prediction(*reversed(scores.topk(min(count, self._num_experts))))


def routed(ids, weights=None):
    ids = torch.tensor(ids)
    return Signals(torch.zeros(len(ids), 4), ids, torch.full(ids.shape, 0.5) if weights is None else weights)


def test_the_previous_tokens_experts_come_back_one_step_later():
    predictor = PreviousPredictor(make_gates(), max_rows=4)
    predictor.observe(1, routed([[3, 5], [0, 7]]))
    assert predictor.predict(0, routed([[1, 2], [1, 2]]), 4).ids.tolist() == [[3, 5], [0, 7]]
    predictor.observe(1, routed([[6, 1]] * 9 + [[2, 4]]))
    assert predictor.predict(0, routed([[1, 2]] * 4), 4).ids.tolist() == [[6, 1]] * 3 + [[2, 4]]


def test_what_was_guessed_stays_when_the_truth_is_noted():
    predictor = PreviousPredictor(make_gates())
    predictor.observe(1, routed([[3, 1]]))
    guess = predictor.predict(0, routed([[0, 2]]), 2)
    predictor.observe(1, routed([[5, 4]]))
    assert guess.ids.tolist() == [[3, 1]]


def test_the_last_layer_speaks_of_the_next_tokens_first_layer():
    predictor = PreviousPredictor(make_gates())
    predictor.observe(0, routed([[3, 5]]))
    assert predictor.target_of(LAYERS - 1) == 0
    assert predictor.predict(LAYERS - 1, routed([[1, 2]]), 2).ids.tolist() == [[3, 5]]


def test_one_predictor_speaks_of_this_token_and_another_one_of_the_next():
    frequency = torch.eye(LAYERS, EXPERTS)
    predictor = with_next_token(PreviousPredictor(make_gates()), FrequencyPredictor(frequency))
    for layer in range(LAYERS):
        predictor.observe(layer, routed([[6, 5]]))
    targets = [predictor.target_of(source) for source in range(LAYERS)]
    assert targets == [*range(1, LAYERS), 0]
    guesses = [predictor.predict(source, routed([[1, 2]]), 1).ids.tolist() for source in range(LAYERS)]
    assert guesses == [*[[[6]]] * (LAYERS - 1), [[0]]]
    assert predictor.name == "previous, next token by frequency"
    assert predictor.observes


def test_composed_predictors_are_asked_directly():
    """However often they were put together: a look-ahead step must not walk through wrappers."""
    gates, transition = make_gates(), TransitionPredictor(torch.ones(LAYERS, EXPERTS, EXPERTS))
    own = [PreviousPredictor(gates), FrequencyPredictor(torch.eye(LAYERS, EXPERTS))]
    hybrid = ComposedPredictor("hybrid", [own[layer % 2] for layer in range(LAYERS - 1)] + [None], 1)
    assert hybrid.target_of(LAYERS - 1) is None
    assert hybrid.predict(LAYERS - 1, routed([[1, 2]]), 1) is None
    whole = with_next_token(hybrid, transition)
    assert [whole.at(layer) for layer in range(LAYERS)] == [*(own[n % 2] for n in range(LAYERS - 1)), transition]
    whole.observe(1, routed([[5, 6]]))
    assert own[0].predict(0, routed([[1, 2]]), 2).ids.tolist() == [[5, 6]]


def test_frequency_gives_the_most_used_in_one_row():
    frequency = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    assert FrequencyPredictor(frequency).predict(0, routed([[0]] * 7), 2).ids.tolist() == [[0, 2]]
    assert FrequencyPredictor(frequency).predict(1, routed([[0]] * 7), 2).ids.tolist() == [[1, 2]]


def test_transition_follows_the_executed_experts_by_their_weight():
    transition = torch.eye(3).roll(1, -1).repeat(2, 1, 1)  # expert e leads to e + 1
    true = routed([[0, 2]], torch.tensor([[0.3, 0.7]]))
    ids, weights = TransitionPredictor(transition).predict(0, true, 2)
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.3]]))


def test_the_oracle_is_always_right():
    model = make_model()
    steps = [model.run(tokens(count, seed=count)) for count in (5, 1, 1, 1)]
    oracle = OraclePredictor([torch.stack([own.topk_ids for own in step]) for step in steps])
    for number, step in enumerate(steps):
        for layer, signals in enumerate(step):
            oracle.observe(layer, signals)
            prediction = oracle.predict(layer, signals, TOP_K)
            if layer + 1 < LAYERS:
                assert torch.equal(prediction.ids, step[layer + 1].topk_ids)
            elif number + 1 < len(steps):
                assert torch.equal(prediction.ids, steps[number + 1][0].topk_ids)
            else:
                assert prediction is None


def test_the_oracle_is_silent_when_the_run_is_another():
    oracle = OraclePredictor([torch.zeros(LAYERS, 3, TOP_K)])
    oracle.observe(0, routed([[0, 1]]))
    assert oracle.predict(0, routed([[0, 1]]), 2) is None


def test_garbage_is_as_good_as_chance():
    windows = [make_model().run(tokens(400))]
    found = [one.recall for one in evaluate(GarbagePredictor(LAYERS, EXPERTS), windows, TOP_K)]
    assert all(abs(recall - TOP_K / EXPERTS) < 0.06 for recall in found)


def test_scores_count_what_was_found():
    true = Signals(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    prediction = Prediction(torch.tensor([[0, 5, 1], [6, 7, 2]]), torch.ones(2, 3))
    recall, recall_all, missing = quality([score(prediction, true)])
    assert (recall, recall_all) == (0.25, 0.75)
    assert missing == pytest.approx(1 - 0.9 / 2)


def test_one_row_is_held_against_every_token():
    true = routed([[0, 1], [2, 3], [0, 3]])
    recall, _, _ = quality([score(Prediction(torch.tensor([[0, 3]]), torch.ones(1, 2)), true)])
    assert recall == pytest.approx(4 / 6)


@pytest.mark.parametrize("name", ["router_defaults", "estimator", "hybrid", "frequency", "transition"])
def test_predictors_that_need_an_artifact_say_so(name):
    with pytest.raises(ArtifactError, match=f"predictor {name} needs an artifact"):
        create(name, Ingredients(make_gates()))


@pytest.mark.parametrize("name", ["router", "previous", "none"])
def test_the_others_do_not(name):
    assert create(name, Ingredients(make_gates())).name == name


def test_the_oracle_needs_a_trace():
    with pytest.raises(ArtifactError, match="trace"):
        create("oracle", Ingredients(make_gates()))


@pytest.mark.parametrize(("name", "distance"), [("frequency", 3), ("transition", 2)])
def test_an_artifact_that_does_not_reach_so_far_is_refused(name, distance):
    card = Card("m", "f", ["a"] * LAYERS, 2, {}, {}, 2, {})
    artifact = Artifact(card, None, torch.ones(LAYERS, EXPERTS), torch.ones(LAYERS, EXPERTS, EXPERTS))
    with pytest.raises(ArtifactError, match=f"{name}: the artifact does not speak of {distance} layers ahead"):
        create(name, Ingredients(make_gates(), artifact, distance=distance))
    assert create(name, Ingredients(make_gates(), artifact, distance=distance - 1)).distance == distance - 1


@pytest.mark.parametrize("distance", [0, LAYERS])
def test_a_distance_that_leads_nowhere_is_refused(distance):
    with pytest.raises(ValueError, match="distance"):
        create("router", Ingredients(make_gates(), distance=distance))
