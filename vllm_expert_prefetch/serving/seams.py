"""Every place where the plugin joins vLLM, and whether this vLLM has it."""

import inspect
from collections.abc import Callable

from vllm_expert_prefetch.serving.compat import platform_class


def find_seams() -> dict[str, bool]:
    """Every place where the plugin joins vLLM, and whether this vLLM has it."""
    return {name: _found(probe) for name, probe in _SEAMS.items()}


def _found(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except (ImportError, AttributeError):
        return False


def _layer_seam() -> bool:
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    parameters = list(inspect.signature(RoutedExperts.forward_modular).parameters)
    return isinstance(op_registry_oot, dict) and parameters[1:4] == ["x", "topk_weights", "topk_ids"]


def _platform_seam() -> bool:
    platform = platform_class()
    return hasattr(platform, "pre_register_and_update") and hasattr(platform, "check_and_update_config")


def _loader_seam() -> bool:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    return hasattr(BaseModelLoader, "load_model")


def _context_seam() -> bool:
    from vllm.forward_context import ForwardContext

    return "attn_metadata" in ForwardContext.__dataclass_fields__


def _step_seam() -> bool:
    from vllm.v1.core.sched.output import CachedRequestData
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    return "num_output_tokens" in CachedRequestData.__dataclass_fields__ and hasattr(WorkerWrapperBase, "init_device")


_SEAMS: dict[str, Callable[[], bool]] = {
    "RoutedExperts (layer replacement)": _layer_seam,
    "platform hooks (flag and configuration check)": _platform_seam,
    "BaseModelLoader.load_model (proof of takeover)": _loader_seam,
    "ForwardContext.attn_metadata (padding and dummy runs)": _context_seam,
    "WorkerWrapperBase.init_device (times of steps)": _step_seam,
}
