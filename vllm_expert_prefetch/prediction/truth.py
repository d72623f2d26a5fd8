"""How good a prediction was, measured against the true routing of the layer it spoke of."""

from typing import NamedTuple

import torch

from vllm_expert_prefetch.prediction.base import Signals
from vllm_expert_prefetch.prediction.routing import Prediction


class Score(NamedTuple):
    """Sums over tokens, float64 scalars; add them up, then `recall` divides.

    `tokens` T; `routed` T * k; `found` of the true experts among the first k guesses; `found_all` among all guesses;
    `mass` of the true gate weights among the first k guesses, as a share of each token's own.
    """

    tokens: torch.Tensor
    routed: torch.Tensor
    found: torch.Tensor
    found_all: torch.Tensor
    mass: torch.Tensor


class Quality(NamedTuple):
    """Shares, 0 to 1: recall@k, recall@(k + over_fetch), and the gate mass that the first k guesses miss."""

    recall: float
    recall_all: float
    missing_mass: float


def score(prediction: Prediction, true: Signals) -> Score:
    """`prediction` has one row per token of `true`, or one for all. No host synchronisation."""
    every = torch.zeros(len(true.topk_ids), dtype=torch.int64, device=true.topk_ids.device)
    return Score(*sums_of_real(prediction.ids, true.topk_ids, true.topk_weights.double(), every))


def quality(scores: list[Score]) -> Quality | None:
    """Over all `scores`; None when no token was predicted."""
    if not scores:
        return None
    total = Score(*(torch.stack(values).sum() for values in zip(*scores, strict=True)))
    if total.tokens == 0:
        return None
    recalls = (float(total.found / total.routed), float(total.found_all / total.routed))
    return Quality(*recalls, float(1 - total.mass / total.tokens))


def sums_of_real(
    guessed: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """The fields of `Score` in one tensor, float64, over the rows where `real` (T,) int64 is not negative.

    `guessed` (T or 1, P) and `topk_ids` (T, K) integers, `topk_weights` (T, K) floating point, which is computed in.
    Other rows may hold anything.
    """
    top_k = topk_ids.shape[1]
    same = guessed.unsqueeze(1) == topk_ids.unsqueeze(2)
    found = same[:, :, :top_k].any(-1)
    mass = (topk_weights * found).sum(-1) / topk_weights.sum(-1).clamp(min=1e-12)
    ones = torch.ones_like(mass)
    num_found, num_found_at_all = (hits.sum(-1, dtype=mass.dtype) for hits in (found, same.any(-1)))
    rows = torch.stack([ones, top_k * ones, num_found, num_found_at_all, mass])
    return torch.where(real >= 0, rows, 0.0).sum(-1, dtype=torch.float64)
