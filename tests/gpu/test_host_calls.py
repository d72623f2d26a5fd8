"""What the host does around the kernels: no synchronisation, no CUDA at import, errors with numbers."""

import pytest
import torch
from processes import run_python

from vllm_expert_prefetch.experts.device_staging import DeviceStaging
from vllm_expert_prefetch.experts.host_memory import HostMemoryOptions
from vllm_expert_prefetch.experts.host_store import HostStore


@pytest.fixture
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_call_synchronises(make_layer, request):
    layer = make_layer([4096], 9, 6)
    layer.ask([(1, 1)])
    layer.queue([(2, 2)])
    request.getfixturevalue("no_synchronisation")
    layer.staging.prefetch(layer.ahead)
    layer.staging.stage(layer.demand)
    layer.staging.await_late(layer.demand)
    layer.staging.copy([(3, 3)])
    layer.lane.join()


def test_importing_it_starts_no_cuda():
    output = run_python("""
        import os
        import torch
        import vllm_expert_prefetch.experts.device_staging
        from vllm_expert_prefetch.native.library import cuda_library
        assert cuda_library() is not None
        assert not torch.cuda.is_initialized()
        if os.fork() == 0:
            torch.zeros(1, device="cuda")  # fails in a child of a process that has started CUDA
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """)
    assert output.strip() == "0"


def test_pageable_memory_is_refused(make_layer):
    layer = make_layer([4096], 4, 2)
    pageable = HostStore({"tensor0": torch.zeros(4, 4096, dtype=torch.uint8)}, HostMemoryOptions())
    with pytest.raises(RuntimeError, match="not mapped into device 0"):
        DeviceStaging(pageable.views, layer.pool, layer.lane)


def test_rows_of_odd_length_are_refused_with_the_number(make_layer):
    with pytest.raises(ValueError, match="is 4104, must be a positive multiple of 16"):
        make_layer([4104], 4, 2)
