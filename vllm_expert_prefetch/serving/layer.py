"""vLLM's routed experts, served from a slot cache."""

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_expert_prefetch.config import config_from_additional
from vllm_expert_prefetch.experts import DeviceLayerCache, HostStore, LayerCache, SlotPool, Step
from vllm_expert_prefetch.metrics.counters import layer_start
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX
from vllm_expert_prefetch.planning.sizing import CacheSize
from vllm_expert_prefetch.prediction import Signals
from vllm_expert_prefetch.residency import Split
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.cache_factory import CacheFactory
from vllm_expert_prefetch.serving.deployment import deployment_of
from vllm_expert_prefetch.serving.device_lookahead import LookFrom
from vllm_expert_prefetch.serving.device_step import DeviceStep
from vllm_expert_prefetch.serving.execution import Executor, Kernel
from vllm_expert_prefetch.serving.lookahead import LookAhead
from vllm_expert_prefetch.serving.refusals import check_layer_refusals
from vllm_expert_prefetch.serving.speculation import execute_instead
from vllm_expert_prefetch.serving.takeover import TakeoverError, expert_parameters, swap_in_slots

_HIT = INDEX["lookups_total/hit"]
_LATE = INDEX["lookups_total/late"]
_MISS = INDEX["lookups_total/miss"]
_SPECULATED = INDEX["lookups_total/speculated"]
_DEMAND_BYTES = INDEX["transfer_bytes_total/demand"]
_STREAM_BYTES = INDEX["transfer_bytes_total/stream"]
_TRANSFER_SECONDS = INDEX["transfer_seconds_total"]
_STALL_SECONDS = INDEX["stall_seconds_total"]
_EVICTIONS = INDEX["evictions_total"]
_LAYER_HIT = LAYER_INDEX["layer_lookups_total/hit"]
_LAYER_LATE = LAYER_INDEX["layer_lookups_total/late"]
_LAYER_MISS = LAYER_INDEX["layer_lookups_total/miss"]
_LAYER_SPECULATED = LAYER_INDEX["layer_lookups_total/speculated"]
_LAYER_STALL = LAYER_INDEX["layer_stall_seconds_total"]
_WAVES = {int(split): INDEX[f"waves_total/{split.name.lower()}"] for split in Split}


class CachedRoutedExperts(RoutedExperts):
    """The part common to every replacement; `replacement_of` joins it with one of vLLM's classes.

    Keeps vLLM's loading, post-processing and kernels; owns where the experts are.

    The parameters are created on the host and loaded there. When vLLM has post-processed the layer, its tensors move to
    the host store and C-slot tensors take their place; `forward_modular` then plans, stages, maps expert ids to slots
    and calls the same kernel. A layer that finds the plugin not asked for becomes vLLM's own class.
    """

    _loaded: dict[tuple[str, str], dict[int, torch.Size]]
    """Expert tensor and shard -> expert -> shape in the checkpoint."""
    vllm_class: type[RoutedExperts] = RoutedExperts
    """The class that this one stands in for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_config = get_current_vllm_config()
        config = config_from_additional(vllm_config.additional_config)
        if config is None:
            vllm_class = self.vllm_class
            self.__class__ = vllm_class  # type: ignore[assignment]
            vllm_class.__init__(self, *args, **kwargs)
            return
        compat.check_version(compat.vllm_version(), compat.on_cpu_platform())
        device = torch.get_default_device()
        # Here and not later: vLLM's constructor hands out the weight loader. Plain Python: no module attribute yet.
        object.__setattr__(self, "_loaded", {})
        with torch.device("cpu"):
            super().__init__(*args, **kwargs)
        check_layer_refusals(self.layer_name, self.quant_method)
        self.is_taken_over = self.is_fully_resident = False
        self.device_cache: DeviceLayerCache | None = None
        self._device_step: DeviceStep | None = None
        self.look_from: LookFrom | None = None
        self.look_ahead: LookAhead | None = None
        self.num_experts = self.local_num_experts
        self.expert_bytes = sum(p.nbytes for p in expert_parameters(self, self.num_experts).values())
        self.accelerator = device
        self._tiles: dict[int, dict[str, int]] = {}
        self.deployment = deployment_of(vllm_config, config)
        self._number = len(self.deployment.layers)
        self.deployment.layers.append(weakref.ref(self))
        self.register_buffer("_handle", _register(self), persistent=False)
        self._take_over_after_post_processing()

    def _take_over_after_post_processing(self) -> None:
        """vLLM calls the quant method once per layer when its weights are complete: the last moment that is ours."""
        post_process = self.quant_method.process_weights_after_loading

        def post_process_and_take_over(layer: torch.nn.Module) -> None:
            if self.is_taken_over:
                raise TakeoverError("expert_prefetch: weights cannot be reloaded; restart the server instead")
            self._check_loaded()
            post_process(layer)
            self._take_over()

        self.quant_method.process_weights_after_loading = post_process_and_take_over  # type: ignore[method-assign]

    def _take_over(self) -> None:
        deployment = self.deployment
        tensors = {name: p.data for name, p in expert_parameters(self, self.num_experts).items()}
        resident_bytes = sum(t.nbytes for t in tensors.values() if t.device.type != "cpu")
        size = deployment.size_for(self, resident_bytes)
        self.store = HostStore(tensors, deployment.host_memory)
        tensors.clear()
        pool = SlotPool(self.store.views, size.num_slots, self.accelerator)
        swap_in_slots(self, pool.tensors)
        self.pool = pool
        self._use(pool)
        self.start_cache(deployment.caches, size)
        self.is_taken_over = True
        self.is_fully_resident = size.num_slots == self.num_experts
        deployment.layer_taken_over()

    def start_cache(self, caches: CacheFactory, size: CacheSize) -> None:
        """Begin with the first experts in the slots, as `caches` plans and stages.

        Whatever was there is given up: a lane that may still copy into the slots must be closed before.
        """
        deployment = self.deployment
        buffer = deployment.stream_buffer(self.store, self.accelerator) if size.stream_buffer else None
        buffer_kernel = self._kernel_on(buffer) if buffer else None
        if caches.decides_on_gpu:
            self.device_cache = caches.device_cache(self, buffer)
            waves = deployment.config.max_token_waves
            self._device_step = DeviceStep(self.device_cache, self._kernel, buffer_kernel, waves)
        else:
            self.cache = caches.layer_cache(self, size, seed=self._number)
            self.executor = Executor(self.num_experts, self.cache.staging, self._kernel, buffer, buffer_kernel)
            self.cache.fill()

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> Any:
        """vLLM's own, noting what has come from the checkpoint where it comes one expert at a time."""
        if loaded_weight.dim() < 3:
            self._loaded.setdefault((_name_of(self, param), shard_id), {})[expert_id] = loaded_weight.shape
        load: Any = super().weight_loader
        return load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    @property
    def residence(self) -> LayerCache | DeviceLayerCache:
        """What knows who is in the slots."""
        return self.cache if self.device_cache is None else self.device_cache

    def _check_loaded(self) -> None:
        """vLLM does not notice single experts that are missing or too small: it serves uninitialised memory there."""
        for (name, shard_id), shapes in self._loaded.items():
            usual = max(shapes.values(), key=list(shapes.values()).count)
            wrong = [expert for expert in range(self.num_experts) if shapes.get(expert) != usual]
            if wrong:
                found = {expert: tuple(shapes[expert]) if expert in shapes else "missing" for expert in wrong}
                raise TakeoverError(
                    f"expert_prefetch: the checkpoint is damaged: {self.layer_name}, {name} ({shard_id}): expected "
                    f"{tuple(usual)} for each of {self.num_experts} experts, found {found}"
                )

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, before the takeover; TakeoverError afterwards: the slots are not the experts."""
        if self.is_taken_over:
            raise TakeoverError("expert_prefetch: weights cannot be reloaded; restart the server instead")
        return super().load_weights(*args, **kwargs)

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The routed output (T, H) for `x` (T, H), `topk_weights` (T, K) float32 and `topk_ids` (T, K), expert ids.

        With a slot for every expert, expert e sits in slot e for good: vLLM's own path, nothing to look up or count.
        Shared experts were computed by vLLM's runner: its only kernels that compute them here need expert parallelism.
        """
        if self.is_fully_resident:
            return super().forward_modular(x, topk_weights, topk_ids)  # type: ignore[return-value]
        if self._device_step is not None:
            with self._tiles_as_if_resident(x.shape[0]):
                return self._device_step.run(x, topk_weights, topk_ids, self.look_from)
        if torch.compiler.is_compiling():
            return torch.ops.expert_prefetch.routed_experts(x, topk_weights, topk_ids, self._handle)
        return self.run_step(x, topk_weights, topk_ids)

    def run_step(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """One step of this layer, in Python: plan, stage, compute, count. Shapes as in `forward_modular`."""
        if not self.is_taken_over:
            raise TakeoverError(
                f"expert_prefetch: {self.layer_name} was asked to compute before its weights were taken over"
            )
        num_tokens = compat.num_real_tokens(x.shape[0])
        if num_tokens == 0:  # a dummy or profile run: the right shapes and load, no residency, no counters
            return self._kernel(x, topk_weights, topk_ids % self.pool.num_slots)
        routed = None
        guess = None if self.look_ahead is None else self.look_ahead.to_execute(self._number, num_tokens)
        if guess is not None:
            routed = Signals(x[:num_tokens], topk_ids[:num_tokens], topk_weights[:num_tokens])
            topk_weights, topk_ids = execute_instead(guess, topk_weights, topk_ids)
        step = self.cache.serve(topk_ids, num_tokens)
        if self.look_ahead is not None:
            executed = Signals(x, topk_ids, topk_weights)
            if num_tokens < x.shape[0]:
                executed = Signals(x[:num_tokens], topk_ids[:num_tokens], topk_weights[:num_tokens])
            self.look_ahead.after_staging(self._number, step, executed, routed)
        with self._tiles_as_if_resident(x.shape[0]):
            if step.slot_ids is not None:
                output = self._kernel(x, topk_weights, step.slot_ids)
            else:
                output, step = self.executor.run(step, x, topk_weights, topk_ids)
        self._count(step, is_speculated=guess is not None)
        return output

    def _tiles_as_if_resident(self, num_rows: int) -> AbstractContextManager[None]:
        """On a GPU, every row is computed with the tiles that vLLM would choose for the whole step with all E experts:
        the same sums in the same order, whatever the number of slots and waves."""
        if self.accelerator.type != "cuda":
            return nullcontext()
        if num_rows not in self._tiles:
            w13, w2 = (tuple(self.store.views[name].shape) for name in ("w13_weight", "w2_weight"))
            self._tiles[num_rows] = compat.tiles_of(w13, w2, self.top_k, num_rows)
        return compat.fixed_tiles(self._tiles[num_rows])

    def _kernel(self, x: torch.Tensor, topk_weights: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(  # type: ignore[return-value]  # the deferred form is for kernels that are refused
            layer=self,
            x=x,
            topk_weights=topk_weights,
            topk_ids=slot_ids,
            shared_experts=None,
            shared_experts_input=None,
        )

    def _kernel_on(self, buffer: SlotPool) -> Kernel:
        """The same kernel on the stream buffer. Biases are held by reference inside kernels, hence the swap of data."""

        def kernel(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
            self._use(buffer)
            try:
                return self._kernel(x, topk_weights, topk_ids)
            finally:
                self._use(self.pool)

        return kernel

    def _use(self, pool: SlotPool) -> None:
        for name, tensor in pool.tensors.items():
            getattr(self, name).data = tensor
        self.global_num_experts = self.local_num_experts = pool.num_slots  # what the kernel is told

    def _count(self, step: Step, is_speculated: bool) -> None:
        add = self.deployment.counters.add
        num_lookups = step.num_hits + step.num_late + step.num_misses
        hits, late, misses, speculated = (
            (0, 0, 0, num_lookups) if is_speculated else (step.num_hits, step.num_late, step.num_misses, 0)
        )
        add(_HIT, hits)
        add(_WAVES[step.split], step.num_waves)
        if speculated:
            add(_SPECULATED, speculated)
        if late:
            add(_LATE, late)
        if misses:
            add(_MISS, misses)
        if step.num_evictions:
            add(_EVICTIONS, step.num_evictions)
        if step.num_bytes:
            add(_STREAM_BYTES if step.split == Split.STREAM else _DEMAND_BYTES, step.num_bytes)
            add(_TRANSFER_SECONDS, step.stall_seconds - step.late_seconds)
        if step.stall_seconds:
            add(_STALL_SECONDS, step.stall_seconds)
        if self.deployment.counters.layers:
            start = layer_start(self._number)
            add(start + _LAYER_HIT, hits)
            add(start + _LAYER_LATE, late)
            add(start + _LAYER_MISS, misses)
            add(start + _LAYER_SPECULATED, speculated)
            add(start + _LAYER_STALL, step.stall_seconds)


def _name_of(layer: torch.nn.Module, parameter: torch.nn.Parameter) -> str:
    return next((name for name, own in layer.named_parameters(recurse=False) if own is parameter), "expert tensor")


def replacement_of(vllm_class: type[RoutedExperts]) -> type[CachedRoutedExperts]:
    """The class that serves in place of `vllm_class`, which is RoutedExperts or a model's own subclass of it."""
    if vllm_class is RoutedExperts:
        return CachedRoutedExperts
    return type(f"Cached{vllm_class.__name__}", (CachedRoutedExperts, vllm_class), {"vllm_class": vllm_class})


def can_replace(vllm_class: type[RoutedExperts]) -> bool:
    """Whether `vllm_class` only changes how weights are loaded: one that computes in its own way is left alone."""
    return (
        not issubclass(vllm_class, CachedRoutedExperts) and vllm_class.forward_modular is RoutedExperts.forward_modular
    )


# torch.compile on the CPU platform traces through vLLM's MoE layers; planning must stay outside the graph. Layers are
# passed as a number in a tensor: a name in the graph would make every layer's subgraph a different one.
_layers: "weakref.WeakValueDictionary[int, CachedRoutedExperts]" = weakref.WeakValueDictionary()
_num_registered = 0


def _register(layer: CachedRoutedExperts) -> torch.Tensor:
    global _num_registered
    _num_registered += 1
    _layers[_num_registered] = layer
    return torch.tensor(_num_registered, device="cpu")


def _routed_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, handle: torch.Tensor
) -> torch.Tensor:
    return _layers[int(handle.item())].run_step(x, topk_weights, topk_ids)


def _routed_experts_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, handle: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("expert_prefetch", "FRAGMENT")
_library.define(
    "routed_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor handle) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.impl("routed_experts", _routed_experts, "CompositeExplicitAutograd")
torch.library.register_fake("expert_prefetch::routed_experts", _routed_experts_fake, lib=_library)
