"""How many slots each layer of a worker gets: when it is loaded, and once vLLM has measured what else needs memory."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch.cache.create import page_bytes
from vllm_expert_prefetch.config import ExpertPrefetchConfig, draft_model_of
from vllm_expert_prefetch.memory.host_limit import check_experts_fit
from vllm_expert_prefetch.planning.sizing import (
    DEFAULT_SEQUENCES,
    LayerShape,
    MemoryProfile,
    activation_bytes,
    areas_asked,
    cache_bytes,
    grow_cache,
    num_areas,
    size_cache,
)
from vllm_expert_prefetch.serving import compat

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts


class CacheSizes:
    """The sizes of one worker's caches.

    Where no size is given, vLLM measures memory beside the fewest slots, and the cache grows by what the KV cache need
    not have. An expert cache in mapped memory counts in that: vLLM takes what the driver has given out since before the
    model was loaded (0.26: what torch has not allocated of it, and the weights that torch has; since then: all of it).
    """

    def __init__(self, vllm_config: Any, config: ExpertPrefetchConfig) -> None:
        self._vllm_config, self._config = vllm_config, config
        self._shapes: list[LayerShape] = []
        self._page = 0
        self._areas_asked = areas_asked(config, compat.on_cuda_platform(), compat.breaks_graphs(vllm_config))
        self.areas = 1
        """Of overflow rows; decided with the slots."""
        self.slots: list[int] = []
        """Of each layer, in order; there once the first one is complete."""
        self.grows = False
        """Whether the cache still waits for vLLM's memory profile, and has the fewest slots until then."""
        self.is_host_checked = False
        self.description = ""
        """Where the sizes come from, for the start-up line."""

    def check_host(self, layers: "list[CachedRoutedExperts]", pin: bool) -> None:
        """Raise ConfigError where this host cannot hold the experts of all `layers`, as they are in the checkpoint.

        Says where page-locking them would leave little to everything else. What vLLM makes of them while it loads them
        is not known yet.
        """
        self.is_host_checked = True
        known = [layer for layer in layers if not compat.quantises_while_loading(layer.quant_method)]
        num_bytes = sum(sum(layer.unprocessed_row_bytes) * layer.local_num_experts for layer in known)
        parallel = self._vllm_config.parallel_config  # other stages of a pipeline have other layers, which check too
        num_ranks = min(compat.ranks_on_this_host(parallel), parallel.tensor_parallel_size)
        note = check_experts_fit(num_bytes * num_ranks)
        if note and pin:
            compat.logger().warning("expert_prefetch: %s", note)

    def decide(
        self, layers: "list[CachedRoutedExperts]", first: "CachedRoutedExperts", tensors: dict[str, torch.Tensor]
    ) -> None:
        """For all layers at once, when `first` is complete; `tensors`: its post-processed expert tensors."""
        self._page, self._shapes = page_bytes(first.accelerator), _shapes_like(first, tensors, layers)
        self.grows = compat.measures_memory() and not self._config.sizes_given
        if self.grows and compat.on_cuda_platform() and self._all_fit(first, tensors):
            self.grows, self.description = False, "every expert fits"
            self.slots = [shape.num_experts for shape in self._shapes]
        else:
            self.slots = size_cache(self._config, self._shapes, self._page, self.grows, self._areas_asked)
            self.grows = self.grows and self.slots != [shape.num_experts for shape in self._shapes]
            given = [f"{name} = {getattr(self._config, name)}" for name in self._config.sizes_given]
            self.description = given[0] if given else "default"
        self.areas = num_areas(self._shapes, self.slots, self._page, self._areas_asked)

    def want_one_area(self) -> None:
        """Nothing is looked ahead: a cache that still grows has no use for a second area."""
        self._areas_asked = 1

    def grow(self, requested: int, activations: int, available: int, sequence: int) -> int:
        """Take what vLLM's KV cache need not have, and return what is left for that. All in bytes.

        vLLM has measured what it may use, what activations and CUDA graphs need, what is available to its KV cache, and
        what a sequence of `max_model_len` takes of that. Raises ConfigError where the KV cache that was asked for does
        not fit.
        """
        asked = self._vllm_config.cache_config.kv_cache_memory_bytes or None
        if self._config.kv_cache_tokens is not None:
            asked = -(-sequence * self._config.kv_cache_tokens // self._vllm_config.model_config.max_model_len)
        before = cache_bytes(self._shapes, self.slots, self._page, self.areas)
        profile = MemoryProfile(requested, activations, available, before, sequence, asked)
        self.slots = grow_cache(self._shapes, self.slots, profile, self._page, self._areas_asked)
        self.areas = num_areas(self._shapes, self.slots, self._page, self._areas_asked)
        self.description = profile.describe()
        left = available + before - cache_bytes(self._shapes, self.slots, self._page, self.areas)
        return left if asked is None else min(asked, left)

    def _all_fit(self, layer: "CachedRoutedExperts", tensors: dict[str, torch.Tensor]) -> bool:
        """Whether every expert fits on this GPU for sure, before vLLM has measured what else is needed."""
        if compat.quantises_while_loading(layer.quant_method) or draft_model_of(self._vllm_config) is not None:
            return False  # other weights are still to come
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free += sum(tensor.nbytes for tensor in tensors.values() if tensor.device.type != "cpu")
        cache, model = self._vllm_config.cache_config, self._vllm_config.model_config
        scheduler = self._vllm_config.scheduler_config
        other = activation_bytes(
            scheduler.max_num_batched_tokens, model.get_hidden_size(), scheduler.max_num_seqs, model.get_vocab_size()
        )
        sequence = compat.kv_bytes_per_sequence(self._vllm_config)
        sequences = max(DEFAULT_SEQUENCES, (self._config.kv_cache_tokens or 0) / model.max_model_len)
        reserved = other + (cache.kv_cache_memory_bytes or sequences * sequence)
        left = free - total * (1 - cache.gpu_memory_utilization) - reserved
        return left > sum(shape.bytes for shape in self._shapes)


def _shapes_like(
    first: "CachedRoutedExperts", tensors: dict[str, torch.Tensor], layers: "list[CachedRoutedExperts]"
) -> list[LayerShape]:
    """Of all layers. Post-processing may change the rows: layers that were like `first` will be."""
    before = first.unprocessed_row_bytes
    after = tuple(tensor[0].nbytes for tensor in tensors.values())
    return [
        LayerShape(
            layer.local_num_experts,
            min(layer.top_k, layer.local_num_experts),
            after if layer.unprocessed_row_bytes == before else layer.unprocessed_row_bytes,
        )
        for layer in layers
    ]
