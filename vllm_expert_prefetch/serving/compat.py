"""Every name of vLLM that may move between releases, in one place, and the range of releases that was read."""

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from packaging.version import Version

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError

if TYPE_CHECKING:
    import torch

    from vllm_expert_prefetch.cache.base import Caches

LOWEST, LOWEST_ON_CPU, BEYOND = Version("0.26"), Version("0.30"), Version("0.34")
SUPPORTED = f"{LOWEST} to 0.33 on a GPU, {LOWEST_ON_CPU} to 0.33 on CPU"


def vllm_version() -> str:
    """The version of the vLLM that is imported, whatever its distribution is called."""
    from vllm.version import __version__

    return str(__version__)


def check_version(version: str, on_cpu: bool) -> None:
    """Raise ConfigError for a vLLM whose seams nobody has read."""
    release = Version(Version(version).base_version)
    if not (LOWEST_ON_CPU if on_cpu else LOWEST) <= release < BEYOND:
        raise ConfigError(
            f"{CONFIG_KEY}: vLLM {version} is not supported. Supported: {SUPPORTED}. Install one of these, or serve "
            "without the plugin"
        )


def logger() -> Any:
    """A logger below vLLM's own, so that its handlers and level apply."""
    from vllm.logger import init_logger

    return init_logger("vllm.expert_prefetch")


def platform_class() -> type:
    """The class of vLLM's current platform. Detecting it initialises no CUDA."""
    from vllm.platforms import current_platform

    return type(current_platform)


def on_cpu_platform() -> bool:
    """Whether vLLM computes on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def on_cuda_platform() -> bool:
    """Whether vLLM computes on an NVIDIA GPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def measures_memory() -> bool:
    """Whether vLLM measures what a model needs before it decides how large its KV cache is: on a GPU."""
    return on_cuda_platform()


def kernel_name(quant_method: Any) -> str:
    """vLLM's name of the class that computes a layer's experts: of its quantisation method where there is no kernel."""
    kernel = getattr(quant_method, "moe_kernel", None)
    return type(quant_method if kernel is None else kernel.fused_experts).__name__


def quantises_while_loading(quant_method: Any) -> bool:
    """Whether a layer is complete, and post-processed, before the model's other weights are loaded."""
    return bool(getattr(quant_method, "uses_meta_device", False))


def online_quantization(model_config: Any) -> str | None:
    """vLLM's name of what it makes of unquantised experts while it loads them; None where it does not, or has none."""
    from vllm.config import quantization

    asked = getattr(getattr(model_config, "quantization_config", None), "moe", None)
    for name, made in quantization._ONLINE_SHORTHANDS.items():
        if asked is not None and made.moe is not None and made.moe.weight == asked.weight:
            return str(name)
    return None


def is_post_processed(layer: Any) -> bool:
    """Whether vLLM has noted that a layer which it quantises while it loads is done; it forgets that on a reload."""
    done = getattr(layer, "_already_called_process_weights_after_loading", False)
    return bool(done) and quantises_while_loading(layer.quant_method)


def ignores_correction_bias(router: Any) -> bool:
    """Whether vLLM's router has a correction bias that it does not read: without groups, that of the CPU platform."""
    reads_it = getattr(router, "use_grouped_topk", False) or getattr(router, "scoring_func", "") == "sqrtsoftplus"
    return type(router).__name__ == "CPURouter" and not reads_it


def compute_capability() -> int:
    """Of the first GPU, 89 for 8.9. Starts no CUDA context."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return 0 if capability is None else int(capability.to_int())


def rows_of(x: "torch.Tensor") -> "int | torch.Tensor":
    """Which of a step's rows (T, H) are tokens: the rest is padding, and a dummy or profile run has none.

    On the CPU platform the number of tokens, which are the first rows. On a GPU int64 (T), where the KV cache takes
    each row's token, negative for padding: a tensor that vLLM fills before every step, also before a captured one is
    replayed.
    """
    return _rows_on_gpu(_forward_context(), x) if x.is_cuda else num_real_tokens(x.shape[0])


def _forward_context() -> Any:
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return get_forward_context() if is_forward_context_available() else None


def num_real_tokens(num_rows: int) -> int:
    """How many of a step's `num_rows` rows are tokens, which are the first ones; 0 in a dummy or profile run."""
    context = _forward_context()
    metadata = context.attn_metadata if context else None
    if not isinstance(metadata, dict) or not metadata:  # a list belongs to dual-batch overlap, which is refused
        return 0
    first = next(iter(metadata.values()))
    return min(num_rows, getattr(first, "num_actual_tokens", num_rows))


def _rows_on_gpu(context: Any, x: "torch.Tensor") -> "torch.Tensor":
    """What `_slots_of_rows` gives, found once for all layers: vLLM makes a context for each forward pass."""
    rows: torch.Tensor | None = getattr(context, "expert_prefetch_rows", None)
    if rows is None or len(rows) != len(x):
        rows = _slots_of_rows(context, x)
        if context is not None:
            context.expert_prefetch_rows = rows
    return rows


def _slots_of_rows(context: Any, x: "torch.Tensor") -> "torch.Tensor":
    import torch

    mappings = context.slot_mapping if context else None
    if isinstance(mappings, dict):  # a list belongs to dual-batch overlap, which is refused
        for name, mapping in mappings.items():
            if _has_kv_slots(context.no_compile_layers.get(name)):
                return mapping[: x.shape[0]]
    return torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)


def _has_kv_slots(layer: Any) -> bool:
    """Whether vLLM writes the slot mapping of this layer: it does not for recurrent states."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    return not isinstance(layer, MambaBase)


def tells_padding(vllm_config: Any) -> bool:
    """Whether a GPU can tell a step's tokens from padding: by the slot mapping of an attention layer, of which the
    model, once it is built, must have one.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = vllm_config.compilation_config.static_forward_context.values()
    return any(isinstance(layer, AttentionLayerBase) and _has_kv_slots(layer) for layer in layers)


def gives_padding_no_expert() -> bool:
    """Whether plain vLLM routes rows of padding to -1, so that its kernels must take that: on a GPU, since 0.30."""
    return on_cuda_platform() and Version(Version(vllm_version()).base_version) >= Version("0.30")


def allow_amx() -> None:
    """Ask Linux for AMX, where the processor has it.

    vLLM's CPU attention (0.32) uses it and does not ask, which ends the process with an illegal instruction.
    """
    import torch

    ask = getattr(torch.cpu, "_init_amx", None)
    if ask is not None:
        ask()


def request_names(runner: Any) -> list[str]:
    """The requests of the step that `runner` has executed, in the order of its tokens; empty where it does not tell.

    vLLM sorts them in other ways than its scheduler. Its second runner has them until it samples.
    """
    batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
    batch = getattr(runner, "input_batch", None) if batch is None else batch
    return [*getattr(batch, "req_ids", ())]


def install_offloader(caches: "Caches", beside_others: bool = False) -> None:
    """Have vLLM join `caches` before it captures or replays a CUDA graph, and before a capture ends.

    It keeps the offloader beyond the engine, which does not keep `caches` alive. `beside_others`: and what was
    installed before as well.
    """
    from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader

    before = getattr(get_offloader(), "joined", []) if beside_others else []

    class _Joining(NoopOffloader):
        joined: ClassVar = [*before, weakref.ref(caches)]

        def sync_prev_onload(self) -> None:
            for held in self.joined:
                if (living := held()) is not None:
                    living.join()

        join_after_forward = sync_prev_onload

    set_offloader(_Joining())


def breaks_graphs(vllm_config: Any) -> bool:
    """Whether vLLM ends captures amid a step, without `join_after_forward`: the default for some architectures."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False)) and captures_graphs(vllm_config)


def captures_graphs(vllm_config: Any) -> bool:
    """Whether steps may be replayed as CUDA graphs."""
    return on_cuda_platform() and not vllm_config.model_config.enforce_eager


def ranks_on_this_host(parallel_config: Any) -> int:
    """How many workers of a model share a host's memory, as far as it is known: Ray may place them anywhere."""
    if parallel_config.distributed_executor_backend == "ray":
        return 1
    return int(parallel_config.local_world_size)


def bypasses_loading(load_format: Any) -> bool:
    """Whether vLLM's loader of this format does not use `BaseModelLoader.load_model`, or does not post-process."""
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    loader: Any = model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(str(load_format))
    return load_format == "ipc_cache" or (loader is not None and loader.load_model is not BaseModelLoader.load_model)


def local_rank() -> int:
    """This worker's number among the workers of its host."""
    from vllm.distributed.parallel_state import get_world_group

    return int(get_world_group().local_rank)


def moe_layers_of(model: "torch.nn.Module") -> list[Any]:
    """Every module of `model` that holds routed experts, of any class."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def moe_runners_of(model: "torch.nn.Module") -> dict[str, Any]:
    """vLLM's modules around the routed experts of `model`, by name."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return {name: module for name, module in model.named_modules() if isinstance(module, MoERunner)}


def moe_config_among(arguments: Any) -> Any:
    """The FusedMoEConfig among the `arguments` of vLLM's RoutedExperts."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    return next(argument for argument in arguments if isinstance(argument, FusedMoEConfig))


def kv_bytes_per_sequence(vllm_config: Any) -> int:
    """KV cache bytes of one sequence of `max_model_len` tokens on one rank, as if every layer kept all tokens.

    From the model's configuration, before it is loaded.
    """
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    dtype = model.dtype if cache.cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[cache.cache_dtype]
    item_bytes = torch.empty((), dtype=dtype).element_size()
    heads_and_sides = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    per_token = model.get_num_layers(parallel) * heads_and_sides * model.get_head_size() * item_bytes
    return int(per_token * model.max_model_len)


def kv_bytes_of(worker: Any) -> int:
    """KV cache bytes of one sequence of `max_model_len` tokens on this rank, and a block of each layer besides.

    `worker`: vLLM's, whose model is loaded.
    """
    specs = worker.get_kv_cache_spec().values()
    return int(sum(spec.max_memory_usage_bytes(worker.vllm_config) + spec.page_size_bytes for spec in specs))


def least_of_ranks(value: int) -> int:
    """The least `value` among the workers that compute the same layers together: all of them must call it."""
    import torch
    from vllm.distributed.parallel_state import get_tp_group

    return _reduced(value, get_tp_group(), torch.distributed.ReduceOp.MIN)


def sum_of_stages(value: int) -> int:
    """The sum of `value` over the stages of a pipeline: all of them must call it."""
    import torch
    from vllm.distributed.parallel_state import get_pp_group

    return _reduced(value, get_pp_group(), torch.distributed.ReduceOp.SUM)


def _reduced(value: int, group: Any, operation: Any) -> int:
    import torch

    if group.world_size == 1:
        return value
    tensor = torch.tensor(value)
    torch.distributed.all_reduce(tensor, operation, group=group.cpu_group)
    return int(tensor)


def num_shares(parallel_config: Any) -> int:
    """Among how many ranks the experts of a layer are divided, each whole: 1 without expert parallelism."""
    return int(parallel_config.tensor_parallel_size) if parallel_config.enable_expert_parallel else 1


def stages_of(num_layers: int, parallel_config: Any) -> list[range]:
    """The numbers of a model's layers in each stage of its pipeline."""
    from vllm.distributed.utils import get_pp_indices

    num_stages = parallel_config.pipeline_parallel_size
    return [range(*get_pp_indices(num_layers, stage, num_stages)) for stage in range(num_stages)]
