"""What a predictor sees, and what it answers."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch

from vllm_expert_prefetch.prediction.routing import Prediction


class Signals(NamedTuple):
    """One MoE layer in one step, T tokens.

    `hidden` (T, H): what the router reads. `topk_ids` (T, K) integers, `topk_weights` (T, K) float32: the true routing.
    """

    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class Predictor(ABC):
    """Guesses the experts of MoE layer `source + distance` from what is known at layer `source`.

    Layers are numbered 0 to num_layers - 1 among the MoE layers. A target beyond the last layer is a layer of the next
    token, `(source + distance) % num_layers`; only predictors with `crosses_tokens` answer there. Everything is torch
    on tensors of fixed size, without a host synchronisation, so that it can be captured in a graph.
    """

    name: ClassVar[str]
    crosses_tokens: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    """Whether `observe` must be called with every layer's signals, each step, before that layer's `predict`."""

    def __init__(self, num_layers: int, distance: int = 1) -> None:
        if not 1 <= distance < max(num_layers, 2):
            raise ValueError(f"look-ahead distance must be 1 to {max(num_layers - 1, 1)}, got {distance}")
        self.num_layers = num_layers
        self.distance = distance

    def target_of(self, source: int) -> int | None:
        """The layer that `predict(source, ...)` speaks of; None when it cannot answer."""
        target = source + self.distance
        if target < self.num_layers:
            return target
        return target - self.num_layers if self.crosses_tokens else None

    def at(self, source: int) -> "Predictor | None":
        """The predictor that answers `predict(source, ...)`; None where there is no guess."""
        return self

    @abstractmethod
    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        """The `count` most likely experts of layer `target_of(source)`, or None when there is no guess."""

    def observe(self, layer: int, signals: Signals) -> None:  # noqa: B027 - most predictors have no memory
        """Take note of the true routing of `layer`; does nothing unless `observes`."""
