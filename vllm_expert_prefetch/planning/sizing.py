"""How many expert slots each layer gets: arithmetic only, every input a plain number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_expert_prefetch.config import (
    BROKEN_GRAPHS,
    CONFIG_KEY,
    DEFAULT_CPU_FRACTION,
    OFF,
    ConfigError,
    ExpertPrefetchConfig,
)
from vllm_expert_prefetch.memory.extent import Extent

GB = 10**9
DEFAULT_SEQUENCES = 4
_SECOND_AREA = 0.05
"""What a second area of overflow rows may cost of the cache, where nobody has asked for it."""
_ACTIVATION_COPIES, _ROOM_BYTES = 16, 3 * GB
"""More than a GPU needs for activations, in copies of the widest step's hidden states, and for all that is not known
before vLLM has measured it."""


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
class MemoryProfile:
    """Accelerator memory of one rank, in bytes, as vLLM has measured it beside the smallest expert cache."""

    requested_bytes: int
    """What vLLM may use: `gpu_memory_utilization` of all."""
    activation_bytes: int
    """Of the widest step, and of CUDA graphs."""
    available_bytes: int
    """What vLLM would take for its KV cache."""
    cache_bytes: int
    """Slots and overflow rows at that time."""
    sequence_bytes: int
    """KV cache of one sequence of `max_model_len` tokens."""
    kv_bytes: int | None = None
    """KV cache that was asked for."""

    @property
    def kv_cache_bytes(self) -> int:
        """What vLLM's KV cache gets: what was asked for; else DEFAULT_SEQUENCES sequences, or half of what there is for
        them and for experts where they need more, but one sequence; never more than there is.
        """
        wanted = self.kv_bytes
        if wanted is None:
            half = (self.available_bytes + self.cache_bytes) // 2
            wanted = min(DEFAULT_SEQUENCES * self.sequence_bytes, max(half, self.sequence_bytes))
        return min(wanted, self.available_bytes)

    @property
    def most_cache_bytes(self) -> int:
        """What the expert cache may grow to."""
        return self.cache_bytes + max(0, self.available_bytes - self.kv_cache_bytes)

    def describe(self) -> str:
        """All figures, for the start-up line."""
        other = self.requested_bytes - self.activation_bytes - self.available_bytes - self.cache_bytes
        sequences = self.kv_cache_bytes / self.sequence_bytes if self.sequence_bytes else 0
        return (
            f"{self.requested_bytes / GB:.2f} GB for vLLM - {other / GB:.2f} GB weights and other - "
            f"{self.activation_bytes / GB:.2f} GB activations and CUDA graphs - {self.kv_cache_bytes / GB:.2f} GB KV "
            f"cache ({sequences:.3g} x max_model_len) = {self.most_cache_bytes / GB:.2f} GB for experts"
        )


Areas = int | str
"""Of overflow rows: 1, 2, or "auto", which depends on the number of slots."""


def areas_asked(config: ExpertPrefetchConfig, on_gpu: bool, breaks_graphs: bool = False) -> Areas:
    """What `areas` comes to: 1 where nothing is looked ahead. Raises ConfigError where 2 were asked for there.

    `breaks_graphs`: as `compat.breaks_graphs` has it.
    """
    reason = None
    if config.prefetch == OFF:
        reason = "prefetch is off"
    elif breaks_graphs:
        reason = BROKEN_GRAPHS
    elif config.prefetch != "on" and not on_gpu and config.emulated_link_gbps is None:
        reason = "there is no link to hide on the CPU platform"
    if reason is None or config.areas == 1:
        return config.areas
    if config.areas == 2:
        raise ConfigError(
            f"{CONFIG_KEY}: areas is 2, and nothing would be copied to the second one: {reason}. Set areas to "
            f"auto{'' if breaks_graphs else ', or prefetch to on'}"
        )
    return 1


def num_areas(layers: Sequence[LayerShape], slots: Sequence[int], page: int, areas: Areas) -> int:
    """Areas of overflow rows behind so many `slots` of each layer."""
    if isinstance(areas, int):
        return areas
    one, two = (cache_bytes(layers, slots, page, number) for number in (1, 2))
    return 2 if 0 < two - one <= _SECOND_AREA * one else 1


def cache_bytes(layers: Sequence[LayerShape], slots: Sequence[int], page: int, areas: Areas = 1) -> int:
    """What `slots` of each layer take, with the overflow rows that they share: about (L C + areas (E - C)) records."""
    pairs = list(zip(layers, slots, strict=True))
    private = sum(extent.private for layer, num in pairs for extent in layer.extents(num, page))
    shared = sum(extent.shared for layer, num in set(pairs) for extent in layer.extents(num, page))
    return private + num_areas(layers, slots, page, areas) * shared


def size_cache(
    config: ExpertPrefetchConfig, layers: Sequence[LayerShape], page: int, grows: bool = False, areas: Areas = 1
) -> list[int]:
    """Slots of each layer when it is loaded.

    A size in bytes (`cache_gb`) covers slots and overflow rows together, and gives every layer the same number of
    slots, or one for every expert where there are fewer. `page`: as in `Extent.of`. `grows`: where no size is given,
    the fewest slots, which `grow_cache` makes more; else half of the experts.
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
        most = cache_bytes(layers, [layer.num_experts for layer in layers], page)
        if config.cache_gb * GB - most >= max(most / 100, sum(sum(layer.row_bytes) for layer in layers)):
            raise ConfigError(
                f"{CONFIG_KEY}: cache_gb = {config.cache_gb:g} is more than all experts take "
                f"({sum(layer.bytes for layer in layers) / GB:.3g} GB per rank). Drop {CONFIG_KEY}: the experts fit"
            )
        none = [0] * len(layers)
        slots = _most(layers, config.cache_gb * GB * (1 + 1e-9), page, none, areas) or none
        return _checked(layers, slots, f"cache_gb = {config.cache_gb:g}", page, areas)
    fraction = 0.0 if grows else DEFAULT_CPU_FRACTION
    return [max(layer.top_k, int(fraction * layer.num_experts)) for layer in layers]


def grow_cache(
    layers: Sequence[LayerShape], slots: Sequence[int], profile: MemoryProfile, page: int, areas: Areas = 1
) -> list[int]:
    """Slots of each layer once everything but the KV cache is there: as many as fit, and no fewer than `slots`.

    Raises ConfigError where the KV cache that was asked for does not fit beside these.
    """
    if profile.kv_bytes is not None and profile.kv_bytes > profile.available_bytes:
        raise ConfigError(
            f"{CONFIG_KEY}: the KV cache that was asked for takes {profile.kv_bytes / GB:.3g} GB, and there are "
            f"{profile.available_bytes / GB:.3g} GB beside {profile.cache_bytes / GB:.3g} GB for the experts of one "
            "token. Lower kv_cache_tokens (--kv-cache-memory-bytes), or raise gpu_memory_utilization"
        )
    return _most(layers, profile.most_cache_bytes, page, slots, areas) or list(slots)


def activation_bytes(batched_tokens: int, hidden_size: int, num_sequences: int, vocab_size: int) -> int:
    """More than a GPU needs beside weights, experts and KV cache: for what is decided before vLLM has measured it."""
    widest = batched_tokens * hidden_size * 2 * _ACTIVATION_COPIES
    return widest + num_sequences * vocab_size * 4 * 2 + _ROOM_BYTES


def share_of(num_experts: int, fraction: float) -> int:
    """Slots of a layer that `cache_fraction` gives: 0.29 of 100 is 29, not 28.999..."""
    return int(fraction * num_experts + 1e-9)


def _most(layers: Sequence[LayerShape], num_bytes: float, page: int, fewest: Sequence[int], areas: Areas) -> list[int]:
    """As many slots as fit, none where not even `fewest` do."""
    for most in range(max(layer.num_experts for layer in layers), 0, -1):
        slots = [min(max(most, low), layer.num_experts) for layer, low in zip(layers, fewest, strict=True)]
        if cache_bytes(layers, slots, page, areas) <= num_bytes:
            return slots
    return []


def _checked(layers: Sequence[LayerShape], slots: list[int], source: str, page: int, areas: Areas = 1) -> list[int]:
    for layer, num_slots in zip(layers, slots, strict=True):
        if num_slots < layer.top_k:
            needed = max(other.top_k for other in layers)
            enough = cache_bytes(layers, [min(needed, other.num_experts) for other in layers], page, areas)
            raise ConfigError(
                f"{CONFIG_KEY}: {source} gives {num_slots} slots per layer, and one token needs {needed} (top-k). "
                f"Give at least slots_per_layer = {needed}, i.e. cache_gb = {_round_up(enough / GB):.3g} per rank"
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
