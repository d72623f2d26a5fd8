"""One layer's prediction in one native call (csrc/host/predictor.h), on the CPU."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from vllm_expert_prefetch.native.library import host_library, why_not_host

_MATRICES = {"reduce.weight", "widen.weight", "narrow.weight", "logits.weight"}


class PredictorWeights(NamedTuple):
    """What a prediction is computed with.

    `tensors`, absent ones left out or None, H being the hidden size and E the target's experts:
    `factor`, `source_shift`, `target_gain`, `target_shift` (H) and `vectors` (E of the source, H) of the quasi-hidden
    state, without `factor` what the router reads is taken as it is; `weight` and `bias` of `reduce`, `widen`, `narrow`
    and `norm` of the estimator, without `reduce` there is none; `logits.weight` (E, H or the estimator's width) and
    `logits.bias` (E).
    """

    tensors: Mapping[str, torch.Tensor | None]
    norm_eps: float = 0.0
    norm_is_centered: bool = False
    estimator_eps: float = 0.0

    def and_also(self, tensors: Mapping[str, torch.Tensor | None], estimator_eps: float = 0.0) -> "PredictorWeights":
        """The same with more tensors."""
        return self._replace(tensors={**self.tensors, **tensors}, estimator_eps=estimator_eps)


def can_predict() -> bool:
    """Whether the host library is there."""
    return host_library() is not None


class NativePredictor:
    """Plain softmax top-k of the logits that `weights` give; weights in float32 are shared, not copied."""

    def __init__(self, weights: PredictorWeights, top_k: int, renormalize: bool, scaling: float) -> None:
        """Raises RuntimeError without the host library, ValueError for shapes that do not fit each other."""
        library = host_library()
        if library is None:
            raise RuntimeError(f"native prediction needs the native host library: {why_not_host()}")
        given = {name: tensor for name, tensor in weights.tensors.items() if tensor is not None}
        tensors = {name: tensor.detach().float().contiguous() for name, tensor in given.items()}
        self.num_experts = len(tensors["logits.weight"])
        matrices = (tensors[name] for name in tensors.keys() & _MATRICES)
        self.num_multiplications = sum(matrix.numel() for matrix in matrices)  # for each token
        self._predict = library.predictor_predict
        numbers = (weights.norm_eps, weights.norm_is_centered, weights.estimator_eps)
        self._predictor = library.predictor_create(tensors, top_k, renormalize, scaling, *numbers)

    def predict(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 and weights float32, both (T, count), as `Routing.choose` has them; `count` at most E.

        `hidden` (T, H) float32, bfloat16 or float16, `topk_ids` (T, K) int32 or int64, `topk_weights` (T, K) float32,
        all contiguous. Raises ValueError or TypeError for anything else, and for experts that do not exist.
        """
        num_tokens = hidden.shape[0]  # half of the time of a small prediction goes into these lines
        ids = torch.empty(num_tokens, count, dtype=torch.int64)
        weights = torch.empty(num_tokens, count, dtype=torch.float32)
        self._predict(self._predictor, hidden, topk_ids, topk_weights, ids, weights)
        return ids, weights
