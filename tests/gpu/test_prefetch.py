"""Prefetch copies: demand first, cancelled and claimed records left alone, a late record waited for."""

import time

import pytest
import torch
from gpu_layer import CLAIMED, COPYING, DROPPED, QUEUED, READY, URGENT, word

ROW_BYTES = [256 * 1024, 48]


def set_demand_active(layer, value):
    layer.caches.lane[0] = value


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"


@pytest.fixture
def layer(make_layer):
    made = make_layer(ROW_BYTES, 9, 6, num_prefetch_blocks=4)
    yield made
    set_demand_active(made, 0)
    torch.cuda.synchronize()


@pytest.mark.parametrize("num_blocks", [1, 4, 300])
def test_queued_records_land(make_layer, num_blocks):
    layer = make_layer(ROW_BYTES, 9, 6, num_prefetch_blocks=num_blocks)
    for loads in ([(8, 0), (3, 4)], [(1, 2)], []):
        layer.queue(loads)
        layer.cache.copy_ahead()
        layer.caches.join()
        assert all(layer.holds(slot, expert) for expert, slot in loads)
        assert all(layer.state(slot) == READY for _, slot in loads)
    assert layer.is_untouched(1)


@pytest.mark.parametrize("state", [READY, CLAIMED, DROPPED])
def test_what_is_not_queued_is_left_alone(layer, state):
    layer.queue([(1, 1), (2, 2), (3, 3)])
    layer.words[2] = word(state)
    layer.cache.copy_ahead()
    layer.caches.join()
    assert layer.holds(1, 1)
    assert layer.holds(3, 3)
    assert layer.is_untouched(2)
    assert layer.state(2) == state


def test_an_entry_whose_slot_was_queued_again_for_another_expert_is_stale(layer):
    layer.queue([(1, 1)], ticket=4)
    layer.words[1] = word(QUEUED, ticket=5)
    layer.cache.copy_ahead()
    layer.caches.join()
    assert layer.is_untouched(1)


def test_a_prefetch_starts_nothing_while_a_demand_copies(layer):
    set_demand_active(layer, 1)
    layer.queue([(1, 1), (2, 2)])
    layer.cache.copy_ahead()
    time.sleep(0.05)
    assert [layer.state(1), layer.state(2)] == [QUEUED, QUEUED]
    assert layer.is_untouched(1)
    set_demand_active(layer, 0)
    layer.caches.join()
    assert layer.holds(1, 1)
    assert layer.holds(2, 2)


def test_what_is_cancelled_while_the_lane_yields_never_starts(layer):
    set_demand_active(layer, 1)
    layer.queue([(1, 1), (2, 2)])
    layer.cache.copy_ahead()
    layer.words[1] = word(DROPPED)
    layer.words[2] = word(DROPPED)
    wait_until(layer.caches.stream.query)  # the kernel ends although the demand does not
    assert layer.is_untouched(1)
    assert layer.is_untouched(2)


def test_a_claimed_record_is_copied_by_the_demand(layer):
    set_demand_active(layer, 1)
    layer.queue([(1, 1)])
    layer.cache.copy_ahead()
    layer.words[1] = word(CLAIMED)
    layer.ask([(1, 1)])
    layer.cache.gather()
    assert layer.holds(1, 1)
    assert layer.state(1) == READY


def test_an_urgent_record_passes_while_a_demand_copies(layer):
    set_demand_active(layer, 1)
    layer.queue([(1, 1)], state=URGENT)
    layer.cache.copy_ahead()
    wait_until(lambda: layer.state(1) == READY)
    assert layer.holds(1, 1)


def test_a_late_record_is_whole_when_the_next_kernel_runs(make_layer):
    layer = make_layer([64 << 20], 3, 3, num_prefetch_blocks=2)
    other = torch.cuda.Stream()
    for _ in range(5):
        layer.tensors["tensor0"][1].zero_()
        layer.queue([(2, 1)])
        torch.cuda.synchronize()
        layer.cache.copy_ahead()
        layer.ask([(0, 0)], late=[1])
        with torch.cuda.stream(other):  # looks without waiting for the lane
            wait_until(lambda: layer.state(1) != QUEUED)
        layer.cache.gather()
        seen = layer.tensors["tensor0"][1].clone()
        assert torch.equal(seen, layer.truth["tensor0"][2])
        layer.caches.join()


@pytest.mark.parametrize("state", [QUEUED, CLAIMED, DROPPED])
def test_waiting_for_what_nobody_copies_is_refused_not_endless(layer, state):
    layer.words[1] = word(state)
    layer.ask([], late=[1, 99])
    layer.cache.gather()
    torch.cuda.synchronize()
    layer.num_expected_errors = 2


def test_a_record_that_is_coming_needs_no_second_copy(layer):
    """A wait beside a demand, whose copies hold the prefetch back: the wait makes it urgent, so it ends."""
    set_demand_active(layer, 1)
    layer.queue([(1, 1)], state=COPYING)
    layer.cache.copy_ahead()
    layer.ask([(0, 0)], late=[1])
    layer.cache.gather()
    torch.cuda.current_stream().synchronize()
    assert layer.holds(1, 1)


@pytest.mark.parametrize("num_blocks", [(1, 2000), (2000, 1), (132, 132)])
def test_crowded_grids_end(make_layer, num_blocks):
    """More blocks than the GPU can hold, demands and prefetches of two layers at once."""
    demand, prefetch = (min(number, 1024) for number in num_blocks)
    first = make_layer(ROW_BYTES, 9, 6, num_demand_blocks=demand, num_prefetch_blocks=prefetch)
    second = make_layer(ROW_BYTES, 9, 6, caches=first.caches)
    for step in range(50):
        second.queue([(step % 9, 1), ((step + 1) % 9, 2)])
        first.ask([((step + number) % 9, number) for number in range(6)])
        second.cache.copy_ahead()
        first.cache.gather()
        first.caches.join()
        assert second.holds(2, (step + 1) % 9)
        assert first.holds(5, (step + 5) % 9)
