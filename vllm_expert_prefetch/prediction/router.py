"""The next layer's own gate, applied early (arXiv 2603.19289, section 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.compiled import PredictorWeights
from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.prediction.fused_router import create_fused_router
from vllm_expert_prefetch.prediction.gates import Gate, fold
from vllm_expert_prefetch.prediction.routing import Prediction


class RouterPredictor(Predictor):
    """The target's gate on the quasi-hidden state with d = 0: one folded matrix per layer, one kernel on a GPU."""

    name = "router"

    def __init__(self, gates: Sequence[Gate], distance: int = 1) -> None:
        super().__init__(len(gates), distance)
        self._routing = [gate.routing for gate in gates]
        self._folded = [fold(source, gates[i + distance]) for i, source in enumerate(gates[: len(gates) - distance])]
        self._fused = [
            create_fused_router(*folded, routing)
            for folded, routing in zip(self._folded, self._routing[distance:], strict=True)
        ]

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        if target is None:
            return None
        fused = self._fused[source]
        if fused is not None and len(signals.hidden) <= fused.max_tokens:
            return fused.predict(signals.hidden, count)
        weight, bias = self._folded[source]
        return self._routing[target].choose(F.linear(signals.hidden.float(), weight, bias), count)

    def weights(self, source: int) -> PredictorWeights:
        """What a prediction from layer `source` is computed with."""
        weight, bias = self._folded[source]
        return PredictorWeights({"logits.weight": weight, "logits.bias": bias})


class QuasiHidden:
    """`q = LN_target(r_source + d)`, d being the gate-weighted sum of the executed experts' default vectors.

    Without `defaults` d is 0, and the residual's scale does not matter.
    """

    def __init__(self, gates: Sequence[Gate], defaults: DefaultVectors | None, distance: int = 1) -> None:
        self._gates = gates
        self._distance = distance
        self._factors, self._vectors = [], None
        if defaults is None:
            pairs = zip(gates, gates[distance:], strict=False)
            self._factors = [source.norm.inverse_gain() * target.norm.gain for source, target in pairs]
        else:
            scales = zip(gates, defaults.scales, strict=True)
            self._factors = [gate.norm.inverse_gain() * scale for gate, scale in scales]
            vectors = zip(gates, defaults.vectors, strict=True)
            self._vectors = [gate.output_scale * own for gate, own in vectors]

    def at(self, source: int, signals: Signals) -> torch.Tensor:
        """q (T, H) float32 for layer `source + distance`, from layer `source`."""
        norm, target = self._gates[source].norm, self._gates[source + self._distance].norm
        hidden = signals.hidden if norm.shift is None else signals.hidden - norm.shift
        unchanged = hidden * self._factors[source]
        if self._vectors is None:
            return unchanged if target.shift is None else unchanged + target.shift
        executed = self._vectors[source][signals.topk_ids.long()]
        weights = signals.topk_weights.float().unsqueeze(1)
        return target.apply(torch.baddbmm(unchanged.unsqueeze(1), weights, executed).squeeze(1))

    def weights(self, source: int) -> PredictorWeights:
        """What `at` computes with, and nothing that comes after it."""
        norm, target = self._gates[source].norm, self._gates[source + self._distance].norm
        tensors = {
            "factor": self._factors[source],
            "source_shift": norm.shift,
            "vectors": None if self._vectors is None else self._vectors[source],
            "target_gain": target.gain,
            "target_shift": target.shift,
        }
        return PredictorWeights(tensors, target.eps, target.centered)


class DefaultVectorPredictor(Predictor):
    """The target's gate on the quasi-hidden state with default vectors."""

    name = "router_defaults"

    def __init__(self, gates: Sequence[Gate], defaults: DefaultVectors, distance: int = 1) -> None:
        super().__init__(len(gates), distance)
        self._gates = gates
        self._quasi_hidden = QuasiHidden(gates, defaults, distance)

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        if target is None:
            return None
        gate = self._gates[target]
        return gate.routing.choose(gate.logits(self._quasi_hidden.at(source, signals)), count)

    def weights(self, source: int) -> PredictorWeights:
        """What a prediction from layer `source` is computed with."""
        gate, quasi_hidden = self._gates[source + self.distance], self._quasi_hidden.weights(source)
        return quasi_hidden.and_also({"logits.weight": gate.weight, "logits.bias": gate.bias})
