"""The native libraries, found, checked and loaded when they are first asked for.

`host_library()` holds the C++ planner, engine and predictor, `cuda_library()` the kernels. Where one is missing, it is
None and `why_not_host()` or `why_not_cuda()` says why.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.native.sources import source_digest

SWITCH = "EXPERT_PREFETCH_NATIVE"
FOLDER = Path(__file__).resolve().parent
CHECKOUT = FOLDER.parents[1]


class Unusable(Exception):
    """Why a library cannot be used, and what helps."""


def host_library() -> Any | None:
    """The tvm_ffi module of libvep_host.so, or None; loads no CUDA.

    Both functions raise ValueError when EXPERT_PREFETCH_NATIVE is set to anything but 0 and 1.
    """
    return _load("host")[0]


def cuda_library() -> Any | None:
    """The tvm_ffi module of libvep_cuda.so, or None. Starts no CUDA context, needs no driver to be loaded."""
    return _load("cuda")[0]


def why_not_built(part: str) -> str | None:
    """Why libvep_{part}.so ("host" or "cuda") is not there, or not wanted; None when it is. Loads nothing."""
    try:
        _check_switch()
        _find(part)
    except Unusable as error:
        return str(error)
    return None


def why_not_host() -> str | None:
    """Why `host_library()` is None; None when it is not."""
    return _load("host")[1]


def why_not_cuda() -> str | None:
    """Why `cuda_library()` is None; None when it is not."""
    return _load("cuda")[1]


@functools.cache
def _load(part: str) -> tuple[Any | None, str | None]:
    """The module and None, or None and the reason; asked once in a process."""
    try:
        _check_switch()
        module = _open(part)
        _check_age(module, part)
        if part == "cuda":
            _check_driver(module.driver_version(), module.runtime_version())
    except Unusable as error:
        return None, str(error)
    return module, None


def _check_switch() -> None:
    setting = os.environ.get(SWITCH, "1")
    if setting not in ("0", "1"):
        raise ValueError(f"{SWITCH}={setting}: 0 turns the native libraries off, 1 or unset leaves them on")
    if setting == "0":
        raise Unusable(f"turned off by {SWITCH}=0")


def _find(part: str) -> Path:
    path = FOLDER / f"libvep_{part}.so"
    if not path.exists():
        needs = "nvcc and a C++20 compiler" if part == "cuda" else "a C++20 compiler"
        raise Unusable(f"not built: {path.name} needs {needs} when the package is installed. Then {_remedy(part)}")
    return path


def _open(part: str) -> Any:
    path = _find(part)
    try:
        with _gpus_counted_without_cuda():
            import tvm_ffi
    except ImportError as error:
        raise Unusable(f"tvm_ffi cannot be imported ({error}): pip install 'apache-tvm-ffi>=0.1.10'") from error
    try:
        return tvm_ffi.load_module(str(path))
    except Exception as error:  # whatever tvm_ffi makes of the dynamic linker's message
        raise Unusable(f"{path.name} cannot be loaded ({error}): {_remedy(part)}") from error


def _check_age(module: Any, part: str) -> None:
    """A library of another version, or of other sources than a checkout has now, must not be used."""
    try:
        version, digest = module.version(), module.source_digest()
    except AttributeError as error:
        raise Unusable(f"stale: it does not tell its version: {_remedy(part)}") from error
    if version != __version__:
        raise Unusable(f"stale: built for version {version} of the package, this is {__version__}: {_remedy(part)}")
    if _in_checkout() and digest != source_digest(CHECKOUT / "csrc", part):
        raise Unusable(f"stale: csrc/ changed after it was built: {_remedy(part)}")


def _check_driver(driver: int, runtime: int) -> None:
    """Both as CUDA counts, 13000 for 13.0; `driver` is 0 where there is none. A driver serves a whole major version."""
    if 0 < driver // 1000 < runtime // 1000:
        raise Unusable(
            f"built with CUDA {_dotted(runtime)}, and the NVIDIA driver goes up to {_dotted(driver)}: "
            f"update the driver, or build with an older nvcc"
        )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _in_checkout() -> bool:
    return (CHECKOUT / "csrc" / "version.h").is_file()


def _remedy(part: str) -> str:
    make = "VEP_BUILD_CUDA=1 make setup" if part == "cuda" else "make setup"
    return f"run {make}" if _in_checkout() else "install the package again, from its source"


@contextmanager
def _gpus_counted_without_cuda() -> Iterator[None]:
    """tvm_ffi asks torch for GPUs when imported; counted by CUDA itself, that would forbid CUDA in forked children."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
