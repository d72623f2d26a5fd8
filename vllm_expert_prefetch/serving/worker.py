"""One worker's MoE layers together: how many slots each gets, what they share, and what the start-up line says."""

import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.cache.base import Caches, LayerCache
from vllm_expert_prefetch.cache.create import create_caches, create_shared_rows
from vllm_expert_prefetch.config import OFF, ExpertPrefetchConfig, config_of
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.lookahead.create import depth_of
from vllm_expert_prefetch.memory.host_memory import host_memory_options
from vllm_expert_prefetch.memory.host_store import HostStore, TakeShared
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.memory.row_space import RowSpace
from vllm_expert_prefetch.memory.shared_store import SharedStore
from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.metrics.publish import Publisher
from vllm_expert_prefetch.metrics.scrape_port import serve_counters
from vllm_expert_prefetch.planning.sizing import GB
from vllm_expert_prefetch.planning.warm_start import WarmStart
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.advice import PromptStep, measure_prompt_step
from vllm_expert_prefetch.serving.ghosts import add_ghosts
from vllm_expert_prefetch.serving.places import checkpoint_of, part_of_rank, place_of
from vllm_expert_prefetch.serving.proof import prove
from vllm_expert_prefetch.serving.recording import create_profile_writer, create_switch, warm_slots
from vllm_expert_prefetch.serving.refusals import check_tells_padding
from vllm_expert_prefetch.serving.sizes import CacheSizes
from vllm_expert_prefetch.serving.sources import create_look_ahead_of
from vllm_expert_prefetch.serving.speculation import describe_execution
from vllm_expert_prefetch.serving.takeover import verify_rows
from vllm_expert_prefetch.serving.wording import describe_progress, short_name, span
from vllm_expert_prefetch.tracing.profile import is_first_start
from vllm_expert_prefetch.tracing.profile_writer import ProfileWriter
from vllm_expert_prefetch.tracing.switch import TraceSwitch

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

_PROGRESS_SECONDS = 10
_workers: "weakref.WeakValueDictionary[int, Worker]" = weakref.WeakValueDictionary()
"""By the id of vLLM's configuration object, which the worker holds, as its layers hold the worker."""


class Worker:
    """What the MoE layers of one model on one worker share, which is built with one configuration object of vLLM's."""

    joins_others = False
    """Whether another model's caches are there already, whose copies CUDA graphs wait for as well."""

    def __init__(self, vllm_config: Any, config: ExpertPrefetchConfig) -> None:
        self.config = config
        self._vllm_config = vllm_config
        self._layers: list[weakref.ref[CachedRoutedExperts]] = []
        self.sizes = CacheSizes(vllm_config, config)
        self.caches: Caches | None = None
        """None before the first takeover, and where every expert is resident."""
        self._groups: dict[tuple[object, ...], tuple[Any, list[int]]] = {}
        """Overflow rows, and the numbers of the layers that share them."""
        self._shared_store: SharedStore | None = None
        """Where one is asked for, once loading begins."""
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._num_taken_over = 0
        self._began = self._said = 0.0
        """When the first layer was complete, and when the log last said how far the load is."""
        self.num_layers = 0
        """MoE layers of the model, those of other stages of a pipeline included; there once it is loaded."""
        self.is_in_step = False
        """Whether the engine runs a step that has tokens."""
        self.execution = config.execution
        self._prompt_step: PromptStep | None = None
        self.prefetch = ""
        """The look-ahead's name, or why there is none; there once the model is loaded."""
        self.publisher: Publisher | None = None
        """There once the model is loaded: a start that fails shows no metrics."""
        self._warm_start: WarmStart | None = None
        self._num_decoding = 0
        """Of the step that runs, or the last one."""
        self.traces: TraceSwitch | None = None
        """There with the publisher, on the first rank of those that route alike."""
        self.profile_writer: ProfileWriter | None = None
        self.host_memory = host_memory_options(config, compat.on_cuda_platform())

    @property
    def layers(self) -> "list[CachedRoutedExperts]":
        """In the order in which the model computes them."""
        return [layer for layer in (reference() for reference in self._layers) if layer is not None]

    def register(self, layer: "CachedRoutedExperts") -> int:
        """Called by each layer when it is made. Returns its number."""
        self._layers.append(weakref.ref(layer))
        return len(self._layers) - 1

    def loading_begins(self) -> None:
        """Called by each layer before its first weight is read: all layers are made."""
        if not self.sizes.is_host_checked:
            self.sizes.check_host(self.layers, self.host_memory.pin)
            self._join_store()

    def num_slots_of(self, layer: "CachedRoutedExperts", tensors: dict[str, torch.Tensor]) -> int:
        """Slots of `layer`, whose post-processed expert `tensors` are given. Decided for all layers at once, when the
        first one is complete and every other weight is loaded."""
        if not self.sizes.slots:
            self._began = self._said = time.monotonic()
            self.sizes.decide(self.layers, layer, tensors)
        return self.sizes.slots[layer.number]

    def _join_store(self) -> None:
        name = self.config.shared_store
        if name != OFF and self._shared_store is None:
            self._shared_store = SharedStore(name, checkpoint_of(self._vllm_config), part_of_rank(self._vllm_config))

    def shared_memory_of(self, layer: "CachedRoutedExperts") -> TakeShared | None:
        """What gives memory for the records of `layer` that other servers share; None where none is asked for."""
        self._join_store()
        if self._shared_store is None:
            return None
        return partial(self._shared_store.take, f"{layer.layer_name} for {compat.kernel_name(layer.quant_method)}")

    def create_cache(self, layer: "CachedRoutedExperts", store: HostStore, num_slots: int) -> LayerCache:
        """The cache of `layer`; overflow rows are shared with the layers whose records have the same shape."""
        if self.caches is None:
            depth = depth_of(self.config, len(self._layers), compat.on_cuda_platform())
            self.caches = create_caches(len(self._layers), self._link(), layer.accelerator, depth)
            if self.caches.on_device:
                compat.install_offloader(self.caches, self.joins_others)
        key = (num_slots, *((name, view.shape, view.dtype) for name, view in store.views.items()))
        if key not in self._groups:
            self._groups[key] = create_shared_rows(store.views, num_slots, self.sizes.areas, layer.accelerator), []
        shared, numbers = self._groups[key]
        space = shared.row_space(len(numbers))
        numbers.append(layer.number)
        return self._add(layer, store, space, num_slots)

    def _add(self, layer: "CachedRoutedExperts", store: HostStore, space: RowSpace, num_slots: int) -> LayerCache:
        assert self.caches is not None
        cache = self.caches.add(layer.number, store, space, num_slots, layer.top_k, self.config.policy)
        cache.expert_map = None if layer.share is None else layer.share.expert_map
        return cache

    def measured(self, requested: int, activations: int, available: int, sequence: int) -> int:
        """vLLM has measured memory: grow the cache and start. Returns what is left for the KV cache, all in bytes as
        in `CacheSizes.grow`."""
        left = self.sizes.grow(requested, activations, available, sequence)
        self._grow()
        self.start_grown()
        return left

    def start_grown(self) -> None:
        """The cache is as large as it gets."""
        model = None if self._model is None else self._model()
        assert model is not None
        self.sizes.grows = False
        self.start(model)

    def _grow(self) -> None:
        assert self.caches is not None
        layers = self.layers
        for shared, numbers in self._groups.values():
            num_slots = self.sizes.slots[numbers[0]]
            shared.grow(num_slots, self.sizes.areas)
            for layer in (layers[number] for number in numbers):
                layer.look_ahead = None
                if num_slots < layer.local_num_experts:
                    self._renew(layer)
                else:
                    layer.become_resident()
                    self.caches.layers[layer.number] = None
        if not any(self.caches.layers):
            self.caches.close()
            self.caches = None

    def _renew(self, layer: "CachedRoutedExperts") -> None:
        """Another cache over the same memory, with the slots that the layer has now, all of them free."""
        cache, num_slots = layer.cache, self.sizes.slots[layer.number]
        assert cache is not None
        layer.cache = self._add(layer, cache.store, cache.tensors, num_slots)

    def layer_taken_over(self) -> None:
        """Called by each layer. Says what of the host memory could not be as it should, and how far a long load is."""
        self._num_taken_over += 1
        stores = [layer.cache.store for layer in self.layers if layer.cache is not None]
        if len(stores) == self._num_taken_over == 1:
            for note in stores[0].memory.notes if stores[0].memory else ():
                compat.logger().warning("%s. Going on without", note)
        now = time.monotonic()
        if stores and now > self._said + _PROGRESS_SECONDS:
            self._said = now
            num_bytes = sum(store.num_bytes for store in stores)
            line = describe_progress(self._num_taken_over, len(self._layers), num_bytes, now - self._began)
            compat.logger().info("expert_prefetch: %s", line)

    def start(self, model: torch.nn.Module) -> None:
        """The model is loaded and every layer taken over: prove it, look ahead where that is asked for, count, say so.
        All but the look-ahead's memory waits for a cache that still grows."""
        caches = self.caches
        self._verify()
        if self.sizes.grows:
            self._model = weakref.ref(model)
            # vLLM measures beside it; it is made anew for the caches that have grown.
            if self._look_ahead(model, 0.0) is None:
                self.sizes.want_one_area()
            return
        self._prove()
        link_rate = caches.measure_bandwidth() if caches else 0.0
        self._prompt_step = self._measure_prompt_step(link_rate)
        if self.config.ghost_caches:
            add_ghosts(caches)
        if self.config.profile is not None and not is_first_start(self.config):  # before anything is counted
            self._watch_warm_start(warm_slots(self, self._vllm_config))
        self.publisher = self._publish(self._look_ahead(model, link_rate), link_rate)
        self.traces = create_switch(self, self._vllm_config)
        self.profile_writer = create_profile_writer(self, self._vllm_config)
        for line in self.describe():
            compat.logger().info("expert_prefetch: %s", line)

    def _verify(self) -> None:
        """Raise ConfigError or TakeoverError where a step would not read the rows that took the experts' place."""
        if self.caches and self.caches.on_device:
            check_tells_padding(self._vllm_config)
        for layer in self.layers:
            if layer.cache is not None:
                verify_rows(layer, layer.expert_tensors, layer.local_num_experts)

    def _prove(self) -> None:
        """Raise TakeoverError where copies are not whole, or the kernel's bits depend on rows."""
        if self.config.self_check == "on":
            prove([layer for layer in self.layers if layer.cache is not None], self._renew)
        else:
            compat.logger().warning("expert_prefetch: self_check is off: NOTHING is proved of copies and kernels here")

    def _measure_prompt_step(self, link_rate: float) -> PromptStep | None:
        served = [layer for layer in self.layers if layer.cache is not None]
        most = self._vllm_config.scheduler_config.max_num_batched_tokens
        return measure_prompt_step(served, link_rate, most) if served else None

    def step_begins(self, num_prefilling: int, num_decoding: int, continues: bool) -> None:
        """An engine step begins; see `StepClock.begin`."""
        assert self.publisher is not None
        self.is_in_step = True
        self._num_decoding = num_decoding
        if self.traces is not None:
            self.traces.begin_step(num_prefilling, num_decoding)
        self.publisher.step_begins(num_prefilling, num_decoding, continues)

    def step_ended(self) -> None:
        """The engine step that began is over."""
        self.is_in_step = False
        if self.publisher is None:
            return
        self.publisher.step_ended()
        if self.traces is not None:
            self.traces.end_step(self.publisher.clock.seconds)
        if self.profile_writer is not None:
            self.profile_writer.step_ended()
        if self._warm_start is not None and self._warm_start.end_step(self._num_decoding):
            link_rate = self.publisher.counters.get("link_bytes_per_second")
            compat.logger().info("expert_prefetch: %s", self._warm_start.describe(link_rate))
            self._watch_warm_start(None)

    def _watch_warm_start(self, warm_start: WarmStart | None) -> None:
        self._warm_start = warm_start
        for layer in self.layers:
            layer.warm_start = warm_start

    def _look_ahead(self, model: torch.nn.Module, link_rate: float) -> LookAhead | None:
        look_ahead, self.prefetch = create_look_ahead_of(
            *(model, self.layers, self.config, self.caches, link_rate, self.sizes.areas > 1),
            compat.breaks_graphs(self._vllm_config),
        )
        if look_ahead is not None:
            look_ahead.num_layers = self.num_layers
        self.execution = describe_execution(self.config, look_ahead, len(self._layers), self.prefetch)
        for layer in self.layers:
            layer.look_ahead = look_ahead
        return look_ahead

    def describe(self) -> list[str]:
        """The lines of the start: what is offloaded, how it is served, what was proved, where to look."""
        layers, slots = self.layers, sorted(set(self.sizes.slots))
        experts = sorted({layer.local_num_experts for layer in layers})
        store, private, shared = self._host_bytes(), self._private_bytes(), self._overflow_bytes()
        share = 100 * sum(self.sizes.slots) / sum(layer.local_num_experts for layer in layers)
        num_served = sum(layer.cache is not None for layer in layers)
        most = self._vllm_config.scheduler_config.max_num_batched_tokens
        prompts = [self._prompt_step.describe(most)] if self._prompt_step else []
        return [
            f"{len(layers)} MoE layers x {span(experts)} experts, {span(slots)} slots each: {private / GB:.4g} GB "
            f"cache ({share:.0f} % of the experts), {shared / GB:.4g} GB overflow rows"
            f"{' in two areas' if shared and self.sizes.areas == 2 else ''}; on the host {store / GB:.4g} GB, "
            f"{'page-locked' if self._is_pinned() else 'pageable'}{self._sharing()}",
            f"policy {self.config.policy}, execution {self.execution}, prefetch {self.prefetch}{self._depth()}; kernel "
            f"{self._kernels()} of {self._quant_methods()}, engine {self._engine_name()}, link "
            f"{self._link() or 'not emulated'}; sized by {self.sizes.description}",
            f"proved: all {len(layers)} MoE layers were taken over, {num_served} read their row spaces, no other copy "
            "of their experts can be reached" + (f", {self._proved()}" if num_served else ""),
            *prompts,
            "look: vllm_expert_prefetch_* on the server's /metrics, or vllm-expert-prefetch top URL",
        ]

    def _sharing(self) -> str:
        store = self._shared_store
        if store is None:
            return ""
        return f", in the shared store {store.name}: {store.num_found} layers found there, {store.num_made} added"

    def _depth(self) -> str:
        look_ahead = self.layers[0].look_ahead
        return f", up to {look_ahead.depth} layers ahead" if look_ahead and look_ahead.depth > 1 else ""

    def _publish(self, look_ahead: LookAhead | None, link_rate: float) -> Publisher:
        layers = self.layers
        names = [short_name(layer.layer_name, layer.number) for layer in layers]
        info = {
            "execution": self.execution,
            "policy": self.config.policy,
            "prefetch": self.prefetch,
            "lookahead_layers": str(look_ahead.depth if look_ahead else 0),
            "areas": str(self.sizes.areas if self.caches else 0),
            "link": str(self._link() or "real"),
            "pinned": str(self._is_pinned()).lower(),
            "store": "private" if self._shared_store is None else "shared",
            "kernel": self._kernels(),
            "quant_method": self._quant_methods(),
            "self_check": "off" if self.config.self_check == OFF else "passed" if self.caches else "not needed",
            "platform": "cuda" if self.host_memory.cuda else "cpu",
            "version": __version__,
            "vllm_version": compat.vllm_version(),
        }
        path, labels = place_of(self._vllm_config)
        counters = Counters(path, labels, info, names if self.config.metrics_per_layer else ())
        num_experts = sum(layer.local_num_experts for layer in layers)
        planned = self.config.planned_hit_rate
        gauges = {
            "moe_layers": len(layers),
            "experts": num_experts,
            "slots": sum(self.sizes.slots),
            "host_store_bytes": self._host_bytes(),
            "cache_bytes": self._private_bytes(),
            "overflow_bytes": self._overflow_bytes(),
            "expert_record_bytes": self._host_bytes() / num_experts,
            "link_bytes_per_second": link_rate,
            "planned_hit_ratio": sum(self.sizes.slots) / num_experts if planned is None else planned,
            "lookahead_enabled": look_ahead is not None,
        }
        for name, value in gauges.items():
            counters.set(name, value)
        if self.config.metrics_port is not None:
            serve_counters(counters, self.config.metrics_port + compat.local_rank())
        return Publisher(counters, self.caches, look_ahead, names)

    def _proved(self) -> str:
        if self.config.self_check == "on":
            return "copies are whole, and the kernel gives the same bits whatever rows they are in"
        return "NOT copies and kernels: self_check is off"

    def _link(self) -> EmulatedLink | None:
        gbps = self.config.emulated_link_gbps
        return None if gbps is None else EmulatedLink(gbps, self.config.emulated_link_latency_us)

    def _engine_name(self) -> str:
        return self.caches.engine_name if self.caches else "none: every expert is resident"

    def _kernels(self) -> str:
        return ", ".join(sorted({compat.kernel_name(layer.quant_method) for layer in self.layers}))

    def _quant_methods(self) -> str:
        return ", ".join(sorted({type(layer.quant_method).__name__ for layer in self.layers}))

    def _is_pinned(self) -> bool:
        return all(layer.cache.store.is_pinned for layer in self.layers if layer.cache is not None)

    def _host_bytes(self) -> int:
        return sum(layer.cache.store.num_bytes for layer in self.layers if layer.cache is not None)

    def _private_bytes(self) -> int:
        return sum(int(shared.private_bytes) for shared, _ in self._groups.values())

    def _overflow_bytes(self) -> int:
        return sum(int(shared.num_bytes) for shared, _ in self._groups.values())


def worker_of(vllm_config: Any) -> Worker | None:
    """The worker of the model that is being built with this very configuration object; None where it asks for none."""
    worker, config = find_worker(vllm_config), config_of(vllm_config)
    if worker is None and config is not None:
        worker = _workers[id(vllm_config)] = Worker(vllm_config, config)
    return worker


def find_worker(vllm_config: Any) -> Worker | None:
    """The worker that `worker_of` has made for this configuration object, if it has."""
    return _workers.get(id(vllm_config))
