"""Choosing the layers that may be executed speculatively, by the perplexity that they cost together."""

import math
from collections.abc import Sequence
from typing import Any

from vllm_expert_prefetch.calibration.accuracy import Accuracy, Decoder, measure
from vllm_expert_prefetch.calibration.recordings import Progress
from vllm_expert_prefetch.prediction import Artifact

MAX_INCREASE = 0.01
"""Of perplexity, over exact execution."""
MIN_TOKENS = 1000
"""Fewer decoded tokens decide nothing: 247 have let six layers through that cost 1.8 +- 1.6 % on more text."""


def with_guard(
    artifact: Artifact,
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    tell: Progress,
    min_tokens: int = MIN_TOKENS,
) -> Artifact:
    """The artifact with its allow list: the most candidates, in their order, that keep perplexity within MAX_INCREASE.

    Whether a number of them does is measured by decoding `windows`, one standard error on the safe side; the number is
    found by bisection. What is allowed has been measured as it is, all its layers together. Fewer decoded tokens than
    `min_tokens` allow none.
    """
    candidates: list[int] = (artifact.card.guard or {})["candidates"]
    tried: list[Accuracy] = []
    low, high = 0, len(candidates)
    while low < high:
        number = high if not tried else (low + high + 1) // 2  # all of them first: often that is the answer
        result = measure(decoder, windows, {"speculative": frozenset(candidates[:number])}, tell)[1]
        tried.append(result)
        if result.tokens < min_tokens:
            break
        if is_within(result):
            low = number
        else:
            high = number - 1
    return artifact.with_card(allow_list=sorted(candidates[:low]), guard=_record(candidates, tried))


def is_within(result: Accuracy) -> bool:
    """Whether the increase of perplexity, and one standard error, stay below the limit."""
    return math.log1p(result.increase) + result.increase_error <= math.log1p(MAX_INCREASE)


def _record(candidates: list[int], tried: list[Accuracy]) -> dict[str, Any]:
    measured = [
        {"layers": len(one.layers), "increase": one.increase, "increase_error": one.increase_error} for one in tried
    ]
    tokens = tried[0].tokens if tried else 0
    return {"candidates": candidates, "max_increase": MAX_INCREASE, "tokens": tokens, "measured": measured}


def first_tokens(windows: Sequence[list[int]], num_tokens: int, shortest: int) -> list[list[int]]:
    """The first windows, about `num_tokens` in all, none with fewer than `shortest` tokens."""
    kept: list[list[int]] = []
    for window in windows:
        left = num_tokens - sum(map(len, kept))
        if min(len(window), left) >= shortest:
            kept.append(window[:left])
    return kept
