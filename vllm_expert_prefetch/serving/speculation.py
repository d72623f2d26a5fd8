"""Executing predicted experts in place of the router's (arXiv 2603.19289): what a layer then computes."""

import torch

from vllm_expert_prefetch.config import SPECULATIVE, ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.prediction import Prediction


def describe_execution(
    config: ExpertPrefetchConfig, look_ahead: LookAhead | None, num_layers: int, prefetch: str
) -> str:
    """What the start-up line and the info metric say; `prefetch`: the look-ahead's name, or why there is none."""
    if config.execution != SPECULATIVE:
        return config.execution
    if look_ahead is not None and look_ahead.speculated_layers:
        return f"speculative in {len(look_ahead.speculated_layers)} of {num_layers} layers"
    return f"exact (speculative was asked for; layers allowed: 0; prefetch {prefetch})"


def execute_instead(
    guess: Prediction, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk_weights` and `topk_ids` (T, K) with the rows of real tokens taken from `guess`; the padding stays."""
    rows, top_k = guess.ids.shape[0], topk_ids.shape[1]
    weights, ids = topk_weights.clone(), topk_ids.clone()
    weights[:rows] = guess.weights[:, :top_k]
    ids[:rows] = guess.ids[:, :top_k]
    return weights, ids
