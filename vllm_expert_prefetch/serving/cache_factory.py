"""Which planner and which staging serve the layers of one worker."""

from typing import TYPE_CHECKING

from vllm_expert_prefetch.config import AUTO, CONFIG_KEY, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.experts import (
    POLICY_NUMBERS,
    DeviceLane,
    DeviceLayerCache,
    EmulatedLink,
    LayerCache,
    NativeLayerCache,
    NativePlanner,
    NativeStaging,
    PythonLayerCache,
    SlotPool,
    StagingLane,
    TorchStaging,
)
from vllm_expert_prefetch.native.library import cuda_library, host_library, why_not_cuda, why_not_host
from vllm_expert_prefetch.planning.sizing import CacheSize
from vllm_expert_prefetch.residency import ExpertCache, Planner, create_policy
from vllm_expert_prefetch.serving import compat

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts


class CacheFactory:
    """Makes the caches of one worker's layers, which share a link and a prefetch lane.

    Raises ConfigError when `staging` asks for native libraries that are not there.
    """

    def __init__(self, config: ExpertPrefetchConfig) -> None:
        self.config = config
        self.link: EmulatedLink | None = None
        if config.emulated_link_gbps is not None:
            self.link = EmulatedLink(config.emulated_link_gbps, config.emulated_link_latency_us)
        self.decides_on_gpu = compat.on_cuda_platform() and config.staging == "native"
        self._lane: StagingLane | None = None
        self._device_lane: DeviceLane | None = None
        why_not = why_not_host() or (why_not_cuda() if self.decides_on_gpu else None)
        if config.staging == "native" and why_not:
            raise ConfigError(f"{CONFIG_KEY}: staging is native and a library is missing: {why_not}. Or set it to auto")
        if config.staging == AUTO and compat.on_cpu_platform():
            if why_not:
                compat.logger().warning("expert_prefetch: staging with torch, which is slower: %s", why_not)
            else:
                self._lane = StagingLane(self.link)
        elif config.staging == "native" and not self.decides_on_gpu:
            self._lane = StagingLane(self.link)

    @property
    def staging_name(self) -> str:
        """How it is called in the start-up line and the info metric."""
        return "cuda" if self.decides_on_gpu else "native" if self._lane else "torch"

    def layer_cache(self, layer: "CachedRoutedExperts", size: CacheSize, seed: int) -> LayerCache:
        """The cache of `layer`, whose store and slots exist, decided on the host. Every slot is still free."""
        policy, waves, stream = self.config.policy, self.config.max_token_waves, size.stream_buffer
        staging = NativeStaging(layer.store, layer.pool, self._lane) if self._lane else None
        if staging and policy in POLICY_NUMBERS:
            library = staging.lane.library
            planner = NativePlanner(library, layer.num_experts, size.num_slots, layer.top_k, policy, waves, stream)
            return NativeLayerCache(planner, staging)
        cache = ExpertCache(layer.num_experts, size.num_slots, create_policy(policy, seed))
        planner_in_python = Planner(cache, layer.top_k, waves, stream)
        return PythonLayerCache(cache, planner_in_python, staging or TorchStaging(layer.store, layer.pool, self.link))

    def device_cache(self, layer: "CachedRoutedExperts", buffer: SlotPool | None) -> DeviceLayerCache:
        """The cache of `layer`, decided on the GPU, and filled."""
        if self._device_lane is None:
            self._device_lane = DeviceLane(layer.accelerator)
            compat.install_offloader(self._device_lane.join)
        assert cuda_library() is not None
        assert host_library() is not None
        return DeviceLayerCache(layer.store, layer.pool, buffer, self._device_lane, layer.top_k, self.config.policy)
