"""The MoE layers of a draft whose experts have a cache of their own: served like the target's, with nothing predicted,
recorded or shown on /metrics.
"""

from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY, RESIDENT, ConfigError, config_of_draft
from vllm_expert_prefetch.planning.sizing import GB, share_of
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.takeover import verify_taken_over
from vllm_expert_prefetch.serving.wording import span
from vllm_expert_prefetch.serving.worker import Worker

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts


def worker_of_draft(vllm_config: Any, model_config: Any) -> "DraftWorker | None":
    """For a draft that is about to be built; None where its experts are vLLM's business, and for another model."""
    config = config_of_draft(vllm_config, model_config)
    return None if config is None or config.draft_experts == RESIDENT else DraftWorker(vllm_config, config)


class DraftWorker(Worker):
    """One draft's. `config`: that of `config.config_of_draft`."""

    joins_others = True

    def num_slots_of(self, layer: "CachedRoutedExperts", tensors: dict[str, torch.Tensor]) -> int:
        """As the target's. Raises ConfigError where one token needs more."""
        share, fewest = float(self.config.draft_experts), min(layer.top_k, layer.local_num_experts)
        num_slots = share_of(layer.local_num_experts, share)
        if num_slots < fewest:
            raise ConfigError(
                f"{CONFIG_KEY}: draft_experts = {share:g} gives the draft's {layer.layer_name} {num_slots} slots, and "
                f"one token needs {fewest} (top-k) of its {layer.local_num_experts} experts: give a larger share, or "
                "resident"
            )
        return super().num_slots_of(layer, tensors)

    def start(self, model: torch.nn.Module) -> None:
        """The draft is loaded: prove that its layers were taken over, and say so."""
        layers = compat.moe_layers_of(model)
        if not layers:
            raise ConfigError(
                f"{CONFIG_KEY}: draft_experts is {self.config.draft_experts:g}, and the draft has no MoE layer: leave "
                "the key out"
            )
        verify_taken_over(layers)
        self._verify()
        self._prove()
        for line in self.describe():
            compat.logger().info("expert_prefetch: %s", line)

    def describe(self) -> list[str]:
        """What of the draft is offloaded, in one line."""
        layers, slots = self.layers, sorted(set(self.sizes.slots))
        return [
            f"the draft: {len(layers)} MoE layers x {span(sorted({layer.local_num_experts for layer in layers}))} "
            f"experts, {span(slots)} slots each: {self._private_bytes() / GB:.4g} GB cache, "
            f"{self._overflow_bytes() / GB:.4g} GB overflow rows; on the host {self._host_bytes() / GB:.4g} GB"
        ]
