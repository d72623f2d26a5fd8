"""Predictors put together of others, layer by layer."""

from collections.abc import Sequence

from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.routing import Prediction


class ComposedPredictor(Predictor):
    """For each source layer a predictor of its own, such as the one that calibration found best there."""

    def __init__(self, name: str, choices: Sequence[Predictor | None], distance: int) -> None:
        """`choices`: one per layer; None where there is no guess."""
        super().__init__(len(choices), distance)
        self.name = name  # type: ignore[misc]
        self._choices = [None if choice is None else choice.at(layer) for layer, choice in enumerate(choices)]
        self._observers = [choice for choice in {*self._choices} if choice is not None and choice.observes]
        self.observes = bool(self._observers)  # type: ignore[misc]
        self.crosses_tokens = any(choice is not None for choice in self._choices[-distance:])  # type: ignore[misc]

    def at(self, source: int) -> Predictor | None:
        return self._choices[source]

    def observe(self, layer: int, signals: Signals) -> None:
        for predictor in self._observers:
            predictor.observe(layer, signals)

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        predictor = self._choices[source]
        return None if predictor is None else predictor.predict(source, signals, count)


def with_next_token(within: Predictor, across: Predictor) -> Predictor:
    """`within` for the layers of this token, `across` for the first layers of the next one."""
    num_within = within.num_layers - within.distance
    name = f"{within.name}, next token by {across.name}"
    return ComposedPredictor(name, [within] * num_within + [across] * within.distance, within.distance)
