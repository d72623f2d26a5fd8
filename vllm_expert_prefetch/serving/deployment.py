"""One worker's MoE layers together: the slot count, the proof that they were taken over, the start-up line."""

import re
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.config import AUTO, CONFIG_KEY, ExpertPrefetchConfig
from vllm_expert_prefetch.experts import HostMemoryOptions, HostStore, SlotPool, measure_bandwidth, numa_node_of_gpu
from vllm_expert_prefetch.metrics.counters import SUFFIX, Counters
from vllm_expert_prefetch.metrics.runtime_dir import ensure_runtime_dir
from vllm_expert_prefetch.metrics.scrape_port import serve_counters
from vllm_expert_prefetch.metrics.steps import StepClock
from vllm_expert_prefetch.planning.sizing import GB, CacheSize, MemoryBudget, ModelShape, size_cache
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.cache_factory import CacheFactory
from vllm_expert_prefetch.serving.device_lookahead import DeviceLookAhead
from vllm_expert_prefetch.serving.device_totals import DeviceTotals
from vllm_expert_prefetch.serving.lookahead import LookAhead, create_look_ahead
from vllm_expert_prefetch.serving.speculation import describe_execution
from vllm_expert_prefetch.serving.takeover import TakeoverError

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

_PROGRESS_SECONDS = 10
_REFRESH_SECONDS = 1.0
_ACTIVATION_COPIES = 16
"""Activation reserve on a GPU, in copies of the widest step's hidden states (before vLLM has measured it)."""


class Deployment:
    """What the MoE layers of one model on one worker share."""

    counters: Counters
    """There once the model is loaded: a start that fails shows no metrics."""
    clock: StepClock
    prefetch: str
    """How look-ahead is called, or why there is none; there once the model is loaded."""

    def __init__(self, vllm_config: Any, config: ExpertPrefetchConfig) -> None:
        self.config = config
        self._vllm_config = vllm_config
        self.layers: list[weakref.ref[CachedRoutedExperts]] = []
        self.size: CacheSize | None = None
        self._sizing = ""
        self._num_taken_over = 0
        self._refresh_at = self._link_rate = 0.0
        self._execution = config.execution
        self._buffers: dict[tuple[object, ...], SlotPool] = {}
        self._device_totals: DeviceTotals | None = None
        self.caches = CacheFactory(config)
        on_cuda = compat.on_cuda_platform()
        node = config.numa_node
        if node is None and on_cuda:
            node = numa_node_of_gpu(torch.cuda.current_device())
        self.host_memory = HostMemoryOptions(
            pin=config.pin_memory == "on" or (config.pin_memory == AUTO and on_cuda),
            cuda=on_cuda,
            numa_node=node,
            huge_pages=config.huge_pages,
            must_pin=config.pin_memory == "on",
            must_bind=config.numa_node is not None,
        )
        self._next_progress = time.monotonic() + _PROGRESS_SECONDS

    def is_for(self, vllm_config: Any) -> bool:
        """Whether this deployment belongs to the model that `vllm_config` describes."""
        return self._vllm_config is vllm_config

    def size_for(self, layer: "CachedRoutedExperts", resident_bytes: int) -> CacheSize:
        """The cache's size, decided once, when the first layer is complete and every other weight is loaded.

        `resident_bytes`: what that layer's experts take on the accelerator at this moment.
        """
        if self.size is None:
            budget = None if compat.on_cpu_platform() else self._budget(resident_bytes)
            self.size = size_cache(self.config, self._shape(layer), budget)
            self._sizing = budget.describe() if budget else ""
        return self.size

    def stream_buffer(self, store: HostStore, device: torch.device) -> SlotPool:
        """The buffer that all layers with records of this shape share."""
        key = tuple((name, view.shape, view.dtype) for name, view in store.views.items())
        if key not in self._buffers:
            self._buffers[key] = SlotPool(store.views, store.num_experts, device)
        return self._buffers[key]

    def layer_taken_over(self) -> None:
        """Called by each layer."""
        self._num_taken_over += 1
        self._report_progress()

    def start(self, model: torch.nn.Module) -> None:
        """The model is loaded and every layer taken over: look ahead where that is asked for, count, and say so."""
        self._verify_bytes()
        layers = self._live_layers()
        self._link_rate = self._measure_link()
        has_link = self.caches.link is not None or self.host_memory.cuda
        look_ahead, self.prefetch = create_look_ahead(model, layers, self.config, has_link, self._link_rate)
        on_device = look_ahead if isinstance(look_ahead, DeviceLookAhead) else None
        on_host = look_ahead if isinstance(look_ahead, LookAhead) else None
        speculated = frozenset() if on_host is None else on_host.speculated_layers
        self._execution = describe_execution(self.config, speculated, len(layers), self.prefetch)
        self._publish(on_device)
        if on_host is not None:
            on_host.counters, on_host.clock = self.counters, self.clock
        for number, layer in enumerate(layers):
            layer.look_ahead = on_host
            layer.look_from = None if on_device is None else partial(on_device.after_staging, number)
        compat.logger().info("%s", self.describe())

    def _report_progress(self) -> None:
        """Once, what of the host memory could not be as it should; and how far a long load is."""
        layers = [layer for layer in self._live_layers() if hasattr(layer, "store")]
        if self._num_taken_over == 1:
            for note in layers[0].store.memory.notes:
                compat.logger().warning("%s. Going on without", note)
        if time.monotonic() > self._next_progress:
            self._next_progress = time.monotonic() + _PROGRESS_SECONDS
            filled = sum(layer.store.num_bytes for layer in layers) / GB
            compat.logger().info(
                "expert_prefetch: %d of %d MoE layers in host memory, %.4g GB",
                *(self._num_taken_over, len(self.layers), filled),
            )

    def describe(self) -> str:
        """The start-up line."""
        first = self._live_layers()[0]
        config = self.config
        link = self.caches.link
        link_text = f"EMULATED {link.gbps} GB/s + {link.latency_us} us (not a real link)" if link else "not emulated"
        store, cache = self._host_bytes(), self._cache_bytes()
        return (
            f"expert_prefetch: {len(self.layers)} MoE layers x {first.num_experts} experts, "
            f"{first.pool.num_slots} slots each; "
            f"{store / GB:.4g} GB on the host ({'page-locked' if self._is_pinned() else 'pageable'}), "
            f"{cache / GB:.4g} GB cache ({100 * first.pool.num_slots / first.num_experts:.0f} % of the experts), "
            f"{self._buffer_bytes() / GB:.4g} GB stream buffer; "
            f"policy {config.policy}, execution {self._execution}, prefetch {self.prefetch}; "
            f"staging {self.caches.staging_name}, link {link_text}"
            + (f"; sizing: {self._sizing}" if self._sizing else "")
        )

    def _live_layers(self) -> "list[CachedRoutedExperts]":
        layers = [reference() for reference in self.layers]
        return [layer for layer in layers if layer is not None]

    def _shape(self, layer: "CachedRoutedExperts") -> ModelShape:
        expert_bytes = sum(other.expert_bytes for other in self._live_layers())
        return ModelShape(len(self.layers), layer.num_experts, layer.top_k, expert_bytes)

    def _budget(self, resident_bytes: int) -> MemoryBudget:
        """GPU memory as the driver and torch report it now."""
        free, total = torch.cuda.mem_get_info()
        cached_by_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        scheduler, model = self._vllm_config.scheduler_config, self._vllm_config.model_config
        widest = scheduler.max_num_batched_tokens * model.get_hidden_size() * 2 * _ACTIVATION_COPIES
        logits = scheduler.max_num_seqs * model.get_vocab_size() * 4 * 2
        return MemoryBudget(
            total_bytes=total,
            utilization=self._vllm_config.cache_config.gpu_memory_utilization,
            other_bytes=total - free - cached_by_torch - resident_bytes,
            activation_bytes=widest + logits,
            kv_reserve_bytes=compat.kv_bytes_per_sequence(self._vllm_config),
        )

    def _verify_bytes(self) -> None:
        for layer in self._live_layers():
            for name in layer.store.views:
                held = getattr(layer, name)
                if held.shape[0] != layer.pool.num_slots:
                    raise TakeoverError(
                        f"{CONFIG_KEY}: {layer.layer_name}.{name} holds {held.shape[0]} experts on the accelerator "
                        f"instead of {layer.pool.num_slots} slots"
                    )

    def _is_pinned(self) -> bool:
        return all(layer.store.memory.is_pinned for layer in self._live_layers())

    def _host_bytes(self) -> int:
        return sum(layer.store.num_bytes for layer in self._live_layers())

    def _cache_bytes(self) -> int:
        return sum(layer.pool.num_bytes for layer in self._live_layers())

    def _buffer_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self._buffers.values())

    def _publish(self, look_ahead: DeviceLookAhead | None) -> None:
        layers = self._live_layers()
        names = [_short_name(layer.layer_name, index) for index, layer in enumerate(layers)]
        self.counters = Counters(
            self._counter_path(), self._labels(), self._info(), names if self.config.metrics_per_layer else ()
        )
        self.clock = StepClock(self.counters)
        gauges = {
            "moe_layers": len(layers),
            "experts": sum(layer.num_experts for layer in layers),
            "slots": self._num_slots(),
            "host_store_bytes": self._host_bytes(),
            "cache_bytes": self._cache_bytes(),
            "stream_buffer_bytes": self._buffer_bytes(),
            "expert_record_bytes": sum(layer.store.record_bytes for layer in layers) / len(layers),
            "link_bytes_per_second": self._link_rate,
            "planned_hit_ratio": self._planned_hit_ratio(),
        }
        for name, value in gauges.items():
            self.counters.set(name, value)
        device_caches = [layer.device_cache for layer in layers if layer.device_cache is not None]
        if device_caches:
            self._device_totals = DeviceTotals(device_caches, self.counters, look_ahead)
        self._refresh_gauges()
        if self.config.metrics_port is not None:
            serve_counters(self.counters, self.config.metrics_port + compat.local_rank())

    def step_ended(self) -> None:
        """One engine step is over: time it, and bring the gauges up to date now and then."""
        self.clock.end()
        if time.monotonic() >= self._refresh_at:
            self._refresh_gauges()

    def _refresh_gauges(self) -> None:
        self._refresh_at = time.monotonic() + _REFRESH_SECONDS
        self.counters.set("resident_slots", sum(layer.residence.num_resident for layer in self._live_layers()))

    def _num_slots(self) -> int:
        return sum(layer.pool.num_slots for layer in self._live_layers())

    def _planned_hit_ratio(self) -> float:
        """As asked for, or what a router that prefers no expert would reach."""
        if self.config.planned_hit_rate is not None:
            return self.config.planned_hit_rate
        return self._num_slots() / sum(layer.num_experts for layer in self._live_layers())

    def _measure_link(self) -> float:
        """Bytes per second of one record of each layer, copied again to where it is."""
        return measure_bandwidth([(layer.residence.copier, (0, 0)) for layer in self._live_layers()])

    def _labels(self) -> dict[str, str]:
        model, parallel = self._vllm_config.model_config, self._vllm_config.parallel_config
        served = model.served_model_name or model.model
        return {
            "model_name": served if isinstance(served, str) else served[0],
            "engine": str(parallel.data_parallel_rank),
            "rank": str(parallel.rank),
        }

    def _info(self) -> dict[str, str]:
        link = self.caches.link
        return {
            "execution": self._execution,
            "policy": self.config.policy,
            "prefetch": self.prefetch,
            "staging": self.caches.staging_name,
            "link": f"emulated {link.gbps} GB/s {link.latency_us} us" if link else "real",
            "pinned": str(self._is_pinned()).lower(),
            "platform": "cuda" if self.host_memory.cuda else "cpu",
            "version": __version__,
            "vllm_version": compat.vllm_version(),
        }

    def _counter_path(self) -> Any:
        parallel = self._vllm_config.parallel_config
        directory = ensure_runtime_dir()
        stem = f"engine{parallel.data_parallel_rank}-rank{parallel.rank}"
        numbers = [int(path.stem.rsplit("-", 1)[1]) for path in directory.glob(f"{stem}-*{SUFFIX}")]
        return directory / f"{stem}-{max(numbers, default=0) + 1:06d}{SUFFIX}"


def _short_name(layer_name: str, index: int) -> str:
    """The number in a layer's name: model.layers.7.mlp.experts is 7."""
    found = re.search(r"\.(\d+)\.", layer_name)
    return found[1] if found else str(index)


_latest: "weakref.ref[Deployment] | None" = None
"""Weak: a deployment lives as long as its layers, and its counters end with it."""


def deployment_of(vllm_config: Any, config: ExpertPrefetchConfig) -> Deployment:
    """The deployment that the model now being built belongs to; its layers keep it alive."""
    global _latest
    deployment = _latest() if _latest else None
    if deployment is None or not deployment.is_for(vllm_config):
        deployment = Deployment(vllm_config, config)
        _latest = weakref.ref(deployment)
    return deployment


def find_deployment(vllm_config: Any) -> Deployment | None:
    """The deployment that serves this model, once its layers have been taken over."""
    deployment = _latest() if _latest else None
    served = deployment is not None and deployment.is_for(vllm_config) and hasattr(deployment, "clock")
    return deployment if served else None
