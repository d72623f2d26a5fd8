"""The plugin's GPU path without a GPU: csrc/cuda built for the host, and vLLM's CPU engine served through it.

`install(patch)` has workers of this process plan and copy with the kernels themselves (tests/device/shim says how they
run, and what that cannot show): `DeviceCaches` and `DeviceSharedRows` as on a GPU, with stand-ins for what torch.cuda
knows of streams, events and page-locked memory. vLLM's own kernels stay those of the CPU platform.
"""

import functools
import hashlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from native_tools import CSRC, ROOT, load_setup

SHIM = Path(__file__).parent / "shim"
ON_HOST = ROOT / "tests" / "native" / "cpp" / "cuda_on_host.h"
CPU = torch.device("cpu", 0)


@functools.cache
def library() -> Any:
    """The functions of libvep_cuda.so, and those that shim.cc adds. Compiled once for these sources, in build/."""
    import tvm_ffi

    sources = sorted([*CSRC.rglob("*.*"), *SHIM.iterdir(), ON_HOST])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = ROOT / "build" / f"device-shim-{digest}" / "libshim.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        compile_library(built)
    return tvm_ffi.load_module(str(built))


def compile_library(output: Path) -> None:
    """Raises CalledProcessError, with what the compiler says in its output."""
    setup = load_setup()
    folders = [f"-I{folder}" for folder in (SHIM, ON_HOST.parent, CSRC)]
    ffi = setup.tvm_ffi_folder()
    flags = ["-shared", "-fPIC", "-O2", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread"]
    links = ["-isystem", str(ffi / "include"), f"-L{ffi / 'lib'}", "-ltvm_ffi"]
    temporary = output.with_suffix(".new")
    subprocess.run(
        [*setup.find_compiler(), *flags, *folders, str(SHIM / "shim.cc"), "-o", str(temporary), *links], check=True
    )
    temporary.replace(output)


class Stream:
    """Stream 0 runs what it is given at once, so that nobody waits for it; all others are one queue."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle

    def wait_event(self, event: "Event") -> None:
        if self.cuda_stream == 0:
            library().shim_wait(event.number)

    def synchronize(self) -> None:
        library().shim_wait(library().shim_submitted())


MAIN = Stream(0)


class Event:
    """What the queue had been given when it was recorded."""

    number = 0

    def __init__(self, **_: bool) -> None:
        pass

    def record(self, stream: Stream = MAIN) -> None:
        self.number = library().shim_submitted() if stream.cuda_stream else 0

    def synchronize(self) -> None:
        library().shim_wait(self.number)

    def elapsed_time(self, _other: "Event") -> float:
        return 0.4  # ms, for eight copies: a link of 1 GB/s where a record has 50 KB


def install(patch: Any) -> None:
    """`patch`: a pytest.MonkeyPatch."""
    from vllm_expert_prefetch.cache import device
    from vllm_expert_prefetch.memory import device_rows, host_memory
    from vllm_expert_prefetch.serving import compat, sizes, worker

    def on_cpu(*_: Any) -> torch.device:
        return CPU

    class Torch:
        """torch, whose GPU is the CPU."""

        device = staticmethod(on_cpu)
        cuda = SimpleNamespace(
            current_device=lambda: 0,
            current_stream=lambda _=None: MAIN,
            empty_cache=lambda: None,
            synchronize=lambda: None,
            Stream=lambda *_, **__: Stream(1),
            Event=Event,
        )

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    fake: Any = Torch()
    for module in (device, device_rows):
        patch.setattr(module, "torch", fake)
        patch.setattr(module, "cuda_library", library)
    patch.setattr(host_memory, "_register_with_cuda", lambda memory, num_bytes: lambda: None)
    options = worker.HostMemoryOptions
    patch.setattr(worker, "HostMemoryOptions", lambda **_: options(pin=True, cuda=True))
    patch.setattr(worker, "create_caches", lambda num_layers, link, where: device.DeviceCaches(num_layers, CPU))
    patch.setattr(
        worker, "create_shared_rows", lambda *given: device_rows.DeviceSharedRows(*given[:3], device=CPU)
    )
    patch.setattr(sizes, "page_bytes", device_rows.granularity)
    patch.setattr(compat, "install_offloader", lambda join: None)
    patch.setattr(compat, "rows_of", rows_of)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """As vLLM's slot mapping tells a GPU: negative for padding, in dummy and profile runs for all rows."""
    from vllm_expert_prefetch.serving import compat

    rows = torch.arange(len(x))
    rows[compat.num_real_tokens(len(x)) :] = -1
    return rows
