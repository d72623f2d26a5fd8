"""The row space of a layer on a GPU: as `row_space`, with CUDA's virtual memory in place of the system's.

What is shared are pieces of physical memory, one for each expert tensor and area, mapped behind the private pages of
every layer's tensor (csrc/cuda/row_space.cu). Where sharing would save less than one page, a tensor is a plain one.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

import torch

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.memory.extent import Extent
from vllm_expert_prefetch.memory.row_space import RowSpace, RowSpaceError
from vllm_expert_prefetch.native.library import cuda_library

_Result = TypeVar("_Result")


def granularity(device: torch.device) -> int:
    """Bytes that can be mapped at least, on this GPU. Raises RowSpaceError where nothing can be mapped."""
    library: Any = cuda_library()
    try:
        return int(library.row_space_granularity(_index(device)))
    except RuntimeError as error:
        raise RowSpaceError(
            f"{CONFIG_KEY}: {error}; overflow rows need it: give every expert a slot (cache_fraction 1), or serve "
            "without the plugin"
        ) from error


class DeviceSharedRows:
    """The row spaces of all layers whose records have one shape and that have C slots, and what is behind their rows.

    As `row_space.SharedRows`: all memory starts zeroed, and is given back with this and the last tensor over it.
    """

    def __init__(self, rows_like: Mapping[str, torch.Tensor], num_slots: int, areas: int, device: torch.device) -> None:
        """`rows_like[name]` (E, *row): the shape and dtype of each expert tensor. Raises RowSpaceError."""
        self._library: Any = cuda_library()
        self._device = torch.device("cuda", _index(device))
        self._page = granularity(device)
        self._rows_like = {name: torch.empty_like(tensor, device="meta") for name, tensor in rows_like.items()}
        self._extents = self._with_slots(num_slots)
        self._ranges: list[tuple[str, int, Any]] = []
        """Of each tensor that shares: its name, its layer's number, its addresses."""
        self.private_bytes = 0
        """Behind the slots of all row spaces made so far."""
        self._num_areas = areas
        self._areas = self._create_areas()

    @property
    def num_bytes(self) -> int:
        """Behind the overflow rows, in all areas."""
        return self._num_areas * sum(extent.shared for extent in self._extents.values())

    def row_space(self, number: int) -> RowSpace:
        """A new layer's rows; `number`: the how manieth layer it is. Raises RowSpaceError."""
        space, private_bytes = {}, 0
        for name, like in self._rows_like.items():
            extent = self._extents[name]
            if not extent.shared:
                space[name] = _with_memory(lambda like=like: torch.zeros_like(like, device=self._device))  # type: ignore[misc]
                private_bytes += space[name].nbytes
                continue
            size = extent.private + extent.shared
            addresses = _with_memory(lambda size=size: self._library.row_space_reserve(size, self._device.index))  # type: ignore[misc]
            self._push(addresses, self._create(extent.private))
            self._push(addresses, self._areas[number % self._num_areas][name])
            self._ranges.append((name, number, addresses))
            rows = torch.from_dlpack(self._library.row_space_tensor(addresses))
            space[name] = rows[: prod(like.shape) * like.element_size()].view(like.dtype).view(like.shape)
            private_bytes += extent.private
        self.private_bytes += private_bytes
        return space

    def grow(self, num_slots: int, areas: int) -> None:
        """Give every row space `num_slots` slots, no fewer than it has: rows stay where they are, overflow rows become
        slots, and there are so many areas of the others. What rows held is lost. Raises RowSpaceError. Not while steps
        run.
        """
        before, self._extents = self._extents, self._with_slots(num_slots)
        for _, _, addresses in self._ranges:
            self._library.row_space_pop(addresses)
        self._areas, self._num_areas = [], areas
        self._areas = self._create_areas()
        for name, number, addresses in self._ranges:
            added = self._extents[name].private - before[name].private
            if added:
                self._push(addresses, self._create(added))
                self.private_bytes += added
            if self._extents[name].shared:
                self._push(addresses, self._areas[number % areas][name])

    def _with_slots(self, num_slots: int) -> dict[str, Extent]:
        return {
            name: Extent.of(tensor[0].nbytes, len(tensor), num_slots, self._page)
            for name, tensor in self._rows_like.items()
        }

    def _create_areas(self) -> list[dict[str, Any]]:
        shared = {name: extent.shared for name, extent in self._extents.items() if extent.shared}
        return [{name: self._create(size) for name, size in shared.items()} for _ in range(self._num_areas)]

    def _push(self, addresses: Any, memory: Any) -> None:
        """Map `memory`, zeroed, behind what is mapped in `addresses`."""
        _with_memory(lambda: self._library.row_space_push(addresses, memory))

    def _create(self, num_bytes: int) -> Any:
        """Physical memory, not mapped yet."""
        return _with_memory(lambda: self._library.row_space_create(num_bytes, self._device.index))


def _with_memory(take: Callable[[], _Result]) -> _Result:
    """What `take` returns; tried again without what torch keeps for later."""
    try:
        return take()
    except RuntimeError:
        torch.cuda.empty_cache()
    try:
        return take()
    except RuntimeError as error:
        raise RowSpaceError(
            f"{CONFIG_KEY}: {error}: give less to the cache (slots_per_layer, cache_fraction or cache_gb)"
        ) from error


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
