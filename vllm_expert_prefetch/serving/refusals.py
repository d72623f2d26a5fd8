"""What is refused at start-up, because no test shows that it works. `docs/compatibility.md` shows the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_expert_prefetch.config import CONFIG_KEY, OFF, SPECULATIVE, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.native.library import why_not_built
from vllm_expert_prefetch.serving import compat


@dataclass(frozen=True)
class Refusal:
    """One combination that is not served: what, the flag that asks for it, and the remedy."""

    what: str
    flag: str
    remedy: str
    applies: Callable[[Any, ExpertPrefetchConfig], bool]
    """Takes vLLM's VllmConfig and the plugin's configuration."""
    platform: str = ""
    """`cpu` or `gpu`, where it is refused on that platform alone."""


def _offload_flags(vllm_config: Any, config: ExpertPrefetchConfig) -> bool:
    offload = vllm_config.offload_config
    return bool(offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size or offload.offload_backend != "auto")


def _adapters_on_experts(vllm_config: Any, config: ExpertPrefetchConfig) -> bool:
    lora = vllm_config.lora_config
    for_experts = ("enable_mixed_moe_lora_format", "enable_moe_shared_loras")
    targets = getattr(lora, "target_modules", None) or ()
    return any(getattr(lora, name, False) for name in for_experts) or any(
        "experts" in name.split(".") for name in targets
    )


def _parallel(name: str, low: int | bool = False) -> Callable[[Any, ExpertPrefetchConfig], bool]:
    return lambda vllm_config, config: getattr(vllm_config.parallel_config, name, low) > low


DROP = "drop the flag"

REFUSALS = (
    Refusal(
        "a dense model",
        "--plugin expert_prefetch",
        "this model has no routed experts: drop the flag",
        lambda vllm_config, config: vllm_config.model_config.get_num_experts() == 0,
    ),
    Refusal(
        "accelerators other than NVIDIA GPUs and the CPU platform",
        "--plugin expert_prefetch",
        "serve without the plugin",
        lambda vllm_config, config: not (compat.on_cpu_platform() or compat.on_cuda_platform()),
    ),
    Refusal(
        "expert load balancing (EPLB) and redundant experts, which move experts between ranks while they serve",
        "--enable-eplb",
        DROP,
        _parallel("enable_eplb"),
    ),
    Refusal("elastic expert parallelism", "--enable-elastic-ep", DROP, _parallel("enable_elastic_ep")),
    Refusal("dual-batch overlap", "--enable-dbo", DROP, _parallel("enable_dbo")),
    Refusal("micro-batching", "--ubatch-size", DROP, _parallel("ubatch_size", 1)),
    Refusal(
        "data parallelism, for which vLLM divides the experts among its engines and gathers their tokens within the "
        "kernel's call, past the cache",
        "--data-parallel-size",
        "run one server per replica, behind a load balancer",
        _parallel("data_parallel_size", 1),
    ),
    Refusal(
        "context parallelism in prefill",
        "--prefill-context-parallel-size",
        DROP,
        _parallel("prefill_context_parallel_size", 1),
    ),
    Refusal(
        "context parallelism in decode",
        "--decode-context-parallel-size",
        DROP,
        _parallel("decode_context_parallel_size", 1),
    ),
    Refusal(
        "LoRA on routed experts",
        "--lora-target-modules, --enable-mixed-moe-lora-format, --enable-moe-shared-loras",
        "leave the experts out, and drop the flags that only concern them",
        _adapters_on_experts,
    ),
    Refusal(
        "sleep mode",
        "--enable-sleep-mode",
        DROP,
        lambda vllm_config, config: bool(vllm_config.model_config.enable_sleep_mode),
    ),
    Refusal(
        "weight transfer into a running engine",
        "--weight-transfer-config",
        "restart the server to change weights",
        lambda vllm_config, config: vllm_config.weight_transfer_config is not None,
    ),
    Refusal(
        "weights that are not loaded and post-processed by vLLM's usual loader",
        "--load-format tensorizer, modelexpress, ipc_cache",
        "use --load-format auto",
        lambda vllm_config, config: compat.bypasses_loading(vllm_config.load_config.load_format),
    ),
    Refusal(
        "vLLM's own weight offloading",
        "--cpu-offload-gb, --offload-group-size, --offload-backend",
        "drop it: the experts are offloaded by the plugin",
        _offload_flags,
    ),
    Refusal(
        "speculative execution",
        "execution",
        "set execution to exact: on a GPU, guesses only decide what is copied",
        lambda vllm_config, config: config.execution == SPECULATIVE,
        "gpu",
    ),
    Refusal(
        "an artifact in a pipeline: it is known by the gates of the whole model, of which a stage has a part",
        "artifact",
        "drop the key and what needs it: the router predicts without one",
        lambda vllm_config, config: (
            config.artifact is not None and vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
    ),
    Refusal(
        "a number of tokens for the KV cache on the CPU platform",
        "kv_cache_tokens",
        "drop the key: there vLLM's KV cache has a size of its own (VLLM_CPU_KVCACHE_SPACE)",
        lambda vllm_config, config: config.kv_cache_tokens is not None,
        "cpu",
    ),
    Refusal(
        "a number of tokens for a KV cache whose bytes are given",
        "kv_cache_tokens",
        "drop the key or --kv-cache-memory-bytes",
        lambda vllm_config, config: bool(
            config.kv_cache_tokens is not None and vllm_config.cache_config.kv_cache_memory_bytes
        ),
    ),
    Refusal(
        "an emulated link on a GPU",
        "emulated_link_gbps",
        "drop the key: a GPU has a real link",
        lambda vllm_config, config: config.emulated_link_gbps is not None,
        "gpu",
    ),
    Refusal(
        "a host store that is not page-locked on a GPU, whose kernels read it",
        "pin_memory",
        "set it to auto; where the memlock limit is too small, raise that (`ulimit -l unlimited`)",
        lambda vllm_config, config: config.pin_memory == OFF,
        "gpu",
    ),
    Refusal(
        "a recording of routing inside CUDA graphs",
        "trace",
        "add --enforce-eager: nothing on the host sees the routing of a graph",
        lambda vllm_config, config: config.trace != OFF and compat.captures_graphs(vllm_config),
        "gpu",
    ),
)


@dataclass(frozen=True)
class LayerRefusal:
    """One kind of layer that is not taken over."""

    what: str
    flag: str
    remedy: str
    applies: Callable[[Any], bool]
    """Takes the quant_method of vLLM's RoutedExperts."""


def _is_unquantised_elsewhere(quant_method: Any) -> bool:
    backend = getattr(quant_method, "unquantized_backend", None)
    return backend is not None and backend.name not in _BACKENDS


_BACKENDS = ("TRITON", "CPU")
"""Of unquantised experts, by the names of vLLM's UnquantizedMoeBackend."""
KERNELS = ("TritonExperts", "TritonWNA16Experts", "MarlinExperts")
"""Of quantised experts, by the names of vLLM's classes: an expert's rows are all that they read of it. They leave
out the experts that vLLM's expert map leads nowhere."""

LAYER_REFUSALS = (
    LayerRefusal(
        "kernels that contain the router (monolithic)",
        "--moe-backend",
        "choose a modular backend, on a GPU --moe-backend triton, or marlin for 4-bit experts; on CPU use vLLM 0.30 or "
        "newer",
        lambda quant_method: bool(getattr(quant_method, "is_monolithic", False)),
    ),
    LayerRefusal(
        "MoE kernels whose rows may depend on each other: all but Triton's and the CPU platform's",
        "--moe-backend",
        "choose --moe-backend triton",
        _is_unquantised_elsewhere,
    ),
)


def check_kernel(layer_name: str, quant_method: Any) -> None:
    """Raise ConfigError unless the kernel that vLLM has built for a layer's quantised experts is one of KERNELS."""
    if hasattr(quant_method, "unquantized_backend"):
        return
    name = compat.kernel_name(quant_method)
    if name not in KERNELS:
        raise ConfigError(
            f"{CONFIG_KEY}: quantised experts of {type(quant_method).__name__} with the kernel {name} are not "
            f"supported (layer {layer_name}): choose --moe-backend marlin or triton, whichever vLLM offers for this "
            "format, or an unquantised checkpoint"
        )


def check_refusals(vllm_config: Any, config: ExpertPrefetchConfig) -> None:
    """Raise ConfigError for the first entry of REFUSALS that applies."""
    platform = "cpu" if compat.on_cpu_platform() else "gpu"
    for refusal in REFUSALS:
        if refusal.platform in ("", platform) and refusal.applies(vllm_config, config):
            raise ConfigError(_refused(refusal))


def check_tells_padding(vllm_config: Any) -> None:
    """Raise ConfigError where a GPU could not tell the tokens of this model's steps from padding."""
    if not compat.tells_padding(vllm_config):
        raise ConfigError(
            f"{CONFIG_KEY}: this model has no attention layer with a KV cache, by which a GPU tells tokens from "
            "padding: give every expert a slot (cache_fraction 1), or serve without the plugin"
        )


def check_libraries(on_gpu: bool) -> None:
    """Raise ConfigError when a library that this platform needs was not built. Loads nothing: whoever reads flags may
    fork, and must not have started CUDA."""
    for part in ("host", "cuda")[: 1 + on_gpu]:
        missing = why_not_built(part)
        if missing:
            raise ConfigError(f"{CONFIG_KEY}: {missing}")


def check_layer_refusals(layer_name: str, quant_method: Any) -> None:
    """Raise ConfigError for the first entry of LAYER_REFUSALS that applies to a layer."""
    for refusal in LAYER_REFUSALS:
        if refusal.applies(quant_method):
            raise ConfigError(f"{_refused(refusal)} (layer {layer_name}, {type(quant_method).__name__})")


def _refused(refusal: Refusal | LayerRefusal) -> str:
    return f"{CONFIG_KEY}: {refusal.what} ({refusal.flag}) is not supported: {refusal.remedy}"
