"""What is refused because vLLM does not serve it in a way that a cache could: when that changes, a test fails."""

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from vllm.config.parallel import All2AllBackend, ParallelConfig
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep
from vllm.platforms.cpu import CpuPlatform

ALONE = FusedMoEParallelConfig.make_no_parallel()


def test_the_cpu_build_serves_no_experts_with_data_parallelism():
    """Its engines gather their tokens by a call that its communicator does not have."""
    assert CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv
    with pytest.raises(NotImplementedError):
        CpuCommunicator.all_gatherv(None, None)


@pytest.mark.proves("Ray executor", says="refused by vLLM")
def test_the_ray_executor_refuses_the_cpu_platform():
    """It places workers by the name of their accelerator."""
    assert CpuPlatform.ray_device_key == ""


def test_data_parallel_engines_gather_tokens_in_the_kernels_call(monkeypatch):
    """Ids of other engines' tokens join those that the planner has given rows, and nothing of the plugin sees them."""
    moe = SimpleNamespace(moe_parallel_config=replace(ALONE, dp_size=2))
    manager = SimpleNamespace(world_size=2)
    gathers = maybe_make_prepare_finalize(moe, None, allow_new_interface=True, all2all_manager=manager)
    gathered = [torch.full((4, 2), number) for number in range(3)]
    monkeypatch.setattr(naive_dp_ep, "get_ep_group", lambda: SimpleNamespace(dispatch=lambda *own, **options: gathered))
    own = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)
    x, _, _, ids, weights = gathers.prepare(*own, 8, None, False, FUSED_MOE_UNQUANTIZED_CONFIG)
    assert [x, weights, ids] == gathered


@pytest.mark.parametrize("backend", [name for name in get_args(All2AllBackend) if name != "passthrough"])
def test_expert_parallelism_alone_exchanges_no_tokens_whatever_the_all2all_backend(backend):
    """`passthrough` cannot be asked for: it comes with kernels that are refused."""
    asked = ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True, all2all_backend=backend)
    assert not asked.use_all2all
    alone = replace(ALONE, use_ep=True, ep_size=2, all2all_backend=backend)
    assert not alone.use_all2all_kernels
    assert replace(alone, dp_size=2).use_all2all_kernels


def test_the_cpu_builds_kernel_reads_no_expert_map():
    """Ids of other ranks' experts are rows to it, beyond the last one."""
    source = inspect.getsource(CPUUnquantizedExperts.apply)
    assert source.count("expert_map") == 1, "the parameter alone"
