"""What a step of a prompt costs on this machine, and how many tokens make the most of it."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

_MOST_TOKENS = 2048


class PromptStep(NamedTuple):
    """A step that needs every expert of every layer."""

    num_bytes: int
    """Of the absent experts."""
    copy_seconds: float
    tokens: int
    """As many as the experts compute while the absent ones are copied: a power of two."""

    def describe(self, most: int) -> str:
        """For the start-up line. `most`: `max_num_batched_tokens` as it is."""
        return (
            f"prompts: a step brings {self.num_bytes / 1e9:.3g} GB at most, {1000 * self.copy_seconds:.3g} ms of the "
            f"link, while experts compute {self.tokens} tokens: --max-num-batched-tokens {self.tokens} wastes neither "
            f"(now {most})"
        )


def measure_prompt_step(
    layers: "Sequence[CachedRoutedExperts]", bytes_per_second: float, most: int
) -> PromptStep | None:
    """What the experts of one layer take for `most` tokens, but 2048 at most, for all `layers`, which have a cache.

    The rows are computed with whatever they hold: nothing may be in use yet. None where nothing is absent.
    """
    caches = [layer.cache for layer in layers if layer.cache is not None]
    num_bytes = sum(cache.record_bytes * (cache.num_experts - cache.num_slots) for cache in caches)
    if not num_bytes or not bytes_per_second:
        return None
    num_tokens = min(most, _MOST_TOKENS)
    seconds = len(layers) * _compute_seconds(layers[0], num_tokens) / num_tokens
    copy_seconds = num_bytes / bytes_per_second
    return PromptStep(num_bytes, copy_seconds, 1 << max(0, round(copy_seconds / seconds) - 1).bit_length())


@torch.no_grad()
def _compute_seconds(layer: "CachedRoutedExperts", num_tokens: int) -> float:
    """The fastest of three runs: the first one may compile, and other processes may disturb another."""
    device, num_experts = layer.accelerator, layer.local_num_experts
    x = torch.randn((num_tokens, layer.hidden_size)).to(device, layer.moe_config.in_dtype)
    scores = torch.rand((num_tokens, num_experts)).topk(layer.top_k)
    weights = scores.values.to(device)
    ids = scores.indices.to(device, layer.quant_method.topk_indices_dtype or torch.int32)
    seconds = []
    for _ in range(3):
        given = x.clone()
        _wait(device)
        started = time.perf_counter()
        layer.compute(given, weights, ids, ids)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
