"""The caches and the shared rows of the platform that a worker computes on."""

import mmap
from collections.abc import Mapping
from typing import Any

import torch

from vllm_expert_prefetch.cache.base import Caches
from vllm_expert_prefetch.cache.host import HostCaches
from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.memory.row_space import SharedRows
from vllm_expert_prefetch.native.library import host_library, why_not_cuda, why_not_host


def why_no_cache(on_gpu: bool) -> str | None:
    """Why this platform's engine is not there, and what helps; None when it is."""
    return why_not_host() or (why_not_cuda() if on_gpu else None)


def create_caches(num_layers: int, link: EmulatedLink | None, device: torch.device, depth: int = 1) -> Caches:
    """Caches for `num_layers` MoE layers on `device`; `depth`: how many layers ahead guesses are, at most.

    Raises ConfigError where the platform's library is missing.
    """
    missing = why_no_cache(device.type == "cuda")
    if missing:
        raise ConfigError(f"{CONFIG_KEY}: {missing}")
    if device.type == "cuda":
        from vllm_expert_prefetch.cache.device import DeviceCaches

        return DeviceCaches(num_layers, device, depth=depth)
    return HostCaches(host_library(), num_layers, link, depth=depth)


def create_shared_rows(rows_like: Mapping[str, torch.Tensor], num_slots: int, areas: int, device: torch.device) -> Any:
    """The overflow rows of all layers whose records have this shape. Raises RowSpaceError."""
    if device.type == "cuda":
        from vllm_expert_prefetch.memory.device_rows import DeviceSharedRows

        return DeviceSharedRows(rows_like, num_slots, areas, device)
    return SharedRows(rows_like, num_slots, areas)


def page_bytes(device: torch.device) -> int:
    """What can be mapped at least, in bytes."""
    if device.type == "cuda":
        from vllm_expert_prefetch.memory.device_rows import granularity

        return granularity(device)
    return mmap.PAGESIZE
