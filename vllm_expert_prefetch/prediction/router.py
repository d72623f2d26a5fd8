"""The next layer's own gate, applied early (arXiv 2603.19289, section 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.gates import Gate, fold
from vllm_expert_prefetch.prediction.routing import Prediction


class RouterPredictor(Predictor):
    """The target's gate on the quasi-hidden state with d = 0: one folded matrix per layer."""

    name = "router"

    def __init__(self, gates: Sequence[Gate], distance: int = 1) -> None:
        super().__init__(len(gates), distance)
        self._routing = [gate.routing for gate in gates]
        self._folded = [fold(source, gates[i + distance]) for i, source in enumerate(gates[: len(gates) - distance])]

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        if target is None:
            return None
        weight, bias = self._folded[source]
        return self._routing[target].choose(F.linear(signals.hidden.float(), weight, bias), count)


class QuasiHidden:
    """`q = LN_target(r_source + d)`, d being the gate-weighted sum of the executed experts' default vectors.

    `defaults` (num_layers, E, H) float32, or None for d = 0, where the residual's scale is not needed.
    """

    def __init__(self, gates: Sequence[Gate], defaults: torch.Tensor | None, distance: int = 1) -> None:
        self._gates = gates
        self._distance = distance
        self._inverse_gains = [gate.norm.inverse_gain() for gate in gates]
        self._defaults = (
            None if defaults is None else [gate.output_scale * own for gate, own in zip(gates, defaults, strict=True)]
        )

    @property
    def needs_scale(self) -> bool:
        return self._defaults is not None

    def at(self, source: int, signals: Signals) -> torch.Tensor:
        """q (T, H) float32 for layer `source + distance`, from layer `source`."""
        norm, target = self._gates[source].norm, self._gates[source + self._distance].norm
        hidden = signals.hidden if norm.shift is None else signals.hidden - norm.shift
        if self._defaults is None:
            q = hidden * (self._inverse_gains[source] * target.gain)
            return q if target.shift is None else q + target.shift
        if signals.scale is None:
            raise ValueError("default vectors need the residual's scale, which was not observed")
        residual = hidden * self._inverse_gains[source] * signals.scale.unsqueeze(-1)
        executed = self._defaults[source][signals.topk_ids.long()]
        change = torch.bmm(signals.topk_weights.float().unsqueeze(1), executed).squeeze(1)
        return target.apply(residual + change)


class DefaultVectorPredictor(Predictor):
    """The target's gate on the quasi-hidden state with default vectors."""

    name = "router_defaults"
    needs_scale = True

    def __init__(self, gates: Sequence[Gate], defaults: torch.Tensor, distance: int = 1) -> None:
        super().__init__(len(gates), distance)
        self._gates = gates
        self._quasi_hidden = QuasiHidden(gates, defaults, distance)

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        if target is None:
            return None
        gate = self._gates[target]
        return gate.routing.choose(gate.logits(self._quasi_hidden.at(source, signals)), count)
