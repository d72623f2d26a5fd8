"""Predictions in one native call, where that is possible and faster than torch."""

from collections.abc import Sequence

import torch

from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.compiled import NativePredictor, can_predict
from vllm_expert_prefetch.prediction.estimator import EstimatorPredictor
from vllm_expert_prefetch.prediction.gates import Gate
from vllm_expert_prefetch.prediction.router import DefaultVectorPredictor, RouterPredictor
from vllm_expert_prefetch.prediction.routing import Prediction

MAX_TOKENS = 64
"""Steps of more tokens are left to torch; up to here a native call was faster, whatever its size, on one thread."""

MAX_MULTIPLICATIONS = 2_000_000
"""What a native call may compute where torch has several threads, and itself only one: about 50 us, which is what the
many calls to torch take without computing anything."""


class NativelyPredicting(Predictor):
    """`predictor`, computed by a NativePredictor per source layer for steps of few tokens; None where torch must."""

    def __init__(self, predictor: Predictor, calls: Sequence[NativePredictor | None]) -> None:
        super().__init__(predictor.num_layers, predictor.distance)
        self.name = predictor.name  # type: ignore[misc]
        self._predictor = predictor
        self._calls = calls
        self._max_tokens = [0 if call is None else _max_tokens(call) for call in calls]

    def predict(self, source: int, signals: Signals, count: int) -> Prediction | None:
        call = self._calls[source] if source < len(self._calls) else None
        hidden, topk_ids, topk_weights = signals
        if call is None or hidden.shape[0] > self._max_tokens[source]:
            return self._predictor.predict(source, signals, count)
        count = min(count, call.num_experts)
        weights = topk_weights.float().contiguous()
        return Prediction(*call.predict(hidden.contiguous(), topk_ids.contiguous(), weights, count))


def _max_tokens(call: NativePredictor) -> int:
    if torch.get_num_threads() == 1:
        return MAX_TOKENS
    return min(MAX_TOKENS, MAX_MULTIPLICATIONS // call.num_multiplications)


def natively(
    predictor: RouterPredictor | DefaultVectorPredictor | EstimatorPredictor, gates: Sequence[Gate]
) -> Predictor:
    """`predictor`, which was made of `gates`, with native calls; as it is without the host library or on a GPU."""
    if not can_predict() or gates[0].weight.device.type != "cpu":
        return predictor
    routing = [gate.routing for gate in gates[predictor.distance :]]
    return NativelyPredicting(
        predictor,
        [
            NativePredictor(predictor.weights(source), own.top_k, own.renormalize, own.scaling)
            if own.scoring == "softmax" and own.is_monotonic
            else None
            for source, own in enumerate(routing)
        ],
    )
