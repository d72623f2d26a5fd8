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

import torch

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.memory.extent import Extent

_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0
_ANONYMOUS, _READ_WRITE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class RowSpaceError(ConfigError):
    """The system does not give memory as the row space needs it. The message names what, and what helps."""


RowSpace = dict[str, torch.Tensor]
"""One layer's rows: of shape (E, *row) by name. Rows below C are the slots, the others overflow rows."""


class SharedRows:
    """The row spaces of all layers whose records have one shape and that have C slots, and what is behind their rows.

    With two areas layers that follow each other have overflow rows that do not touch. All memory starts zeroed, and is
    gone with the last tensor over it.
    """

    def __init__(self, rows_like: Mapping[str, torch.Tensor], num_slots: int, areas: int = 1) -> None:
        """`rows_like[name]` (E, *row): the shape and dtype of each expert tensor. Raises RowSpaceError."""
        self._rows_like = {name: torch.empty_like(tensor, device="meta") for name, tensor in rows_like.items()}
        self._areas = areas
        self._extents = self._with_slots(num_slots)
        self._mapped: list[tuple[weakref.ref[memoryview], int, str, int]] = []
        """Of each tensor that was made: what keeps its mapping alive, its address, its name, its layer's number."""
        self._num_row_spaces = 0
        self._file = -1
        if self.num_bytes:
            self._file = _create_file(self.num_bytes)
            weakref.finalize(self, os.close, self._file)

    @property
    def num_bytes(self) -> int:
        """Behind the overflow rows, in all areas."""
        return self._areas * sum(extent.shared for extent in self._extents.values())

    @property
    def private_bytes(self) -> int:
        """Behind the slots of all row spaces made so far."""
        return self._num_row_spaces * sum(extent.private for extent in self._extents.values())

    def row_space(self, number: int) -> RowSpace:
        """A new layer's rows; `number`: the how manieth layer it is. Raises RowSpaceError."""
        space = {}
        for name, like in self._rows_like.items():
            rows = self._map(name, number)[: prod(like.shape) * like.element_size()]
            space[name] = rows.view(like.dtype).view(like.shape)
        self._num_row_spaces += 1
        return space

    def grow(self, num_slots: int, areas: int) -> None:
        """Give every row space `num_slots` slots, no fewer than it has: rows stay where they are, overflow rows become
        slots, and there are so many areas of the others. What rows held is lost. Raises RowSpaceError. Not while steps
        run.
        """
        before, self._extents = self._extents, self._with_slots(num_slots)
        self._areas = areas
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, self.num_bytes)
        for view, address, name, number in self._mapped:
            if view() is not None:
                begin, end = before[name].private, self._extents[name].private
                if end > begin:
                    _map_private(address + begin, end - begin)
                self._map_shared(address, name, number)

    def _with_slots(self, num_slots: int) -> dict[str, Extent]:
        return {
            name: Extent.of(tensor[0].nbytes, len(tensor), num_slots, mmap.PAGESIZE)
            for name, tensor in self._rows_like.items()
        }

    def _map(self, name: str, number: int) -> torch.Tensor:
        """uint8 over the private pages and, behind them, the file's."""
        extent = self._extents[name]
        size = extent.private + extent.shared
        address = _mmap(None, size, _PROT_NONE, _ANONYMOUS | _MAP_NORESERVE, -1, 0)
        try:
            _map_private(address, extent.private)
            self._map_shared(address, name, number)
        except RowSpaceError:
            _libc.munmap(address, size)
            raise
        view = memoryview((ctypes.c_uint8 * size).from_address(address))
        # Every tensor over the mapping keeps this view alive. Threads may still copy when Python ends, hence not then.
        weakref.finalize(view, _libc.munmap, address, size).atexit = False
        self._mapped.append((weakref.ref(view), address, name, number))
        return torch.frombuffer(view, dtype=torch.uint8)

    def _map_shared(self, address: int, name: str, number: int) -> None:
        """The file's pages of the layer's area, behind the private ones of the tensor at `address`."""
        extent, names = self._extents[name], list(self._extents)
        if extent.shared:
            area = number % self._areas * sum(other.shared for other in self._extents.values())
            offset = area + sum(self._extents[other].shared for other in names[: names.index(name)])
            flags = mmap.MAP_SHARED | _MAP_FIXED
            _mmap(address + extent.private, extent.shared, _READ_WRITE, flags, self._file, offset)


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


def _map_private(address: int, size: int) -> None:
    """Pages of their own, zero, in place of what is mapped there."""
    _mmap(address, size, _READ_WRITE, _ANONYMOUS | _MAP_FIXED, -1, 0)


def _mmap(address: int | None, size: int, protection: int, flags: int, file: int, offset: int) -> int:
    mapped = _libc.mmap(address, size, protection, flags, file, offset)
    if mapped == _FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise RowSpaceError(
            f"{CONFIG_KEY}: cannot map {size} bytes for expert rows: {reason}. Look at the memory limit and at "
            "vm.max_map_count, or give less to the cache"
        )
    return int(mapped)
