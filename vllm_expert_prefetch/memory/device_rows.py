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


def bytes_taken() -> int:
    """Physical bytes behind all mapped rows of this process, shared ones once; plain tensors are not among them."""
    library: Any = cuda_library()
    return int(library.row_space_bytes())


class DeviceSharedRows:
    """The memory behind the overflow rows of all layers whose records have one shape and that have C slots.

    As `row_space.SharedRows`: all memory starts zeroed, and is given back with the last tensor over it.
    """

    def __init__(self, rows_like: Mapping[str, torch.Tensor], num_slots: int, areas: int, device: torch.device) -> None:
        """`rows_like[name]` (E, *row): the shape and dtype of each expert tensor. Raises RowSpaceError."""
        self._library: Any = cuda_library()
        self._device = torch.device("cuda", _index(device))
        self._rows_like = {name: torch.empty_like(tensor, device="meta") for name, tensor in rows_like.items()}
        page = granularity(device)
        self._extents = {
            name: Extent.of(tensor[0].nbytes, len(tensor), num_slots, page) for name, tensor in self._rows_like.items()
        }
        shared = {name: extent.shared for name, extent in self._extents.items() if extent.shared}
        self._areas = [{name: self._create(size) for name, size in shared.items()} for _ in range(areas)]
        self.num_bytes = areas * sum(shared.values())
        """Bytes of all areas."""

    def row_space(self, area: int) -> RowSpace:
        """A new layer's rows, its overflow rows in area number `area`. Raises RowSpaceError."""
        tensors, private_bytes = {}, 0
        for name, like in self._rows_like.items():
            shared = self._areas[area].get(name)
            if shared is None:
                tensors[name] = _with_memory(lambda like=like: torch.zeros_like(like, device=self._device))  # type: ignore[misc]
                private_bytes += tensors[name].nbytes
            else:
                tensors[name] = self._map(like, self._extents[name].private, shared)
                private_bytes += self._extents[name].private
        return RowSpace(tensors, private_bytes)

    def _map(self, like: torch.Tensor, private_bytes: int, shared: Any) -> torch.Tensor:
        parts = [self._create(private_bytes), shared]
        mapped = torch.from_dlpack(_with_memory(lambda: self._library.row_space_map(parts)))
        return mapped[: prod(like.shape) * like.element_size()].view(like.dtype).view(like.shape)

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
