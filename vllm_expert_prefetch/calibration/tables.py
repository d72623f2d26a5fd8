"""Counting routing: how often each expert is used, and which experts follow which."""

from collections.abc import Iterable, Sequence

import torch

from vllm_expert_prefetch.prediction import Gate, Signals


def count_tables(windows: Iterable[list[Signals]], gates: Sequence[Gate]) -> tuple[torch.Tensor, torch.Tensor]:
    """`frequency` (L, E) and `transition` (L, E, E), from each layer to the next, float32, rows sum to 1.

    See `prediction.baselines`. The last layer's target is the first one of the next token. Source experts that were
    never used get the target's frequency.
    """
    num_layers, num_experts = len(gates), gates[0].num_experts
    used = torch.zeros(num_layers, num_experts, dtype=torch.float64)
    pairs = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.float64)
    for signals in windows:
        chosen = [_one_hot(own, num_experts) for own in signals]
        for layer, own in enumerate(chosen):
            used[layer] += own.sum(0)
            if layer + 1 < num_layers:
                pairs[layer] += own.T @ chosen[layer + 1]
            else:
                pairs[layer] += own[:-1].T @ chosen[0][1:]
    frequency = used / used.sum(-1, keepdim=True).clamp(min=1)
    targets = [(layer + 1) % num_layers for layer in range(num_layers)]
    totals = pairs.sum(-1, keepdim=True)
    transition = torch.where(totals > 0, pairs / totals.clamp(min=1), frequency[targets].unsqueeze(1))
    return frequency.float(), transition.float()


def _one_hot(signals: Signals, num_experts: int) -> torch.Tensor:
    ids = signals.topk_ids.long()
    return torch.zeros(ids.shape[0], num_experts, dtype=torch.float64).scatter_(1, ids, 1.0)
