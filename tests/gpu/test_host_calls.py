"""What the host does around the kernels: no synchronisation, no CUDA at import, errors with numbers."""

import pytest
import torch
from processes import run_python

from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore


@pytest.fixture
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_call_synchronises(make_layer, request):
    layer = make_layer([4096], 9, 6)
    ids, rows = torch.tensor([[1], [2]], device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    request.getfixturevalue("no_synchronisation")
    layer.cache.prefetch(ids, rows)
    layer.cache.serve(ids, rows)
    layer.cache.prefetch(ids[0], rows)
    layer.cache.set_budget(3, 9)
    layer.cache.words()
    layer.caches.join()


def test_importing_it_starts_no_cuda():
    output = run_python("""
        import os
        import torch
        import vllm_expert_prefetch.cache.device
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
        layer.caches.add(1, pageable, layer.shared.row_space(0), 2, 1, "lru")


def test_rows_of_odd_length_are_refused_with_the_number(make_layer):
    with pytest.raises(ValueError, match="is 4104, must be a positive multiple of 16"):
        make_layer([4104], 4, 2)


def test_a_closed_cache_serves_no_more(make_layer):
    layer = make_layer([4096], 4, 2)
    ids, rows = torch.tensor([[1]], device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    layer.cache.serve(ids, rows)
    layer.caches.close()
    with pytest.raises(RuntimeError, match="closed"):
        layer.cache.serve(ids, rows)


def test_the_measured_bandwidth_is_that_of_the_link(make_layer):
    """Between PCIe 3 on 4 lanes and NVLink-C2C; a copy that moved nothing would be faster than either."""
    layer = make_layer([8 << 20, 1 << 20], 4, 2)
    assert 2e9 < layer.caches.measure_bandwidth() < 500e9
    assert layer.holds(3, 3)
    assert layer.cache.words().lookups == 0
