"""Who serves the experts: plain vLLM, its two offloaders, the plugin; with the same accelerator memory for experts."""

import math
from dataclasses import dataclass, field
from typing import Any

from shapes import MoeShape

EXPERT_PARAMS = ["w13_weight", "w2_weight"]
RESIDENT, UVA, PREFETCH = "all resident", "vLLM UVA", "vLLM prefetch"
ON_DEMAND, CACHE, LOOK_AHEAD, SPECULATIVE = "on demand", "cache only", "cache + look-ahead", "speculative"
EVERY_SLOT = "plugin, all resident"
PINNING = 1.34
"""torch rounds the page-locked memory of vLLM's offloaders up to powers of two, here 1.07 GB for 0.81 GB."""


@dataclass(frozen=True)
class Variant:
    """`config`: the plugin's, None for plain vLLM. `extra`: engine arguments. `moved_bytes`: what every decode step
    moves by construction, None where it depends on routing."""

    name: str
    config: dict[str, Any] | None
    accelerator_bytes: int
    host_bytes: int
    extra: dict[str, Any] = field(default_factory=dict)
    needs_gpu: bool = False
    moved_bytes: int | None = None


def variants(shape: MoeShape, residency: float, plugin: dict[str, Any]) -> list[Variant]:
    """All that is compared at one residency. `plugin`: keys that every plugin variant gets.

    What the plugin's slots and overflow rows take together is what vLLM's offloaders may keep on the GPU.
    """
    layer_bytes = shape.num_experts * shape.record_bytes
    every = shape.num_layers * layer_bytes

    def cached(name: str, slots: int, **keys: Any) -> Variant:
        config = {"slots_per_layer": slots, **plugin, **keys}
        return Variant(name, config, _plugin_bytes(shape, slots), every)

    resident = Variant(RESIDENT, None, every, 0, moved_bytes=0)
    if residency == 1:
        return [resident, cached(EVERY_SLOT, shape.num_experts)]
    slots = max(shape.top_k, round(residency * shape.num_experts))
    room = _plugin_bytes(shape, slots)
    found = [
        resident,
        cached(CACHE, slots, prefetch="off"),
        cached(LOOK_AHEAD, slots, prefetch="auto"),
        _uva(every, room),
        _prefetch(shape, layer_bytes, room),
    ]
    if residency == 0.5:  # they do not depend on the residency
        found += [
            cached(ON_DEMAND, shape.top_k, prefetch="off"),
            cached(SPECULATIVE, slots, prefetch="auto", execution="speculative", artifact="none"),
        ]
    return found


def _plugin_bytes(shape: MoeShape, slots: int) -> int:
    """Slots of all layers, and the overflow rows that they share (planning/sizing.py)."""
    return (slots * shape.num_layers + shape.num_experts - slots) * shape.record_bytes


def _uva(every: int, room: int) -> Variant:
    """Zero-copy reads of what lies in host memory, layer by layer from the first until the room suffices."""
    offloaded = every - room
    extra = {"cpu_offload_gb": offloaded / 2**30, "cpu_offload_params": EXPERT_PARAMS}
    return Variant(UVA, None, room, offloaded, extra, needs_gpu=True)


def _prefetch(shape: MoeShape, layer_bytes: int, room: int) -> Variant:
    """Whole layers, copied one ahead into one buffer; rounded to whole layers in this variant's favour."""
    num_offloaded = shape.num_layers + 1 - math.ceil(room / layer_bytes)
    num_groups = math.gcd(shape.num_layers, num_offloaded)
    extra = {
        "offload_backend": "prefetch",
        "offload_group_size": shape.num_layers // num_groups,
        "offload_num_in_group": num_offloaded // num_groups,
        "offload_prefetch_step": 1,
        "offload_params": EXPERT_PARAMS,
    }
    moved = num_offloaded * layer_bytes
    kept = (shape.num_layers + 1 - num_offloaded) * layer_bytes
    return Variant(PREFETCH, None, kept, moved, extra, needs_gpu=True, moved_bytes=moved)


def groups(found: list[Variant], accelerator_bytes: float, host_bytes: float, overhead: float) -> list[list[Variant]]:
    """Engines that fit at once, each with `overhead` bytes on either side; the first is in every group."""
    control, *others = found
    packed: list[list[Variant]] = [[control]]
    for variant in others:
        group = [*packed[-1], variant]
        on_device = sum(member.accelerator_bytes + overhead for member in group)
        on_host = sum(member.host_bytes * (PINNING if member.config is None else 1) + overhead for member in group)
        if (on_device > accelerator_bytes or on_host > host_bytes) and len(packed[-1]) > 1:
            packed.append([control, variant])
        else:
            packed[-1].append(variant)
    return packed
