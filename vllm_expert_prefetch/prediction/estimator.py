"""The published estimator: one small network for all layers, with a learned embedding of the layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.compiled import PredictorWeights
from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.prediction.gates import Gate
from vllm_expert_prefetch.prediction.router import QuasiHidden
from vllm_expert_prefetch.prediction.routing import Prediction


@dataclass(frozen=True)
class EstimatorShape:
    """Sizes: hidden size d is reduced to d // m, the MLP inside is n times wider than that."""

    hidden_size: int
    num_experts: int
    num_sources: int
    """Pairs of a distance and a layer that predictions are made from, see `source_number`."""
    m: int = 2
    n: int = 2

    @property
    def width(self) -> int:
        return max(self.hidden_size // self.m, 1)


def source_number(num_layers: int, source: int, distance: int) -> int:
    """The number of a layer that a guess of this distance is made from: nearer ones come first. With `source`
    `num_layers - distance`, how many there are up to this distance."""
    return sum(num_layers - nearer for nearer in range(1, distance)) + source


class Estimator(nn.Module):
    """Quasi-hidden state -> linear, plus layer embedding, -> MLP with residual -> LayerNorm -> logits."""

    def __init__(self, shape: EstimatorShape) -> None:
        super().__init__()
        self.shape = shape
        self.reduce = nn.Linear(shape.hidden_size, shape.width)
        self.layer = nn.Embedding(shape.num_sources, shape.width)
        self.widen = nn.Linear(shape.width, shape.n * shape.width)
        self.narrow = nn.Linear(shape.n * shape.width, shape.width)
        self.norm = nn.LayerNorm(shape.width)
        self.logits = nn.Linear(shape.width, shape.num_experts)

    def forward(self, quasi_hidden: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Logits (T, E) for `quasi_hidden` (T, d) and the layer numbers `sources`, int64 (T,) or (1,)."""
        x = self.reduce(quasi_hidden) + self.layer(sources)
        x = x + self.narrow(nn.functional.silu(self.widen(x)))
        return self.logits(self.norm(x))


class EstimatorPredictor(Predictor):
    """Logits from the estimator, ranked as the target model ranks its own."""

    name = "estimator"

    def __init__(
        self, gates: Sequence[Gate], estimator: Estimator, defaults: DefaultVectors | None, distance: int = 1
    ) -> None:
        super().__init__(len(gates), distance)
        self._routing = [gate.routing for gate in gates]
        self._quasi_hidden = QuasiHidden(gates, defaults, distance)
        self._estimator = estimator.requires_grad_(False)
        self._first = source_number(len(gates), 0, distance)
        sources = torch.arange(self._first, self._first + len(gates), device=gates[0].weight.device)
        self._sources = sources.unsqueeze(1)

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        target = self.target_of(source)
        if target is None:
            return None
        logits = self._estimator(self._quasi_hidden.at(source, signals), self._sources[source])
        return self._routing[target].choose(logits, count)

    def weights(self, source: int) -> PredictorWeights:
        """What a prediction from layer `source` is computed with; the layer's embedding is part of a bias."""
        tensors = self._estimator.state_dict()
        tensors["reduce.bias"] = tensors["reduce.bias"] + tensors.pop("layer.weight")[self._first + source]
        return self._quasi_hidden.weights(source).and_also(tensors, self._estimator.norm.eps)
