"""Expert parallelism: a rank's share of a layer's experts, and what its kernel is told of the others'.

The router chooses among all experts. A rank loads, keeps and caches its own, by their numbers among them. Kernels that
read vLLM's expert map get one in which rows stand for themselves, and for another rank's expert an id that it leads
nowhere: they leave it out as they do in plain vLLM. The CPU platform's kernel reads no map: there another rank's expert
is a row that is needed anyway, with weight 0.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_expert_prefetch.cache.base import mapped
from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.serving.compat import kernel_name
from vllm_expert_prefetch.serving.refusals import KERNELS


@dataclass(frozen=True)
class ExpertShare:
    """One layer's, on one rank."""

    expert_map: torch.Tensor
    """(routed experts + 1,) int32: their numbers among this rank's, -1 for others'; the last is -1, for ids of -1."""
    num_experts: int
    """This rank's."""
    has_map: bool
    """Whether the kernel reads a map."""

    def local(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """The number among this rank's experts of each id of the router's, of its shape and dtype; -1 for others'."""
        return mapped(self.expert_map, expert_ids)

    def without_others(
        self, weights: torch.Tensor, own_ids: torch.Tensor, row_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernel takes: weights, experts and rows (T, K) of which those with `row_ids` below 0 add nothing."""
        is_others = row_ids < 0
        if self.has_map:  # the first id that `map_of_rows` leads nowhere
            return (
                weights,
                own_ids.masked_fill(is_others, self.num_experts),
                row_ids.masked_fill(is_others, self.num_experts),
            )
        needed = row_ids.amax().clamp(min=0).to(row_ids.dtype)
        return weights.masked_fill(is_others, 0.0), own_ids, torch.where(is_others, needed, row_ids)

    def map_of_rows(self) -> torch.Tensor:
        """(routed experts,) int32, in place of vLLM's expert map: a row for each of the first ids, else -1."""
        rows = torch.arange(len(self.expert_map) - 1, dtype=torch.int32, device=self.expert_map.device)
        return rows.masked_fill(rows >= self.num_experts, -1)


def take_share(layer: Any, device: torch.device) -> ExpertShare | None:
    """The share of a post-processed `layer`, whose kernel gets the map of rows from now on; None where it has all.

    Raises ConfigError, naming the kernel, for one that cannot be told which experts are another rank's.
    """
    if layer._expert_map is None:
        return None
    has_map = kernel_name(layer.quant_method) in KERNELS
    if not has_map and device.type != "cpu":
        raise ConfigError(
            f"{CONFIG_KEY}: the kernel {kernel_name(layer.quant_method)} of {layer.layer_name} takes no expert map: "
            "choose --moe-backend triton or marlin, or drop --enable-expert-parallel"
        )
    expert_map = torch.nn.functional.pad(layer._expert_map.to(device, torch.int32), (0, 1), value=-1)
    share = ExpertShare(expert_map, layer.local_num_experts, has_map)
    layer._expert_map = share.map_of_rows()
    return share


def own_experts(layer: Any) -> list[int]:
    """The router's ids of the experts that a `layer`, which is not taken over yet, has on this rank."""
    if layer._expert_map is None:
        return list(range(layer.local_num_experts))
    return [int(expert) for expert in (layer._expert_map >= 0).nonzero().flatten()]
