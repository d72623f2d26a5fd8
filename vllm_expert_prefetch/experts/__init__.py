"""The bytes: host store, slot pool and the staging between them. Imports torch, never vLLM."""

from vllm_expert_prefetch.experts.bandwidth import measure_bandwidth
from vllm_expert_prefetch.experts.device_cache import DeviceLayerCache
from vllm_expert_prefetch.experts.device_staging import DeviceLane
from vllm_expert_prefetch.experts.host_memory import HostMemory, HostMemoryOptions, numa_node_of_gpu
from vllm_expert_prefetch.experts.host_store import HostStore
from vllm_expert_prefetch.experts.layer_cache import LayerCache, NativeLayerCache, PythonLayerCache, Step, slot_ids_of
from vllm_expert_prefetch.experts.link import EmulatedLink
from vllm_expert_prefetch.experts.native_planner import POLICY_NUMBERS, NativePlanner
from vllm_expert_prefetch.experts.native_predictor import NativePredictor, PredictorWeights, can_predict
from vllm_expert_prefetch.experts.native_staging import NativeStaging, StagingLane
from vllm_expert_prefetch.experts.slot_pool import SlotPool
from vllm_expert_prefetch.experts.staging import TorchStaging

__all__ = [
    "POLICY_NUMBERS",
    "DeviceLane",
    "DeviceLayerCache",
    "EmulatedLink",
    "HostMemory",
    "HostMemoryOptions",
    "HostStore",
    "LayerCache",
    "NativeLayerCache",
    "NativePlanner",
    "NativePredictor",
    "NativeStaging",
    "PredictorWeights",
    "PythonLayerCache",
    "SlotPool",
    "StagingLane",
    "Step",
    "TorchStaging",
    "can_predict",
    "measure_bandwidth",
    "numa_node_of_gpu",
    "slot_ids_of",
]
