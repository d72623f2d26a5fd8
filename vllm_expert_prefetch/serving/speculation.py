"""Executing predicted experts in place of the router's (arXiv 2603.19289): where, and what a layer then computes."""

import torch

from vllm_expert_prefetch.config import SPECULATIVE, ExpertPrefetchConfig
from vllm_expert_prefetch.prediction import Card, Prediction
from vllm_expert_prefetch.serving import compat


def allowed_layers(card: Card, num_layers: int) -> frozenset[int]:
    """The layers of the artifact's allow list, never the first nor the last one; a warning when there are none."""
    allowed = frozenset(layer for layer in card.allow_list if 0 < layer < num_layers - 1)
    if not allowed:
        compat.logger().warning(
            "expert_prefetch: execution is speculative, but the artifact allows it in no layer: serving is exact"
        )
    return allowed


def describe_execution(config: ExpertPrefetchConfig, layers: frozenset[int], num_layers: int, prefetch: str) -> str:
    """What the start-up line and the info metric say; `prefetch` is how look-ahead is called, or why there is none."""
    if config.execution != SPECULATIVE:
        return config.execution
    if layers:
        return f"speculative in {len(layers)} of {num_layers} layers"
    return f"exact (speculative was asked for; layers allowed: 0; prefetch {prefetch})"


def covers(guess: Prediction, num_tokens: int, top_k: int) -> bool:
    """Whether `guess` names top-k experts for each token."""
    return guess.ids.shape[0] == num_tokens and guess.ids.shape[1] >= top_k


def execute_instead(
    guess: Prediction, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk_weights` and `topk_ids` (T, K) with the rows of real tokens taken from `guess`; the padding stays."""
    rows, top_k = guess.ids.shape[0], topk_ids.shape[1]
    weights, ids = topk_weights.clone(), topk_ids.clone()
    weights[:rows] = guess.weights[:, :top_k]
    ids[:rows] = guess.ids[:, :top_k]
    return weights, ids
