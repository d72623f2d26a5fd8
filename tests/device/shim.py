"""The plugin's GPU path without a GPU: csrc/cuda built for the host, and vLLM's CPU engine served through it.

`install(patch)` has workers of this process plan and copy with the kernels themselves (tests/device/shim says how they
run, and what that cannot show): `DeviceCaches` and `DeviceSharedRows` as on a GPU, with stand-ins for what torch.cuda
knows of streams, events and page-locked memory. vLLM's own kernels stay those of the CPU platform.
"""

import contextlib
import functools
import hashlib
import itertools
import runpy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from native_tools import CSRC, ROOT, load_setup
from torch.utils._python_dispatch import TorchDispatchMode

SHIM = Path(__file__).parent / "shim"
ON_HOST = ROOT / "tests" / "native" / "cpp" / "cuda_on_host.h"
CPU = torch.device("cpu", 0)
ROW_BYTES = (4096, 48)
"""Of gpu_model: 32 rows of the first tensor take 32 of the shim's pages."""


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


class Graph:
    """A captured step: what the plugin and torch launched, with the very arguments that it was given then."""

    current: "Graph | None" = None
    """The one that is being captured."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    """torch.cuda.graph: what is launched is kept for replays. The plugin's kernels do not run meanwhile."""
    Graph.current = graph
    try:
        with _Recorder(graph):
            yield
    finally:
        Graph.current = None


class _Recorder(TorchDispatchMode):
    """Keeps torch's operators, which run all the same: what they give is only used where it lies."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = operator(*args, **(kwargs or {}))
        if "empty" in operator._schema.name:  # nothing runs, and what the plugin's kernels would write is not there yet
            return given.zero_()
        aliases = [value.alias_info for value in operator._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # no view

            def run() -> None:
                again = operator(*args, **(kwargs or {}))
                for tensor, now in zip(_listed(given), _listed(again), strict=True):
                    if tensor is not now and isinstance(tensor, torch.Tensor):
                        tensor.copy_(now)

            self._graph.calls.append(run)
        return given


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


class Launches:
    """The library as the caches see it: while a graph is captured, kernels are kept and do not run."""

    _kernels = ("plan_step", "plan_prefetch", "gather_records", "prefetch_records")

    def __getattr__(self, name: str) -> Any:
        function = getattr(library(), name)
        if name not in self._kernels:
            return function

        def launch(*arguments: Any) -> None:
            when_it_runs(lambda: function(*arguments))

        return launch


def when_it_runs(call: Callable[[], object]) -> None:
    """Now, or in every replay of the graph that is being captured."""
    if Graph.current is None:
        call()
    else:
        Graph.current.calls.append(call)


class Stream:
    """Stream 0 runs what it is given at once, so that nobody waits for it; stream 1, of copies, is a queue."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle

    def wait_event(self, event: "Event") -> None:
        if self.cuda_stream == 0:
            when_it_runs(lambda: library().shim_wait(event.number))

    def synchronize(self) -> None:
        library().shim_wait(library().shim_submitted())


MAIN = Stream(0)
_handles = itertools.cycle((1, 0))
"""Of the streams that caches make: for copies, and for plans."""


class Event:
    """What the queue had been given when it was recorded."""

    number = 0

    def __init__(self, **_: bool) -> None:
        pass

    def record(self, stream: Stream = MAIN) -> None:
        def note() -> None:
            self.number = library().shim_submitted() if stream.cuda_stream else 0

        when_it_runs(note)

    def synchronize(self) -> None:
        library().shim_wait(self.number)

    def elapsed_time(self, _other: "Event") -> float:
        return 0.4  # ms, for eight copies: a link of 1 GB/s where a record has 50 KB


class Runtime:
    """The part of CUDA's runtime that torch shows."""

    @staticmethod
    def cudaHostRegister(address: int, num_bytes: int, _flags: int) -> int:
        library().shim_register(address, num_bytes)
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> None:
        library().shim_unregister(address)


class Torch:
    """torch, whose GPU is the CPU."""

    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_name=lambda: "a shim",
        current_stream=lambda _=None: MAIN,
        empty_cache=lambda: None,
        synchronize=lambda: Stream(1).synchronize(),
        Stream=lambda *_, **__: Stream(next(_handles)),
        stream=lambda _: contextlib.nullcontext(),
        Event=Event,
        CUDAGraph=Graph,
        graph=capture,
        cudart=Runtime,
    )

    @staticmethod
    def device(*_: Any) -> torch.device:
        return CPU

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install_caches(patch: Any) -> None:
    """Device caches and their row spaces, for tests that make them. `patch`: a pytest.MonkeyPatch."""
    import gpu_layer
    import gpu_model

    from vllm_expert_prefetch.cache import device
    from vllm_expert_prefetch.memory import device_rows, host_memory

    for module in (device, device_rows, host_memory, gpu_layer, gpu_model):
        patch.setattr(module, "torch", Torch())
    patch.setattr(device, "cuda_library", Launches)
    patch.setattr(device_rows, "cuda_library", library)
    patch.setattr(gpu_model, "ROW_BYTES", ROW_BYTES)


def tests_of_gpu(name: str) -> dict[str, Any]:
    """The tests of tests/gpu/NAME.py, by name, whose torch is that of the shim."""
    found = runpy.run_path(str(ROOT / "tests" / "gpu" / f"{name}.py"))
    tests = {name: test for name, test in found.items() if name.startswith("test_")}
    for test in tests.values():
        test.__globals__["torch"] = Torch()
    return tests


def install(patch: Any) -> None:
    """The same for the workers of vLLM's CPU engine in this process."""
    from vllm_expert_prefetch.cache import device
    from vllm_expert_prefetch.memory import device_rows, host_memory
    from vllm_expert_prefetch.serving import compat, proof, sizes, worker

    install_caches(patch)
    patch.setattr(proof, "torch", Torch())
    options = host_memory.HostMemoryOptions(pin=True, cuda=True)
    patch.setattr(worker, "host_memory_options", lambda config, on_gpu: options)
    patch.setattr(
        worker,
        "create_caches",
        lambda num_layers, link, where, depth: device.DeviceCaches(num_layers, CPU, depth=depth),
    )
    patch.setattr(
        worker,
        "create_shared_rows",
        lambda rows, slots, areas, where: device_rows.DeviceSharedRows(rows, slots, areas, CPU),
    )
    patch.setattr(sizes, "page_bytes", device_rows.granularity)
    patch.setattr(compat, "install_offloader", lambda caches, beside_others=False: None)
    patch.setattr(compat, "rows_of", rows_of)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """As vLLM's slot mapping tells a GPU: negative for padding, in dummy and profile runs for all rows."""
    from vllm_expert_prefetch.serving import compat

    rows = torch.arange(len(x))
    rows[compat.num_real_tokens(len(x)) :] = -1
    return rows
