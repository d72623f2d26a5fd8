"""A CUDA platform of any compute capability without CUDA, behind which vLLM's CUDA build says what it would choose.

`pretend(90)` must run before anything of vllm.model_executor is imported, in a process of its own.
"""

import functools
import os
import sys
import types
from typing import Any

_EXTENSIONS = (
    "_C_stable_libtorch",
    "_moe_C_stable_libtorch",
    "_C",
    "_moe_C",
    "_qutlass_C",
    "_vllm_fa2_C",
    "_vllm_fa3_C",
)
_ABSENT = (
    *("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc", "cuda.bindings.runtime", "cuda.core"),
    *("cuda.pathfinder", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"),
)


class _AnyClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {})


class _Anything(types.ModuleType):
    """A module that has whatever is asked for, all of it empty."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {"__init__": lambda self, *args, **kwargs: None})


def pretend(capability: int) -> None:
    """From now on vLLM runs on a GPU of this compute capability, 89 for 8.9, with FlashInfer and all else installed."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name in _EXTENSIONS:
        sys.modules.setdefault(f"vllm.{name}", types.ModuleType(f"vllm.{name}"))
    for name in _ABSENT:
        sys.modules[name] = _Anything(name)
    import vllm.platforms as platforms

    platforms.vllm_version_matches_substr = lambda substr: False
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class FakeGpu(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*divmod(capability, 10))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"a GPU of compute capability {capability / 10}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def import_kernels(cls) -> None:
            """There are none."""

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms._current_platform = FakeGpu()
    import torch

    torch.version.cuda = "13.0"
    torch.accelerator.empty_cache = lambda: None
    _pretend_to_have_libraries()


def _pretend_to_have_libraries() -> None:
    import vllm._custom_ops as ops
    import vllm.utils.flashinfer as flashinfer
    import vllm.utils.import_utils as imports

    for name in ("has_triton_kernels", "has_deep_gemm"):
        if hasattr(imports, name):
            setattr(imports, name, functools.cache(lambda: True))
    if hasattr(imports, "get_triton_kernels_version"):
        imports.get_triton_kernels_version = lambda: None
    for name in dir(flashinfer):
        if name.startswith(("has_flashinfer", "has_nvidia", "is_flashinfer")):
            setattr(flashinfer, name, lambda *args, **kwargs: True)
    for name in dir(ops):
        if name.startswith("cutlass_") and "support" in name:
            setattr(ops, name, lambda capability=0, *args: capability >= 89)
    ops.cutlass_group_gemm_supported = lambda capability: capability in (90, 100, 103)
    ops.mxfp4_experts_quant_supported = lambda capability: capability in (100, 103, 120)
