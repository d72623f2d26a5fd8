"""Staging: exactly the right rows reach exactly the right slots, and what that is counted as."""

import time

import pytest
import torch
from expert_tensors import NUM_EXPERTS, bits, expert_tensors

from vllm_expert_prefetch.experts import EmulatedLink, HostMemoryOptions, HostStore, SlotPool, TorchStaging

NUM_SLOTS = 4
POISON = 0x5A
CPU = torch.device("cpu")


def poisoned(store, num_slots=NUM_SLOTS):
    """A pool whose every byte is POISON."""
    pool = SlotPool(store.views, num_slots, CPU)
    for tensor in pool.tensors.values():
        tensor.view(torch.uint8).fill_(POISON)
    return pool


def assert_slots_hold(pool, tensors, expert_in):
    """`expert_in[slot]` is the expert whose rows the slot must hold bit by bit; every other slot is poison."""
    for name, tensor in pool.tensors.items():
        for slot in range(pool.num_slots):
            if slot in expert_in:
                assert torch.equal(bits(tensor[slot]), bits(tensors[name][expert_in[slot]])), (name, slot)
            else:
                assert (bits(tensor[slot]) == POISON).all(), f"{name}: slot {slot} was written to"


@pytest.fixture
def tensors():
    return expert_tensors()


@pytest.fixture
def store(tensors):
    return HostStore(tensors, HostMemoryOptions())


@pytest.fixture
def pool(store):
    return poisoned(store)


@pytest.fixture
def staging(store, pool):
    return TorchStaging(store, pool, link=None)


def test_a_pool_is_zero_before_its_first_use_and_knows_its_size(store):
    pool = SlotPool(store.views, NUM_SLOTS, CPU)
    assert all(not tensor.any() for tensor in pool.tensors.values())
    assert all(len(tensor) == NUM_SLOTS and tensor.is_contiguous() for tensor in pool.tensors.values())
    assert pool.num_bytes == NUM_SLOTS * (760 + 308 + 4 + 3 + 257)


@pytest.mark.parametrize("copy", ["stage", "fill"])
def test_copies_exactly_the_rows_asked_for_and_nothing_else(copy, tensors, pool, staging):
    getattr(staging, copy)([(5, 0), (2, 3)])
    assert_slots_hold(pool, tensors, {0: 5, 3: 2})


def test_the_last_copy_into_a_slot_stays(tensors, pool, staging):
    staging.stage([(0, 1), (4, 2)])
    staging.stage([(3, 1)])
    assert_slots_hold(pool, tensors, {1: 3, 2: 4})


def test_a_record_may_lie_in_several_slots(tensors, pool, staging):
    staging.stage([(1, 0), (1, 2)])
    assert_slots_hold(pool, tensors, {0: 1, 2: 1})


def test_staging_changes_no_record(tensors, store, staging):
    staging.stage([(expert, expert % NUM_SLOTS) for expert in range(NUM_EXPERTS)])
    for name, tensor in tensors.items():
        assert torch.equal(store.views[name], tensor)


def test_a_streamed_step_takes_what_is_cached_from_the_slots_and_the_rest_from_the_host(tensors, store, pool, staging):
    buffer = poisoned(store, NUM_EXPERTS)
    staging.fill([(2, 0), (4, 3)])
    for name in tensors:
        pool.tensors[name][0].zero_()  # tells the slot's copy from the host's
    staging.stage_stream([(1, 1), (5, 5)], [(2, 0), (4, 3)], buffer)
    in_slots = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in in_slots.values():
        tensor[2].zero_()
    assert_slots_hold(buffer, in_slots, {1: 1, 2: 2, 4: 4, 5: 5})
    assert_slots_hold(pool, in_slots, {0: 2, 3: 4})
    assert staging.total_bytes == 2 * store.record_bytes, "copies from slot to buffer do not cross the link"


def test_totals_count_the_records_staged_until_they_are_reset(store, staging):
    assert (staging.total_bytes, staging.total_seconds) == (0, 0.0)
    staging.stage([(0, 0), (1, 1)])
    staging.stage([(2, 2)])
    assert staging.total_bytes == 3 * store.record_bytes
    assert staging.total_seconds > 0
    staging.reset_totals()
    assert (staging.total_bytes, staging.total_seconds) == (0, 0.0)
    staging.stage([(3, 1)])
    assert staging.total_bytes == store.record_bytes


def test_filling_is_not_counted(staging):
    staging.fill([(0, 0), (1, 1), (2, 2)])
    assert (staging.total_bytes, staging.total_seconds) == (0, 0.0)


@pytest.mark.parametrize("num_records", [1, 3])
def test_an_emulated_link_makes_a_batch_last_as_long_as_its_records_would(store, pool, num_records):
    link = EmulatedLink(gbps=store.record_bytes / 10e6, latency_us=2000)  # 10 ms per record, 2 ms per batch
    staging = TorchStaging(store, pool, link)
    expected = 0.002 + 0.010 * num_records
    lasted = []
    for _ in range(4):
        started = time.perf_counter()
        staging.stage([(expert, expert) for expert in range(num_records)])
        lasted.append(time.perf_counter() - started)
    assert expected <= min(lasted) < 2 * expected
    assert staging.total_seconds >= 4 * expected


def test_filling_is_not_slowed_by_an_emulated_link(store, pool):
    staging = TorchStaging(store, pool, EmulatedLink(gbps=1e-6, latency_us=1e6))  # one batch: a second and more
    lasted = []
    for _ in range(3):
        started = time.perf_counter()
        staging.fill([(0, 0)])
        lasted.append(time.perf_counter() - started)
    assert min(lasted) < 0.5
