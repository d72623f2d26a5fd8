"""A small layer on the GPU. Every test here needs a GPU and the CUDA library; without either it is skipped."""

import os
from pathlib import Path

import pytest
import torch
from gpu_layer import GpuLayer

HERE = Path(__file__).parent

# Some tests launch kernels while another one spins: CUDA must not load code then, which may wait for all kernels.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def pytest_collection_modifyitems(items):
    missing = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


def why_not():
    """What a test of this folder lacks here; asking starts no CUDA."""
    from vllm_expert_prefetch.native.library import why_not_cuda

    return "no NVIDIA GPU" if not torch.cuda.is_available() else why_not_cuda()


@pytest.fixture
def make_layer():
    """A function that makes GpuLayers. No kernel may report an error."""
    layers = []

    def make(*args, **options):
        layers.append(GpuLayer(*args, **options))
        return layers[-1]

    yield make
    torch.cuda.synchronize()
    for layer in layers:
        assert layer.caches.num_errors() == layer.num_expected_errors
