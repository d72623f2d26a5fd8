"""The link, measured when a server starts: right, and without a trace."""

import pytest
import torch
from expert_tensors import bits, expert_tensors

from vllm_expert_prefetch.experts import (
    EmulatedLink,
    HostMemoryOptions,
    HostStore,
    SlotPool,
    TorchStaging,
    measure_bandwidth,
)


def make_staging(link=None):
    store = HostStore(expert_tensors(), HostMemoryOptions())
    pool = SlotPool(store.views, 4, torch.device("cpu"))
    staging = TorchStaging(store, pool, link)
    staging.fill([(expert, expert) for expert in range(4)])
    return staging, pool


@pytest.mark.parametrize("gbps", [0.0005, 0.002])
def test_an_emulated_link_is_measured_as_what_it_is(gbps):
    copies = [(make_staging(EmulatedLink(gbps, 0))[0], (2, 2)) for _ in range(3)]
    assert 0.5 * gbps * 1e9 < measure_bandwidth(copies) < 1.01 * gbps * 1e9  # slower where the machine is busy


def test_nothing_changes_and_nothing_is_counted():
    staging, pool = make_staging()
    before = {name: bits(tensor).clone() for name, tensor in pool.tensors.items()}
    assert measure_bandwidth([(staging, (1, 1))]) > 0
    assert (staging.total_bytes, staging.total_seconds) == (0, 0.0)
    assert all(torch.equal(bits(tensor), before[name]) for name, tensor in pool.tensors.items())


def test_without_a_resident_expert_there_is_nothing_to_measure():
    assert measure_bandwidth([]) == 0.0
