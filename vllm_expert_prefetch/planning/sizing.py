"""How many expert slots a layer gets: arithmetic only, every input a plain number."""

import math
from dataclasses import dataclass

from vllm_expert_prefetch.config import (
    AUTO,
    CONFIG_KEY,
    DEFAULT_CPU_FRACTION,
    OFF,
    ConfigError,
    ExpertPrefetchConfig,
)

GB = 10**9


@dataclass(frozen=True)
class ModelShape:
    """What sizing needs to know of a rank's MoE layers. All layers have the same number of experts."""

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    """All routed experts of this rank, all layers."""

    @property
    def slot_bytes(self) -> float:
        """One slot in every layer."""
        return self.expert_bytes / self.num_experts

    @property
    def buffer_bytes(self) -> float:
        """A stream buffer: the experts of one layer."""
        return self.expert_bytes / self.num_layers


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


@dataclass(frozen=True)
class CacheSize:
    """The decision: slots of each layer, and whether there is a stream buffer beside them."""

    num_slots: int
    stream_buffer: bool


def size_cache(config: ExpertPrefetchConfig, shape: ModelShape, budget: MemoryBudget | None) -> CacheSize:
    """Decide the cache. `budget` is None on the CPU platform, where half of the experts is the default.

    A size in bytes (`cache_gb`, automatic sizing on a GPU) covers slots and stream buffer together; a number or a
    fraction of slots does not count the buffer.
    Raises ConfigError, with both numbers and the remedy, for fewer slots than a token needs or more than experts.
    """
    num_slots, source = _slots(config, shape, budget, 0)
    if num_slots >= shape.num_experts:
        _check(num_slots, shape, source)
        return CacheSize(num_slots, stream_buffer=False)  # no step can be wide
    for buffer in _buffer_choices(config):
        num_slots, source = _slots(config, shape, budget, shape.buffer_bytes if buffer else 0)
        pays = num_slots * shape.slot_bytes + shape.buffer_bytes < shape.expert_bytes
        if pays and num_slots >= shape.top_k:
            break
    _check(num_slots, shape, source)
    return CacheSize(num_slots, buffer)


def _buffer_choices(config: ExpertPrefetchConfig) -> list[bool]:
    """Stream buffer or not, the better choice first; the last one is taken whether it pays or not."""
    if config.stream_buffer == AUTO:
        return [True, False]
    return [config.stream_buffer != OFF]


def _slots(
    config: ExpertPrefetchConfig, shape: ModelShape, budget: MemoryBudget | None, buffer_bytes: float
) -> tuple[int, str]:
    """Slots per layer as asked for, unchecked, and the words that say where the number comes from."""
    asked = config.slots_asked(shape.num_experts)
    if asked is not None:
        key = "slots_per_layer" if config.slots_per_layer is not None else "cache_fraction"
        return asked, f"{key} = {getattr(config, key)}"
    beside = f" with a stream buffer of {buffer_bytes / GB:.3g} GB" if buffer_bytes else ""
    if config.cache_gb is not None:
        slots = int((config.cache_gb * GB - buffer_bytes) / shape.slot_bytes)
        return slots, f"cache_gb = {config.cache_gb}{beside}"
    if budget is not None:
        slots = min(shape.num_experts, int((budget.cache_bytes - buffer_bytes) / shape.slot_bytes))
        return slots, f"automatic sizing ({budget.describe()}){beside}"
    half = int(DEFAULT_CPU_FRACTION * shape.num_experts)
    return min(shape.num_experts, max(shape.top_k, half)), "automatic sizing"


def _check(slots: int, shape: ModelShape, source: str) -> None:
    if slots < shape.top_k:
        enough_gb = _round_up(shape.top_k * shape.slot_bytes / GB)
        raise ConfigError(
            f"{CONFIG_KEY}: {source} gives {max(0, slots)} slots per layer, and one token needs {shape.top_k} (top-k). "
            f"Give at least slots_per_layer = {shape.top_k}, i.e. cache_gb = {enough_gb:.3g} per rank without a stream "
            "buffer; on a GPU lower max_model_len or raise gpu_memory_utilization"
        )
    if slots > shape.num_experts:
        raise ConfigError(
            f"{CONFIG_KEY}: {source} gives {slots} slots per layer, more than the {shape.num_experts} experts "
            f"({shape.expert_bytes / GB:.3g} GB per rank). Give at most slots_per_layer = {shape.num_experts}, "
            f"or drop {CONFIG_KEY}: the experts fit"
        )


def _round_up(value: float) -> float:
    """To three digits: following an error message must be enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit
