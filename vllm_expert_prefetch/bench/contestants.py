"""Who is compared: plain vLLM, its offloaders, the plugin; with the same accelerator memory for experts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_expert_prefetch.planning.budget import Budget

STOCK, UVA, PREFETCH, OFF, ON = "stock", "vllm-uva", "vllm-prefetch", "plugin-off", "plugin-on"
NAMES = (STOCK, UVA, PREFETCH, OFF, ON)
"""The ceiling first."""
EXPERT_PARAMS = ("w13_weight", "w2_weight")


@dataclass(frozen=True)
class Contestant:
    """One way to serve. `config`: the plugin's settings; None: plain vLLM."""

    name: str
    flags: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = field(default=None)

    @property
    def arguments(self) -> list[str]:
        """Of `vllm serve`, beside those that all share."""
        if self.config is None:
            return list(self.flags)
        return [*self.flags, "--additional-config", json.dumps({"expert_prefetch": dict(self.config)})]


def contestants(
    budget: Budget, on_gpu: bool, link: Mapping[str, float], wanted: Sequence[str] = NAMES
) -> list[Contestant]:
    """Those of `wanted` that this platform has; vLLM's offloaders are for GPUs.

    `budget`: its expert cache is what everybody may keep on the accelerator. `link`: settings of an emulated link. On
    the CPU platform nothing looks ahead by itself where no link is emulated: there it is asked for.
    """
    size = {"slots_per_layer": budget.slots[0], **link}
    found = {
        STOCK: Contestant(STOCK),
        OFF: Contestant(OFF, config={**size, "prefetch": "off"}),
        ON: Contestant(ON, config={**size, "prefetch": "auto" if on_gpu or link else "on"}),
    }
    if on_gpu:
        found |= {UVA: _uva(budget), PREFETCH: _prefetch(budget)}
    return [found[name] for name in NAMES if name in wanted and name in found]


def _uva(budget: Budget) -> Contestant:
    """Zero-copy reads of what lies in host memory, layer by layer until the rest fits."""
    offloaded = (budget.experts_bytes - budget.cache_bytes) / 2**30
    return Contestant(UVA, ("--cpu-offload-gb", f"{offloaded:.3f}", "--cpu-offload-params", *EXPERT_PARAMS))


def _prefetch(budget: Budget) -> Contestant:
    """Whole layers, copied one ahead into one buffer; rounded to whole layers in this one's favour."""
    num_layers = len(budget.layers)
    num_offloaded = min(num_layers, num_layers + 1 - math.ceil(budget.cache_bytes / budget.layers[0].bytes))
    num_groups = math.gcd(num_layers, num_offloaded)
    flags = ["--offload-backend", "prefetch", "--offload-group-size", str(num_layers // num_groups)]
    flags += ["--offload-num-in-group", str(num_offloaded // num_groups), "--offload-prefetch-step", "1"]
    return Contestant(PREFETCH, (*flags, "--offload-params", *EXPERT_PARAMS))
