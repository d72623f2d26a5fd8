"""Predictors that need no look at the hidden state: previous token, popularity, affinity between layers, the truth."""

from collections.abc import Sequence

import torch

from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.gates import Gate
from vllm_expert_prefetch.prediction.routing import Prediction


class NoPredictor(Predictor):
    """No look-ahead."""

    name = "none"

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        return None


class PreviousPredictor(Predictor):
    """The experts that the target layer executed in the previous step: row i speaks of the request in row i.

    Never more than top-k per token. Steps of more than `max_rows` tokens are noted by their last rows.
    """

    name = "previous"
    crosses_tokens = True
    observes = True

    def __init__(self, gates: Sequence[Gate], distance: int = 1, max_rows: int = 256) -> None:
        super().__init__(len(gates), distance)
        device = gates[0].weight.device
        self._ids = [torch.arange(g.routing.top_k, device=device).repeat(max_rows, 1) for g in gates]
        self._weights = [torch.zeros(max_rows, g.routing.top_k, device=device) for g in gates]

    def observe(self, layer: int, signals: Signals) -> None:
        kept = min(signals.topk_ids.shape[0], self._ids[layer].shape[0])
        self._ids[layer][:kept].copy_(signals.topk_ids[-kept:])
        self._weights[layer][:kept].copy_(signals.topk_weights[-kept:])

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        assert target is not None
        rows = signals.topk_ids.shape[0]
        # Copies: the target layer's own routing is noted before anybody has compared it with the guess.
        return Prediction(self._ids[target][:rows, :count].clone(), self._weights[target][:rows, :count].clone())


class FrequencyPredictor(Predictor):
    """The most used experts of the target layer, the same for every token: one row."""

    name = "frequency"
    crosses_tokens = True

    def __init__(self, frequency: torch.Tensor, distance: int = 1) -> None:
        """`frequency` (num_layers, E) float32: each expert's share of its layer's routed tokens."""
        super().__init__(frequency.shape[0], distance)
        self._shares, self._ids = frequency.sort(dim=-1, descending=True, stable=True)

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        assert target is not None
        return Prediction(self._ids[target, :count].unsqueeze(0), self._shares[target, :count].unsqueeze(0))


class TransitionPredictor(Predictor):
    """Affinity between layers: P(target expert | source expert), averaged over the executed experts by gate weight."""

    name = "transition"
    crosses_tokens = True

    def __init__(self, transition: torch.Tensor, distance: int = 1) -> None:
        """`transition` (num_layers, E, E) float32; rows sum to 1; row l leads to layer (l + distance) % num_layers."""
        super().__init__(transition.shape[0], distance)
        self._transition = transition

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        rows = self._transition[source][signals.topk_ids.long()]
        scores = torch.bmm(signals.topk_weights.float().unsqueeze(1), rows).squeeze(1)
        values, ids = scores.topk(min(count, scores.shape[-1]), dim=-1)
        return Prediction(ids, values)


class OraclePredictor(Predictor):
    """The true routing, replayed from a recording of the same run; for studies.

    `steps`: one tensor (num_layers, T, K) of expert ids per step, in order. There is no guess beyond the last one, nor
    in a step whose number of tokens is not the recorded one.
    """

    name = "oracle"
    crosses_tokens = True
    observes = True

    def __init__(self, steps: Sequence[torch.Tensor], distance: int = 1) -> None:
        super().__init__(steps[0].shape[0], distance)
        self._steps = [step.long() for step in steps]
        self._now = -1

    def observe(self, layer: int, signals: Signals) -> None:
        if layer == 0:
            self._now += 1

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        assert target is not None
        step = self._now + (target <= source)
        recorded = self._steps[self._now : self._now + 1]
        if step >= len(self._steps) or not recorded or recorded[0].shape[1] != signals.topk_ids.shape[0]:
            return None
        ids = self._steps[step][target, :, :count]
        return Prediction(ids, torch.ones(ids.shape, device=ids.device))
