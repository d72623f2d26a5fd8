"""Which of vLLM's MoE backends serves a format on a GPU, where the user names none.

vLLM's own choice may contain the router (TRT-LLM, OAI-Triton), hold weights in objects of its own (Humming, DeepGEMM),
or keep vectors per expert where nothing can replace them (CUTLASS). Marlin and Triton read rows, and are offered for
every format that is served, on every GPU since compute capability 8.0.
"""

from collections.abc import Mapping
from typing import Any

from vllm_expert_prefetch.config import draft_model_of
from vllm_expert_prefetch.serving import compat

_FP8_CAPABILITY = 89
"""The first one whose tensor cores multiply FP8, which Triton's kernel needs."""
_FP8 = ("fp8", "fbgemm_fp8", "modelopt")
"""Not deepseek_v4_fp8: its experts are MXFP4."""
_ONLINE = {
    "fp8_per_tensor": "float",
    "fp8_per_block": "float",
    "fp8_per_channel": "float",
    "int8_per_channel_weight_only": "int",
    "experts_int8": "int",
}
"""What vLLM makes of unquantised experts while it loads them, where Triton multiplies 8 bits."""


def choose_backend(vllm_config: Any, leaves_drafts: bool = True) -> str | None:
    """Set vLLM's `moe_backend` where it is "auto" on a GPU. Returns what was chosen, None where nothing was.

    A draft gets one of its own: vLLM's choice if `leaves_drafts`, else one that reads rows as well.
    """
    kernel_config = vllm_config.kernel_config
    if not compat.on_cuda_platform() or kernel_config.moe_backend != "auto":
        return None
    kernel_config.moe_backend = _backend_of(vllm_config.model_config)
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    if getattr(speculative, "moe_backend", "") is None:  # a draft would take its target's
        draft = None if leaves_drafts else draft_model_of(vllm_config)
        speculative.moe_backend = "auto" if draft is None else _backend_of(draft)
    return str(kernel_config.moe_backend)


def _backend_of(model: Any) -> str:
    given = getattr(model.hf_text_config, "quantization_config", None) or getattr(
        model.hf_config, "quantization_config", None
    )
    name = compat.online_quantization(model) or model.quantization
    return backend_for(name, given or {}, compat.compute_capability())


def served_formats(capability: int) -> dict[str, str]:
    """Formats of experts -> the backend that is chosen for them on a GPU. `capability`: 89 for 8.9."""
    names = {
        "unquantised": None,
        "FP8": "fp8",
        "INT8": "experts_int8",
        "INT4": "auto_gptq",
        "MXFP4": "mxfp4",
        "NVFP4": "modelopt_fp4",
    }
    return {what: backend_for(name, {}, capability) for what, name in names.items()}


def backend_for(quantization: str | None, given: Mapping[str, Any], capability: int) -> str:
    """A value of `--moe-backend`.

    `quantization`: vLLM's name of the method, or of what it makes while loading; None for unquantised experts; `given`:
    the checkpoint's `quantization_config`; `capability`: 89 for 8.9.
    """
    if quantization is None:
        return "triton"
    kind = _activations(quantization, given)
    if kind == "float":
        return "triton" if capability >= _FP8_CAPABILITY else "marlin"
    return "triton" if kind == "int" or quantization == "moe_wna16" else "marlin"


def _activations(quantization: str, given: Mapping[str, Any]) -> str | None:
    """ "float" or "int" where inputs and weights have 8 bits, else None.

    That is: only weights are quantised, or in 4 bits, or in groups (MXFP8), for which vLLM has no Triton kernel or an
    emulation.
    """
    if quantization in _ONLINE:
        return _ONLINE[quantization]
    if quantization in _FP8:
        return None if given.get("store_dtype") == "mxfp4" else "float"
    if quantization != "compressed-tensors":
        return None
    for group in (given.get("config_groups") or {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        if inputs and weights.get("num_bits") == 8 and weights.get("strategy") != "group":
            return str(weights.get("type"))
    return None
