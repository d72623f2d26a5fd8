"""The row space of a layer on the CPU platform: E rows of every expert tensor, of which the last E - C are shared.

Every expert tensor is one contiguous virtual tensor of E rows, as in plain vLLM. The pages up to the end of slot C - 1
are the layer's own. The pages behind them are the same for all layers: one memfd, mapped once per layer with MAP_FIXED.
A row that straddles the last private page is an overflow row, so nothing needs alignment.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.memory.extent import Extent

_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class RowSpaceError(ConfigError):
    """The system does not give memory as the row space needs it. The message names what, and what helps."""


class RowSpace(NamedTuple):
    """One layer's rows. `tensors[name]` has shape (E, *row): rows below C are the slots, the others overflow rows."""

    tensors: dict[str, torch.Tensor]
    private_bytes: int


class SharedRows:
    """The memory behind the overflow rows of all layers whose records have one shape and that have C slots.

    With two areas the overflow rows of layers in different areas do not touch each other. All memory starts zeroed, and
    is gone with the last tensor over it.
    """

    def __init__(self, rows_like: Mapping[str, torch.Tensor], num_slots: int, areas: int = 1) -> None:
        """`rows_like[name]` (E, *row): the shape and dtype of each expert tensor. Raises RowSpaceError."""
        self._rows_like = {name: torch.empty_like(tensor, device="meta") for name, tensor in rows_like.items()}
        self._extents = {
            name: Extent.of(tensor[0].nbytes, len(tensor), num_slots, mmap.PAGESIZE)
            for name, tensor in self._rows_like.items()
        }
        self._area_bytes = sum(extent.shared for extent in self._extents.values())
        self.num_bytes = areas * self._area_bytes
        """Bytes of all areas."""
        self._file = -1
        if self.num_bytes:
            self._file = _create_file(self.num_bytes)
            weakref.finalize(self, os.close, self._file)

    def row_space(self, area: int) -> RowSpace:
        """A new layer's rows, its overflow rows in area number `area`. Raises RowSpaceError."""
        tensors, offset = {}, area * self._area_bytes
        for name, like in self._rows_like.items():
            extent = self._extents[name]
            rows = self._map(extent, offset)[: prod(like.shape) * like.element_size()]
            tensors[name] = rows.view(like.dtype).view(like.shape)
            offset += extent.shared
        return RowSpace(tensors, sum(extent.private for extent in self._extents.values()))

    def _map(self, extent: Extent, offset: int) -> torch.Tensor:
        """uint8 over the private pages and, behind them, the file's from `offset` on."""
        size, anonymous = extent.private + extent.shared, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _mmap(None, size, _PROT_NONE, anonymous | _MAP_NORESERVE, -1, 0)
        try:
            _mmap(address, extent.private, mmap.PROT_READ | mmap.PROT_WRITE, anonymous | _MAP_FIXED, -1, 0)
            if extent.shared:
                behind, flags = address + extent.private, mmap.MAP_SHARED | _MAP_FIXED
                _mmap(behind, extent.shared, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, offset)
        except RowSpaceError:
            _libc.munmap(address, size)
            raise
        view = memoryview((ctypes.c_uint8 * size).from_address(address))
        # Every tensor over the mapping keeps this view alive. Threads may still copy when Python ends, hence not then.
        weakref.finalize(view, _libc.munmap, address, size).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)


def _create_file(num_bytes: int) -> int:
    try:
        file = os.memfd_create("expert_prefetch")
    except OSError as error:
        raise RowSpaceError(
            f"{CONFIG_KEY}: memfd_create failed ({error.strerror}), and overflow rows need it: allow this system call "
            "in the container's seccomp profile, or give every expert a slot (cache_fraction 1)"
        ) from error
    try:
        os.ftruncate(file, num_bytes)
    except OSError as error:
        os.close(file)
        raise RowSpaceError(f"{CONFIG_KEY}: no {num_bytes} bytes for overflow rows: {error.strerror}") from error
    return file


def _mmap(address: int | None, size: int, protection: int, flags: int, file: int, offset: int) -> int:
    mapped = _libc.mmap(address, size, protection, flags, file, offset)
    if mapped == _FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise RowSpaceError(
            f"{CONFIG_KEY}: cannot map {size} bytes for expert rows: {reason}. Look at the memory limit and at "
            "vm.max_map_count, or give less to the cache"
        )
    return int(mapped)
