"""vLLM's routed experts, served from an expert cache."""

import weakref
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_expert_prefetch.cache.base import LayerCache
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.planning.warm_start import WarmStart
from vllm_expert_prefetch.prediction.base import Signals
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.adapters import choose_kernel_as_without_adapters
from vllm_expert_prefetch.serving.block_order import blocks_by_expert, depends_on_order
from vllm_expert_prefetch.serving.drafts import is_being_built, worker_being_built
from vllm_expert_prefetch.serving.expert_share import ExpertShare, own_experts, take_share
from vllm_expert_prefetch.serving.expert_tensors import (
    ExpertTensor,
    TakeoverError,
    check_weights_are_among,
    find_expert_tensors,
    leave_where_it_is,
    unprocessed_row_bytes,
)
from vllm_expert_prefetch.serving.refusals import check_kernel, check_layer_refusals
from vllm_expert_prefetch.serving.speculation import execute_instead
from vllm_expert_prefetch.serving.takeover import CANNOT_RELOAD, replace_rows
from vllm_expert_prefetch.serving.worker import worker_of
from vllm_expert_prefetch.tracing.recorder import Recorder


class CachedRoutedExperts(RoutedExperts):
    """The part common to every replacement; `replacement_of` joins it with one of vLLM's classes.

    Keeps vLLM's loading, post-processing and kernels; owns where the experts are.

    The parameters are created on the host and loaded there. When vLLM has post-processed the layer, its tensors move to
    the host store, and the row space takes their place for good. `forward_modular` then asks the cache for the row of
    each routed expert, and calls the same kernel with rows in place of experts. A layer that finds the plugin not asked
    for becomes vLLM's own class; one whose experts all have a slot computes as that class does.
    """

    _loaded: dict[tuple[str, str], dict[int, torch.Size]]
    """Expert tensor and shard -> expert -> shape in the checkpoint."""
    expert_tensors: dict[str, ExpertTensor]
    """Those whose rows the cache replaces, once it has."""
    vllm_class: type[RoutedExperts] = RoutedExperts
    """The class that this one stands in for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        worker = worker_being_built() if is_being_built() else worker_of(get_current_vllm_config())
        if worker is None:
            vllm_class = self.vllm_class
            self.__class__ = vllm_class
            vllm_class.__init__(self, *args, **kwargs)
            return
        compat.check_version(compat.vllm_version(), compat.on_cpu_platform())
        self.accelerator = torch.get_default_device()
        # Here and not later: vLLM's constructor hands out the weight loader. Plain Python: no module attribute yet.
        object.__setattr__(self, "_loaded", {})
        choose_kernel_as_without_adapters((*args, *kwargs.values()))
        with torch.device("cpu"):
            super().__init__(*args, **kwargs)
        check_layer_refusals(self.layer_name, self.quant_method)
        self.is_taken_over = False
        self._depends_on_order = False
        self.cache: LayerCache | None = None
        """None before the takeover, and where every expert is resident."""
        self.look_ahead: LookAhead | None = None
        self.recorder: Recorder | None = None
        """Notes what is routed, while that is asked for."""
        self.recorded_number = 0
        """Among the layers that are recorded."""
        self.warm_start: WarmStart | None = None
        """Finds out what a profile gains, over the first tokens."""
        self.unprocessed_row_bytes = unprocessed_row_bytes(self, self.local_num_experts)
        self.share: ExpertShare | None = None
        """Which experts are this rank's, under expert parallelism; there once the layer is taken over."""
        # Plain Python: the module must not see these tensors a second time.
        object.__setattr__(self, "expert_tensors", {})
        self.worker = worker
        self.number = self.worker.register(self)
        self._take_over_after_post_processing()

    def _take_over_after_post_processing(self) -> None:
        """vLLM calls the quant method once per layer when its weights are complete: the last moment that is ours.

        A layer that it quantises while it loads is complete amid loading; it asks again when all are, for nothing.
        """
        post_process = self.quant_method.process_weights_after_loading

        def post_process_and_take_over(layer: torch.nn.Module) -> None:
            if self.is_taken_over:
                if compat.is_post_processed(layer):
                    return
                raise TakeoverError(CANNOT_RELOAD)
            self._check_loaded()
            post_process(layer)
            self._take_over()

        self.quant_method.process_weights_after_loading = post_process_and_take_over

    def _take_over(self) -> None:
        check_kernel(self.layer_name, self.quant_method)
        self.share = take_share(self, self.accelerator)
        found = find_expert_tensors(self, self.local_num_experts)
        check_weights_are_among(self, found)
        tensors = {name: tensor.rows for name, tensor in found.items()}
        num_slots = self.worker.num_slots_of(self, tensors)
        if num_slots == self.local_num_experts:
            leave_where_it_is(self)
        else:
            store = HostStore(tensors, self.worker.host_memory, True, self.worker.shared_memory_of(self))
            tensors.clear()
            self.cache = self.worker.create_cache(self, store, num_slots)
            # The worker leads to the whole model: looked through once for layers of a kind, not once for each layer.
            kind = type(self.quant_method)
            is_first = not any(
                layer.is_taken_over and isinstance(layer.quant_method, kind) for layer in self.worker.layers
            )
            replace_rows(self, found, self.cache.tensors, (store,) if is_first else (store, self.worker))
            self.expert_tensors.update(found)
            self._depends_on_order = depends_on_order(self.quant_method)
        self.is_taken_over = True
        self.register_buffer("_handle", _register(self), persistent=False)  # not before: vLLM counts what it loads
        self.worker.layer_taken_over()

    def become_resident(self) -> None:
        """The row space has a slot for every expert: fill it, and compute as vLLM's own class from here on."""
        assert self.cache is not None
        for name, view in self.cache.store.views.items():
            self.cache.tensors[name].copy_(view)
        self.cache = None

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None,
        return_success: bool = False,
    ) -> Any:
        """vLLM's own, noting what has come from the checkpoint where it comes one expert at a time."""
        self.worker.loading_begins()
        if expert_id is not None and loaded_weight.dim() < 3:
            self._loaded.setdefault((_name_of(self, param), shard_id), {})[expert_id] = loaded_weight.shape
        load: Any = super().weight_loader
        return load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

    def _check_loaded(self) -> None:
        """vLLM does not notice single experts that are missing or too small: it serves uninitialised memory there."""
        for (name, shard_id), shapes in self._loaded.items():
            usual = max(shapes.values(), key=list(shapes.values()).count)
            wrong = [expert for expert in own_experts(self) if shapes.get(expert) != usual]
            if wrong:
                found = {expert: tuple(shapes[expert]) if expert in shapes else "missing" for expert in wrong}
                raise TakeoverError(
                    f"expert_prefetch: the checkpoint is damaged: {self.layer_name}, {name} ({shard_id}): expected "
                    f"{tuple(usual)} for each of {self.local_num_experts} experts, found {found}"
                )

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, before the takeover; TakeoverError afterwards: the rows are not the experts."""
        if self.is_taken_over:
            raise TakeoverError(CANNOT_RELOAD)
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

        Shared experts were computed by vLLM's runner: its only kernels that compute them here need data parallelism.
        """
        if self.is_taken_over and self.cache is None:
            if self.share is None:
                return super().forward_modular(x, topk_weights, topk_ids)
            own_ids = self.share.local(topk_ids)
            return self.compute(x, topk_weights, own_ids, own_ids)
        if torch.compiler.is_compiling():
            return torch.ops.expert_prefetch.routed_experts(x, topk_weights, topk_ids, self._handle)
        return self.run_step(x, topk_weights, topk_ids)

    def run_step(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """One step of this layer, outside any compiled graph. Shapes as in `forward_modular`."""
        if self.cache is None:
            raise TakeoverError(
                f"expert_prefetch: {self.layer_name} was asked to compute before its weights were taken over"
            )
        rows = compat.rows_of(x)
        if isinstance(rows, int) and rows == 0:  # a dummy or profile run: the right shapes and load, nothing to serve
            if self.worker.is_in_step:
                raise TakeoverError(
                    f"expert_prefetch: {self.layer_name} finds no token in a step that has some: how vLLM "
                    f"{compat.vllm_version()} tells them is not known. Serve without the plugin, and please report it"
                )
            own_ids = self.cache.local(topk_ids)
            return self.compute(x, topk_weights, own_ids, own_ids)
        look_ahead, routed = self.look_ahead, None
        guess = look_ahead.to_execute(self.number, rows) if look_ahead and look_ahead.speculated_layers else None
        if guess is not None:
            routed = Signals(x, topk_ids, topk_weights)
            topk_weights, topk_ids = execute_instead(guess, topk_weights, topk_ids)
        own_ids = self.cache.local(topk_ids)
        if self.recorder is not None:
            self.recorder.note(self.recorded_number, topk_ids, rows, topk_weights)
        if self.warm_start is not None:
            self.warm_start.note(self.number, own_ids.numpy()[:rows])
        row_ids = self.cache.serve(own_ids, rows, guess is not None)
        if look_ahead is not None:
            look_ahead.after(self.number, Signals(x, topk_ids, topk_weights), rows, routed)
        return self.compute(x, topk_weights, own_ids, row_ids)

    def compute(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, row_ids: torch.Tensor
    ) -> torch.Tensor:
        """What vLLM's kernel gives with the expert of each id of `topk_ids` (T, K) in the row of `row_ids` (T, K).

        Under expert parallelism ids are numbers among this rank's experts, negative for those of other ranks.
        """
        if self.share is not None:
            topk_weights, topk_ids, row_ids = self.share.without_others(topk_weights, topk_ids, row_ids)
        if not self._depends_on_order:
            return self._compute(x, topk_weights, row_ids)
        with blocks_by_expert(topk_ids, row_ids):
            return self._compute(x, topk_weights, row_ids)

    def _compute(self, x: torch.Tensor, topk_weights: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
        """vLLM's kernel, for which rows are what experts are to it."""
        return self.quant_method.apply(  # the deferred form is for kernels that are refused
            layer=self,
            x=x,
            topk_weights=topk_weights,
            topk_ids=row_ids,
            shared_experts=None,
            shared_experts_input=None,
        )


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
