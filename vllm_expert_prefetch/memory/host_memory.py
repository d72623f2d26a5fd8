"""Exact-size, optionally page-locked host memory.

torch's pinned allocator rounds sizes up to powers of two (58 GB becomes 77 GB), hence mmap and registration here.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import re
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_expert_prefetch.config import AUTO, CONFIG_KEY, ConfigError, ExpertPrefetchConfig

_MPOL_PREFERRED, _MPOL_BIND = 1, 2
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}
_MAX_NODES = 1024
_MADV_POPULATE_WRITE = 23
_TOUCH_BYTES = 64 * 2**20
_MAX_TOUCH_THREADS = 8
_CUDA_PORTABLE_AND_MAPPED, _CUDA_READ_ONLY = 1 | 2, 8
_CAP_IPC_LOCK = 14
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True)
class HostMemoryOptions:
    """How host memory is placed. `pin`: page-locked, with `cuda` by the GPU's driver, which maps it for kernels.

    Where `must_bind` or `must_have_huge_pages` is False, memory that cannot be had so is used as it is, with a note;
    and a NUMA node that is full is helped out by others.
    """

    pin: bool = False
    cuda: bool = False
    numa_node: int | None = None
    huge_pages: bool = False
    must_bind: bool = True
    must_have_huge_pages: bool = True

    @property
    def ask_nothing(self) -> bool:
        """Whether any memory will do."""
        return not (self.pin or self.cuda or self.huge_pages) and self.numa_node is None


def host_memory_options(config: ExpertPrefetchConfig, on_gpu: bool) -> HostMemoryOptions:
    """Where a worker's host store is to be: on a GPU page-locked in any case, as kernels read it."""
    node = config.numa_node
    if node is None and on_gpu:
        node = numa_node_of_gpu(torch.cuda.current_device())
    return HostMemoryOptions(
        pin=config.pin_memory == "on" or on_gpu,
        cuda=on_gpu,
        numa_node=node,
        huge_pages=config.huge_pages == "on" or (config.huge_pages == AUTO and on_gpu),
        must_have_huge_pages=config.huge_pages == "on",
        must_bind=config.numa_node is not None,
    )


class HostMemory:
    """One mapping of `num_bytes`, seen as a uint8 tensor of that length: anonymous and private, or of a `file` (its
    descriptor), which others may map as well; `read_only`, a write ends the process.

    Raises ConfigError when an option cannot be honoured, naming the option and the limit. The mapping is unregistered
    and released when the last tensor over it is gone. `is_pinned` says whether it is page-locked, `notes` what was
    asked for, was not possible and is not needed.
    """

    def __init__(
        self, num_bytes: int, options: HostMemoryOptions, file: int | None = None, read_only: bool = False
    ) -> None:
        self.num_bytes = num_bytes
        self.notes: list[str] = []
        mapping = mmap.mmap(
            -1 if file is None else file,
            num_bytes,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if file is None else mmap.MAP_SHARED,
            prot=mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE,
        )
        # Every tensor over the mapping keeps this view alive, and the view the mapping.
        view = memoryview(mapping)
        with warnings.catch_warnings(action="ignore"):  # torch knows no tensor that may not be written to
            self.bytes = torch.frombuffer(view, dtype=torch.uint8)
        if options.huge_pages:
            self._try(lambda: _advise_huge_pages(mapping, file is not None), options.must_have_huge_pages)
        if options.numa_node is not None:
            node, mode = options.numa_node, _MPOL_BIND if options.must_bind else _MPOL_PREFERRED
            self._try(lambda: _place_on_node(self.bytes.data_ptr(), num_bytes, node, mode), options.must_bind)
        if not read_only:
            _touch_pages(self.bytes.data_ptr(), num_bytes)
        self.is_pinned = options.pin
        if options.pin and options.cuda:
            weakref.finalize(view, _release, _register_with_cuda(self.bytes, read_only), mapping)
        elif options.pin:
            _lock(self.bytes, num_bytes)

    def _try(self, place: Callable[[], None], must: bool) -> None:
        try:
            place()
        except ConfigError as error:
            if must:
                raise
            self.notes.append(str(error))


def numa_node_of_gpu(index: int) -> int | None:
    """The NUMA node that GPU number `index` hangs on; None where the system does not tell."""
    gpu: Any = torch.cuda.get_device_properties(index)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _touch_pages(address: int, num_bytes: int) -> None:
    """Have the kernel make all pages now, on several threads: one alone makes a few GB in a second.

    Where the kernel cannot (before 5.14), whoever fills the memory touches its pages.
    """
    if num_bytes <= _TOUCH_BYTES:
        return
    libc = ctypes.CDLL(None)

    def touch(start: int) -> None:
        length = min(_TOUCH_BYTES, num_bytes - start)
        libc.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)

    num_threads = min(_MAX_TOUCH_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(touch, range(0, num_bytes, _TOUCH_BYTES)))


def check_huge_pages(is_shared: bool, settings: Path = _HUGE_PAGES) -> None:
    """Raise ConfigError where the kernel is set to give no transparent huge pages (2 MB), which no call tells.

    `is_shared`: in memory of a file. `settings`: the folder where the kernel says so.
    """
    name = "shmem_enabled" if is_shared else "enabled"
    for path in (settings / "hugepages-2048kB" / name, settings / name):
        with contextlib.suppress(OSError):  # not every kernel has both
            found = re.search(r"\[(\w+)\]", path.read_text())
            if found and found[1] in ("never", "deny"):
                raise ConfigError(
                    f"{CONFIG_KEY}: huge_pages: {path} is set to {found[1]}: the kernel gives none. Write "
                    f"{'advise' if is_shared else 'madvise'} into it, or set huge_pages to off"
                )
            if found and found[1] != "inherit":
                return


def _advise_huge_pages(mapping: mmap.mmap, is_shared: bool) -> None:
    check_huge_pages(is_shared)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise ConfigError(
            f"{CONFIG_KEY}: the kernel refuses transparent huge pages ({error}); set huge_pages "
            "to off, or enable /sys/kernel/mm/transparent_hugepage/enabled"
        ) from error


def _place_on_node(address: int, num_bytes: int, node: int, mode: int) -> None:
    if platform.machine() not in _SYS_MBIND:
        raise ConfigError(f"{CONFIG_KEY}: numa_node is not supported on {platform.machine()}; drop it")
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    if node < _MAX_NODES:
        mask[node // 64] = 1 << (node % 64)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_void_p(address), ctypes.c_ulong(num_bytes), mode, mask, ctypes.c_ulong(_MAX_NODES), 0)
    if libc.syscall(_SYS_MBIND[platform.machine()], *arguments) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"{CONFIG_KEY}: cannot place the host store on numa_node {node}: {reason}. {_known_nodes()}")


def _known_nodes() -> str:
    online = Path("/sys/devices/system/node/online")
    return f"Nodes here: {online.read_text().strip()}" if online.exists() else "This machine shows no NUMA nodes"


def _lock(memory: torch.Tensor, num_bytes: int) -> None:
    """mlock(2); the kernel unlocks when the mapping goes away."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(num_bytes)) != 0:
        code = ctypes.get_errno()
        raise _pin_failure(num_bytes, os.strerror(code) if code != errno.ENOMEM else "limit reached")


def _register_with_cuda(memory: torch.Tensor, read_only: bool) -> Callable[[], object]:
    """cudaHostRegister: page-locked, and mapped for kernels, which read it at link speed.

    Returns what undoes it.
    """
    runtime = torch.cuda.cudart()
    flags = _CUDA_PORTABLE_AND_MAPPED | (_CUDA_READ_ONLY if read_only else 0)
    status = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), flags)
    if int(status) != 0:
        reason = f"cudaHostRegister returned {status}"
        if read_only:
            reason += ": for read-only memory, which not every driver takes; shared_store off needs none"
        raise _pin_failure(memory.numel(), reason, on_gpu=True)
    return partial(runtime.cudaHostUnregister, memory.data_ptr())


def _release(unregister: Callable[[], object], mapping: mmap.mmap) -> None:
    """Undo the registration while `mapping` still exists: it goes away with this call's arguments."""
    unregister()


def _pin_failure(num_bytes: int, reason: str, on_gpu: bool = False) -> ConfigError:
    remedy = "serve a checkpoint with fewer bits per weight: a GPU reads page-locked memory alone"
    return ConfigError(
        f"{CONFIG_KEY}: cannot page-lock {num_bytes / 1e6:.1f} MB of host memory ({reason}; memlock limit "
        f"{describe_memlock_limit()}). Raise the limit (`ulimit -l unlimited`, in a container `--ulimit memlock=-1`) "
        f"or {remedy if on_gpu else 'set pin_memory to off'}"
    )


def check_can_lock(num_bytes: int) -> None:
    """Raise ConfigError where mlock will not take so much: beyond the limit, without the right to exceed it."""
    limit = memlock_limit_bytes()
    if limit is not None and num_bytes > limit and not _may_exceed_memlock_limit():
        raise _pin_failure(num_bytes, "more than the limit")


def _may_exceed_memlock_limit() -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(found and int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def memlock_limit_bytes() -> int | None:
    """RLIMIT_MEMLOCK of this process in bytes, None when unlimited."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def describe_memlock_limit() -> str:
    """The limit in words."""
    limit = memlock_limit_bytes()
    return "unlimited" if limit is None else f"{limit / 1e6:.1f} MB"
