"""Which experts the next MoE layer will need, guessed from what this one knows."""

from vllm_expert_prefetch.prediction.artifact import Artifact, ArtifactError, Card, load_artifact, save_artifact
from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.composed import with_next_token
from vllm_expert_prefetch.prediction.create import PREDICTORS, Ingredients, create_predictor
from vllm_expert_prefetch.prediction.estimator import Estimator, EstimatorShape
from vllm_expert_prefetch.prediction.gates import Gate, Norm, fingerprint, fold
from vllm_expert_prefetch.prediction.routing import Prediction, Routing

__all__ = [
    "PREDICTORS",
    "Artifact",
    "ArtifactError",
    "Card",
    "Estimator",
    "EstimatorShape",
    "Gate",
    "Ingredients",
    "Norm",
    "Prediction",
    "Predictor",
    "Routing",
    "Signals",
    "create_predictor",
    "fingerprint",
    "fold",
    "load_artifact",
    "save_artifact",
    "with_next_token",
]
