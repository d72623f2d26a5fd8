"""How many expert slots each layer gets: arithmetic only, every input a plain number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_expert_prefetch.config import CONFIG_KEY, DEFAULT_CPU_FRACTION, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.memory.extent import Extent

GB = 10**9


@dataclass(frozen=True)
class LayerShape:
    """What sizing needs to know of one MoE layer on this rank."""

    num_experts: int
    top_k: int
    row_bytes: tuple[int, ...]
    """Bytes of one row of each expert tensor. Layers that agree in all of this share overflow rows."""

    @property
    def bytes(self) -> int:
        """All experts."""
        return self.num_experts * sum(self.row_bytes)

    def extents(self, num_slots: int, page: int) -> list[Extent]:
        """Of each expert tensor."""
        return [Extent.of(row_bytes, self.num_experts, num_slots, page) for row_bytes in self.row_bytes]


@dataclass(frozen=True)
class MemoryBudget:
    """Accelerator memory of one rank, in bytes, once everything but the experts is loaded."""

    total_bytes: int
    utilization: float
    """vLLM's `gpu_memory_utilization`."""
    other_bytes: int
    """Weights that are not routed experts, and everything else already in use."""
    activation_bytes: int
    kv_reserve_bytes: int
    """KV cache of one sequence of `max_model_len` tokens."""

    @property
    def cache_bytes(self) -> int:
        """What is left for the expert cache."""
        reserved = self.other_bytes + self.activation_bytes + self.kv_reserve_bytes
        return int(self.total_bytes * self.utilization) - reserved

    def describe(self) -> str:
        """All figures, for the start-up line and for errors."""
        return (
            f"{self.utilization:.2f} x {self.total_bytes / GB:.2f} GB - other weights {self.other_bytes / GB:.2f} GB - "
            f"activations {self.activation_bytes / GB:.2f} GB - KV reserve {self.kv_reserve_bytes / GB:.2f} GB = "
            f"{self.cache_bytes / GB:.2f} GB"
        )


def cache_bytes(layers: Sequence[LayerShape], slots: Sequence[int], page: int, areas: int = 1) -> int:
    """What `slots` of each layer take, with the overflow rows that they share: about (L C + areas (E - C)) records."""
    pairs = list(zip(layers, slots, strict=True))
    private = sum(extent.private for layer, num in pairs for extent in layer.extents(num, page))
    shared = sum(extent.shared for layer, num in set(pairs) for extent in layer.extents(num, page))
    return private + areas * shared


def size_cache(
    config: ExpertPrefetchConfig, layers: Sequence[LayerShape], budget: MemoryBudget | None, page: int
) -> list[int]:
    """Slots of each layer. `budget` is None on the CPU platform, where half of the experts is the default.

    A size in bytes (`cache_gb`, automatic sizing on a GPU) covers slots and overflow rows together, and gives every
    layer the same number of slots, or one for every expert where there are fewer. `page`: as in `Extent.of`.
    Raises ConfigError, with both numbers and the remedy, for fewer slots than a token needs or more than experts.
    """
    if config.slots_per_layer is not None:
        return _checked(
            layers, [config.slots_per_layer] * len(layers), f"slots_per_layer = {config.slots_per_layer}", page
        )
    if config.cache_fraction is not None:
        slots = [share_of(layer.num_experts, config.cache_fraction) for layer in layers]
        return _checked(layers, slots, f"cache_fraction = {config.cache_fraction}", page)
    if config.cache_gb is not None:
        spare = config.cache_gb * GB - sum(layer.bytes for layer in layers)
        if spare >= sum(sum(layer.row_bytes) for layer in layers):
            raise ConfigError(
                f"{CONFIG_KEY}: cache_gb = {config.cache_gb:g} is more than all experts take "
                f"({sum(layer.bytes for layer in layers) / GB:.3g} GB per rank). Drop {CONFIG_KEY}: the experts fit"
            )
        return _checked(layers, _most(layers, config.cache_gb * GB, page), f"cache_gb = {config.cache_gb:g}", page)
    if budget is not None:
        source = f"automatic sizing ({budget.describe()})"
        return _checked(layers, _most(layers, budget.cache_bytes, page), source, page)
    half = [max(layer.top_k, int(DEFAULT_CPU_FRACTION * layer.num_experts)) for layer in layers]
    return _checked(layers, half, "automatic sizing", page)


def share_of(num_experts: int, fraction: float) -> int:
    """Slots of a layer that `cache_fraction` gives: 0.29 of 100 is 29, not 28.999..."""
    return int(fraction * num_experts + 1e-9)


def _most(layers: Sequence[LayerShape], num_bytes: float, page: int) -> list[int]:
    """As many slots as fit."""
    for most in range(max(layer.num_experts for layer in layers), 0, -1):
        slots = [min(most, layer.num_experts) for layer in layers]
        if cache_bytes(layers, slots, page) <= num_bytes:
            return slots
    return [0] * len(layers)


def _checked(layers: Sequence[LayerShape], slots: list[int], source: str, page: int) -> list[int]:
    for layer, num_slots in zip(layers, slots, strict=True):
        if num_slots < layer.top_k:
            needed = max(other.top_k for other in layers)
            enough = cache_bytes(layers, [min(needed, other.num_experts) for other in layers], page)
            raise ConfigError(
                f"{CONFIG_KEY}: {source} gives {num_slots} slots per layer, and one token needs {needed} (top-k). "
                f"Give at least slots_per_layer = {needed}, i.e. cache_gb = {_round_up(enough / GB):.3g} per rank; on "
                "a GPU lower max_model_len or raise gpu_memory_utilization"
            )
        if num_slots > layer.num_experts:
            raise ConfigError(
                f"{CONFIG_KEY}: {source} gives {num_slots} slots per layer, more than the {layer.num_experts} experts "
                f"({sum(other.bytes for other in layers) / GB:.3g} GB per rank). Give at most slots_per_layer = "
                f"{layer.num_experts}, or drop {CONFIG_KEY}: the experts fit"
            )
    return slots


def _round_up(value: float) -> float:
    """To three digits: following an error message must be enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit
