"""Whole steps that look ahead, in CUDA graphs and eagerly, against tables that hold every expert: what is predicted,
which rows are real and what may be fetched changes from replay to replay."""

import pytest
import torch
from gpu_layer import device
from gpu_model import NUM_LAYERS, NUM_SLOTS, TOP_K, Model

from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.prediction import Prediction, Predictor, Signals
from vllm_expert_prefetch.prediction.truth import score

NUM_GUESSING = 8
"""Tokens whose routing is looked ahead from: with more of them than experts there would be none."""


class Told(Predictor):
    """Guesses what the model's tables hold at that moment."""

    name = "told"

    def __init__(self, model, distance):
        super().__init__(NUM_LAYERS, distance)
        self._guesses = model.guesses

    def predict(self, source, signals, count):
        guessed = self._guesses[self.target_of(source), :NUM_GUESSING, :count] if self.target_of(source) else None
        if guessed is None:
            return None
        return Prediction(guessed, torch.ones(guessed.shape, device=device()))


class LookingModel(Model):
    """Its layers ask a LookAhead in place of queueing guesses themselves."""

    def __init__(self, policy="lru", over_fetch=1, forced=True, depth=1):
        super().__init__(policy, depth)
        self.caches.layers = self.caches.layers[:NUM_LAYERS]
        told = [Told(self, distance) for distance in range(1, depth + 1)]
        self.look_ahead = LookAhead(told, self.caches, over_fetch, forced, 50e9, device())
        self.weights = torch.rand(NUM_LAYERS, NUM_GUESSING, TOP_K, device=device())

    def run(self, ahead=True):
        for number, layer in enumerate(self.layers):
            row_ids = layer.cache.serve(self.ids[number], self.rows)
            routed = self.ids[number, :NUM_GUESSING]
            self.look_ahead.after(number, Signals(routed, routed, self.weights[number]), self.rows[:NUM_GUESSING])
            self.row_ids[number].copy_(row_ids)
            chosen = row_ids.flatten().clamp(min=0)
            for name, tensor in layer.tensors.items():
                torch.index_select(tensor, 0, chosen, out=self.seen[number][name])


@pytest.mark.parametrize(("policy", "depth"), [("lru", 1), ("ewma", 1), ("ewma", 3)])
@pytest.mark.parametrize("is_captured", [False, True])
def test_whatever_is_guessed_every_layer_reads_its_own_experts_and_guesses_are_used(policy, depth, is_captured):
    model = LookingModel(policy, depth=depth)
    model.route()
    graph = model.capture() if is_captured else None
    for _ in range(100):
        model.step(graph, num_experts=16)
    words = model.finish()
    assert words[0].issued == 0
    assert all(one.used > 0 for one in words[1:])


def test_recall_is_that_of_every_replay():
    model = LookingModel()
    model.route()
    graph = model.capture()
    torch.cuda.synchronize()
    expected = model.look_ahead.recall._sums[0].clone()
    for _ in range(20):
        model.step(graph)
        real = model.rows[:NUM_GUESSING] >= 0
        for layer in range(1, NUM_LAYERS):
            guess = Prediction(model.guesses[layer, :NUM_GUESSING][real], model.weights[layer][real])
            routed = model.ids[layer, :NUM_GUESSING][real]
            if len(routed):
                expected += torch.stack(list(score(guess, Signals(routed, routed, model.weights[layer][real]))))
    torch.cuda.synchronize()
    assert torch.allclose(model.look_ahead.recall._sums[0], expected)
    assert torch.allclose(model.look_ahead.recall._seen[0], expected.cpu())


def test_a_valve_that_closes_stops_the_copies_of_graphs_captured_before():
    model = LookingModel(forced=False)
    model.route()
    graph = model.capture()
    for cache in model.caches.layers:
        assert cache.takes_guesses()
    model.look_ahead.valves[2].depth = 0
    model.look_ahead._set_budgets()
    before = model.words()
    for _ in range(30):
        model.step(graph)
    issued = [now.issued - then.issued for now, then in zip(model.words(), before, strict=True)]
    assert issued[2] == 0
    assert issued[1] > 0
    assert issued[3] > 0
    model.finish()


@pytest.mark.parametrize("over_fetch", [0, 1])
def test_guesses_beyond_what_counts_are_not_fetched(over_fetch):
    model = LookingModel(over_fetch=1)
    model.route()
    graph = model.capture()
    for number, cache in enumerate(model.caches.layers):
        cache.set_budget(NUM_SLOTS, over_fetch)
        assert model.caches.budgets[number].tolist() == [[NUM_SLOTS, over_fetch]]
    before = model.words()
    for _ in range(10):
        model.step(graph)
    issued = sum(now.issued - then.issued for now, then in zip(model.words(), before, strict=True))
    assert (issued > 0) == bool(over_fetch)
    model.finish()
