"""What slots that started warm have saved: both starts planned beside the cache that serves, without its memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.planning.planner import Planner

NUM_TOKENS = 100
"""Of sequences beyond their first token, over which it is told."""


@dataclass(frozen=True)
class LayerStart:
    """One layer's numbers, and the `state` of its planner (csrc/residency.h) when its slots were warm."""

    num_experts: int
    num_slots: int
    top_k: int
    record_bytes: int
    state: NDArray[np.int64]


class WarmStart:
    """Counts what `layers` miss of the same routing from warm slots and from free ones; neither looks ahead."""

    def __init__(self, layers: Mapping[int, LayerStart], policy: str) -> None:
        self._layers = layers
        self._planners: dict[int, tuple[Planner, Planner]] = {}
        """Of each layer: warm and cold."""
        for number, layer in layers.items():
            numbers = layer.num_experts, layer.num_slots, layer.top_k, policy
            warm, cold = Planner(*numbers), Planner(*numbers)
            warm.resume(layer.state)
            self._planners[number] = warm, cold
        self._misses = {number: [0, 0] for number in layers}
        self.num_tokens = 0
        """So far, as in NUM_TOKENS."""

    def note(self, number: int, topk_ids: NDArray[np.integer]) -> None:
        """Layer `number` serves a step of the routed `topk_ids` (T, K), -1 for none."""
        ids, misses = np.ascontiguousarray(topk_ids, dtype=np.int32).reshape(-1), self._misses[number]
        for start, planner in enumerate(self._planners[number]):
            misses[start] += planner.plan(ids)

    def end_step(self, num_decoding: int) -> bool:
        """Every layer has served a step with so many sequences beyond their first token. Whether all has been seen."""
        self.num_tokens += num_decoding
        return self.num_tokens >= NUM_TOKENS

    def describe(self, link_bytes_per_second: float) -> str:
        """What the warm slots gave, for the log. A link of 0 is not known."""
        warm, cold = (sum(own) for own in zip(*self._misses.values(), strict=True))
        saved = sum((cold - warm) * self._layers[number].record_bytes for number, (warm, cold) in self._misses.items())
        word = "less" if saved >= 0 else "more"
        time = f" and {abs(saved) / link_bytes_per_second * 1e3:.1f} ms" if link_bytes_per_second else ""
        return (
            f"over the first {self.num_tokens} tokens the profile gave {warm} misses instead of {cold} (a cold start): "
            f"{abs(saved) / 1e6:.1f} MB{time} of link {word}"
        )
