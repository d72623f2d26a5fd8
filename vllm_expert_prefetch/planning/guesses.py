"""Guesses for replays of routing that was recorded without hidden states."""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.planning.replay import Guess
from vllm_expert_prefetch.tracing.trace import Trace

RECALL = (0.88, 0.68, 0.58, 0.52)
"""Of the router's guesses one to four layers ahead, as others have measured it on models of many experts."""


def oracle(trace: Trace) -> Guess:
    """The true routing: what no predictor can beat."""
    layers, ends = [trace.routed(layer) for layer in range(trace.card.num_layers)], np.cumsum(trace.tokens).tolist()

    def guess(step: int, layer: int, distance: int) -> list[int]:
        begin = ends[step - 1] if step else 0
        needed = dict.fromkeys(layers[layer][begin : ends[step]].ravel().tolist())
        needed.pop(-1, None)
        return [*needed]

    return guess


def drawn(trace: Trace, recall: Sequence[float] = RECALL, seed: int = 0) -> Guess:
    """Guesses of which a share `recall` of each distance is right; what a far one finds, a nearer one finds as well.

    As many as the step needs; wrong ones by how often an expert is used.
    """
    true, rng = oracle(trace), random.Random()
    used = [_cumulated_uses(trace.routed(layer), count) for layer, count in enumerate(trace.card.num_experts)]
    last: dict[int, tuple[int, list[int], list[float], list[int]]] = {}

    def guess(step: int, layer: int, distance: int) -> list[int]:
        if last.get(layer, (-1,))[0] != step:
            rng.seed((seed * len(trace) + step) * len(used) + layer)
            needed = list(true(step, layer, distance))
            taken = dict.fromkeys(rng.choices(range(len(used[layer])), cum_weights=used[layer], k=3 * len(needed) + 8))
            wrong = [expert for expert in taken if expert not in needed]
            last[layer] = step, needed, [rng.random() for _ in needed], wrong
        _, needed, luck, wrong = last[layer]
        right = [expert for expert, drawn in zip(needed, luck, strict=True) if drawn < recall[distance - 1]]
        return right + wrong[: len(needed) - len(right)]

    return guess


def _cumulated_uses(ids: NDArray[np.int32], num_experts: int) -> list[int]:
    counts: list[int] = np.cumsum(np.bincount(ids[ids >= 0], minlength=num_experts)).tolist()
    return counts if counts[-1] else list(range(1, num_experts + 1))
