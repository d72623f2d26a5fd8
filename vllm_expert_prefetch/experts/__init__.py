"""The bytes: host store, slot pool and the staging between them. Imports torch, never vLLM."""

from vllm_expert_prefetch.experts.bandwidth import measure_bandwidth
from vllm_expert_prefetch.experts.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.experts.host_store import HostStore
from vllm_expert_prefetch.experts.link import EmulatedLink
from vllm_expert_prefetch.experts.slot_pool import SlotPool
from vllm_expert_prefetch.experts.staging import TorchStaging

__all__ = [
    "EmulatedLink",
    "HostMemory",
    "HostMemoryOptions",
    "HostStore",
    "SlotPool",
    "TorchStaging",
    "measure_bandwidth",
]
