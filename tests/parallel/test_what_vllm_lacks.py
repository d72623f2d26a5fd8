"""What is refused because vLLM does not serve it in a way that a cache could: when that changes, a test fails."""

import inspect

import pytest
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep
from vllm.platforms.cpu import CpuPlatform


def test_the_cpu_build_serves_no_experts_with_data_parallelism():
    """Its engines gather their tokens by a call that its communicator does not have."""
    assert CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv
    with pytest.raises(NotImplementedError):
        CpuCommunicator.all_gatherv(None, None)


@pytest.mark.proves("Ray executor", says="refused by vLLM")
def test_the_ray_executor_refuses_the_cpu_platform():
    """It places workers by the name of their accelerator."""
    assert CpuPlatform.ray_device_key == ""


def test_data_parallel_engines_gather_tokens_in_the_kernels_call():
    """After the planner has given every expert of this engine's own tokens a row."""
    assert "dispatch(" in inspect.getsource(naive_dp_ep)


def test_the_cpu_builds_kernel_reads_no_expert_map():
    """Ids of other ranks' experts are rows to it, beyond the last one."""
    source = inspect.getsource(CPUUnquantizedExperts.apply)
    assert source.count("expert_map") == 1, "the parameter alone"
