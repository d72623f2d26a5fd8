"""Predictors by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_expert_prefetch.prediction.artifact import Artifact, ArtifactError
from vllm_expert_prefetch.prediction.base import Predictor
from vllm_expert_prefetch.prediction.baselines import (
    FrequencyPredictor,
    NoPredictor,
    OraclePredictor,
    PreviousPredictor,
    TransitionPredictor,
)
from vllm_expert_prefetch.prediction.composed import ComposedPredictor
from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.prediction.estimator import EstimatorPredictor
from vllm_expert_prefetch.prediction.gates import Gate
from vllm_expert_prefetch.prediction.native_predict import natively
from vllm_expert_prefetch.prediction.router import DefaultVectorPredictor, RouterPredictor


@dataclass(frozen=True)
class Ingredients:
    """What predictors are made of, everything on the device where they run."""

    gates: Sequence[Gate]
    artifact: Artifact | None = None
    distance: int = 1
    trace: Sequence[torch.Tensor] | None = None
    """For the oracle: expert ids (num_layers, T, K) of every step."""

    def calibrated(self, name: str) -> Artifact:
        """The artifact, for a predictor that needs one."""
        if self.artifact is None:
            raise ArtifactError(f"predictor {name} needs an artifact: run vllm-expert-prefetch calibrate")
        if self.distance > (1 if name == "transition" else self.artifact.card.depth):
            raise ArtifactError(
                f"predictor {name}: the artifact does not speak of {self.distance} layers ahead; calibrate with "
                "--lookahead-layers"
            )
        return self.artifact


def create_predictor(name: str, ingredients: Ingredients) -> Predictor:
    """The predictor called `name`, one of PREDICTORS.

    Raises ArtifactError when it needs an artifact that is not there or lacks a part, KeyError for another name.
    """
    return _MAKERS[name](ingredients)


def _defaults(ingredients: Ingredients, name: str) -> DefaultVectors:
    defaults = ingredients.calibrated(name).defaults
    if defaults is None:
        raise ArtifactError(f"predictor {name}: the artifact holds no default vectors; calibrate without --no-defaults")
    return defaults


def _make_estimator(ingredients: Ingredients) -> Predictor:
    artifact = ingredients.calibrated("estimator")
    if artifact.estimator is None or artifact.card.estimator is None:
        raise ArtifactError("predictor estimator: the artifact holds no estimator; calibrate without --no-estimator")
    defaults = _defaults(ingredients, "estimator") if artifact.card.estimator["default_vectors"] else None
    predictor = EstimatorPredictor(ingredients.gates, artifact.estimator, defaults, ingredients.distance)
    return natively(predictor, ingredients.gates)


def _make_hybrid(ingredients: Ingredients) -> Predictor:
    names = ingredients.calibrated("hybrid").card.hybrid[ingredients.distance - 1]
    made = {name: create_predictor(name, ingredients) for name in set(names)}
    across = [None] * (len(ingredients.gates) - len(names))
    return ComposedPredictor("hybrid", [*(made[name] for name in names), *across], ingredients.distance)


def _make_oracle(ingredients: Ingredients) -> Predictor:
    if not ingredients.trace:
        raise ArtifactError("predictor oracle replays a recorded run: it needs a trace, which only studies have")
    return OraclePredictor(ingredients.trace, ingredients.distance)


_MAKERS: dict[str, Callable[[Ingredients], Predictor]] = {
    "router": lambda given: natively(RouterPredictor(given.gates, given.distance), given.gates),
    "router_defaults": lambda given: natively(
        DefaultVectorPredictor(given.gates, _defaults(given, "router_defaults"), given.distance), given.gates
    ),
    "estimator": _make_estimator,
    "hybrid": _make_hybrid,
    "previous": lambda given: PreviousPredictor(given.gates, given.distance),
    "frequency": lambda given: FrequencyPredictor(given.calibrated("frequency").frequency, given.distance),
    "transition": lambda given: TransitionPredictor(given.calibrated("transition").transition, given.distance),
    "oracle": _make_oracle,
    "none": lambda given: NoPredictor(len(given.gates), given.distance),
}
PREDICTORS = tuple(_MAKERS)
