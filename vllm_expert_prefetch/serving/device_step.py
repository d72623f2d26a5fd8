"""One step of a layer on a GPU, launched and never looked at: it runs eagerly, and inside CUDA graphs."""

from dataclasses import dataclass

import torch

from vllm_expert_prefetch.experts import DeviceLayerCache
from vllm_expert_prefetch.prediction import Signals
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.device_lookahead import LookFrom
from vllm_expert_prefetch.serving.execution import Kernel


@dataclass(frozen=True)
class DeviceStep:
    """How the steps of one layer run. How a step is split follows from its width alone, never from its routing: the
    launches of a captured step must fit every later one."""

    cache: DeviceLayerCache
    slot_kernel: Kernel
    buffer_kernel: Kernel | None
    max_token_waves: int

    def run(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, look_ahead: LookFrom | None = None
    ) -> torch.Tensor:
        """The routed output (T, H) for `x` (T, H), `topk_weights` (T, K) float32 and `topk_ids` (T, K), expert ids.

        Only a step of one wave looks ahead: wider ones leave the link no time.
        """
        topk_ids = topk_ids.contiguous()
        real = compat.slot_mapping(x.shape[0], x.device)
        num_waves = self.cache.num_waves(x.shape[0])
        if num_waves == 1:
            slot_ids = self.cache.serve(topk_ids, real)
            if look_ahead is not None:
                look_ahead(Signals(x, topk_ids, topk_weights), real)
            return self.slot_kernel(x, topk_weights, slot_ids)
        if self.buffer_kernel is not None and num_waves > self.max_token_waves:
            self.cache.stream(topk_ids, real)
            return self.buffer_kernel(x, topk_weights, topk_ids)
        return self._run_waves(x, topk_weights, topk_ids, real)

    def _run_waves(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Each token's whole top-k in one wave: no sums across waves."""
        output = torch.empty_like(x)
        for start in range(0, x.shape[0], self.cache.tokens_per_wave):
            rows = slice(start, start + self.cache.tokens_per_wave)
            slot_ids = self.cache.serve(topk_ids[rows], real[rows])
            output[rows] = self.slot_kernel(x[rows], topk_weights[rows], slot_ids)
        return output
