"""The row space of a GPU, as far as a machine without one can tell: what is asked of the driver."""

import weakref

import pytest
import torch

from vllm_expert_prefetch.memory import device_rows as module
from vllm_expert_prefetch.memory.device_rows import DeviceSharedRows, granularity
from vllm_expert_prefetch.memory.row_space import RowSpaceError

PAGE = 4096
DEVICE = torch.device("cpu", 0)
LIKE = {
    "w": torch.empty(8, PAGE // 2, dtype=torch.bfloat16, device="meta"),
    "scale": torch.empty(8, 4, dtype=torch.float32, device="meta"),
}


class Driver:
    """Gives out memory, at most `room` bytes of it."""

    def __init__(self):
        self.room = 1 << 30
        self.ranges: list[Range] = []

    def row_space_granularity(self, _device):
        return PAGE

    def row_space_create(self, num_bytes, _device):
        if num_bytes > self.room:
            raise RuntimeError(f"no {num_bytes} bytes of GPU memory for expert rows: out of memory")
        self.room -= num_bytes
        return Memory(self, num_bytes)

    def give_back(self, num_bytes):
        self.room += num_bytes

    def row_space_reserve(self, num_bytes, _device):
        self.ranges.append(Range(num_bytes))
        return self.ranges[-1]

    def row_space_push(self, addresses, memory):
        addresses.parts.append(memory)

    def row_space_pop(self, addresses):
        addresses.parts.pop()

    def row_space_tensor(self, addresses):
        assert sum(memory.num_bytes for memory in addresses.parts) == addresses.num_bytes
        return addresses.values


class Memory:
    """Physical memory, until nobody has it any more."""

    def __init__(self, driver, num_bytes):
        self.num_bytes = num_bytes
        weakref.finalize(self, driver.give_back, num_bytes)


class Range:
    def __init__(self, num_bytes):
        self.num_bytes = num_bytes
        self.parts: list[Memory] = []
        self.values = torch.zeros(num_bytes, dtype=torch.uint8)

    @property
    def pages(self):
        return [memory.num_bytes // PAGE for memory in self.parts]


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(module, "cuda_library", lambda: made)
    monkeypatch.setattr(module.torch, "device", lambda *_: DEVICE)
    return made


def test_slots_are_the_layers_own_and_the_rest_is_the_areas(driver):
    shared = DeviceSharedRows(LIKE, 3, 2, DEVICE)
    assert shared.num_bytes == 2 * 5 * PAGE
    space = shared.row_space(1)
    assert [addresses.pages for addresses in driver.ranges] == [[3, 5]]
    assert {name: (t.shape, t.dtype) for name, t in space.items()} == {
        name: (t.shape, t.dtype) for name, t in LIKE.items()
    }
    assert shared.private_bytes == 3 * PAGE + 8 * 16, "what is too small to share is a plain tensor"


def test_with_a_slot_for_every_expert_nothing_is_shared(driver):
    shared = DeviceSharedRows(LIKE, 8, 1, DEVICE)
    assert shared.num_bytes == 0
    shared.row_space(0)
    assert shared.private_bytes == sum(8 * tensor[0].nbytes for tensor in LIKE.values())
    assert driver.ranges == []


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_growing_may_change_the_number_of_areas(driver, before, after):
    shared = DeviceSharedRows(LIKE, 3, before, DEVICE)
    for number in range(3):
        shared.row_space(number)
    shared.grow(4, after)
    one, other, same = (addresses.parts[-1] for addresses in driver.ranges)
    assert (one is same, one is other) == (True, after == 1)
    assert shared.num_bytes == after * 4 * PAGE


@pytest.mark.parametrize("num_slots", [3, 5, 8])
def test_growing_maps_more_pages_behind_the_same_addresses(driver, num_slots):
    """What all layers share is given back before more is taken: there may be no room for both."""
    shared = DeviceSharedRows(LIKE, 3, 2, DEVICE)
    spaces = [shared.row_space(area) for area in (0, 1, 0)]
    taken = 3 * 3 * PAGE + 2 * 5 * PAGE
    driver.room = max(0, (3 * num_slots + 2 * (8 - num_slots)) * PAGE - taken)
    shared.grow(num_slots, 2)
    pages = [[3, 5], [3, 2, 3], [3, 5]][(num_slots > 3) + (num_slots > 5)]
    assert [addresses.pages for addresses in driver.ranges] == [pages] * 3
    if num_slots < 8:
        one, other, same = (addresses.parts[-1] for addresses in driver.ranges)
        assert (one is same, one is other) == (True, False), "by area"
    assert shared.num_bytes == 2 * (8 - num_slots) * PAGE
    assert shared.private_bytes == 3 * (num_slots * PAGE + 8 * 16)
    assert [space["w"].data_ptr() for space in spaces] == [made.values.data_ptr() for made in driver.ranges]


def test_a_row_space_that_is_made_after_growing_is_as_the_others(driver):
    shared = DeviceSharedRows(LIKE, 3, 1, DEVICE)
    shared.row_space(0)
    shared.grow(6, 1)
    shared.row_space(0)
    assert [addresses.pages for addresses in driver.ranges] == [[3, 3, 2], [6, 2]]


def test_memory_that_torch_keeps_is_given_back_before_anything_is_refused(driver, monkeypatch):
    driver.room = 0
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(driver, "room", 1 << 20))
    assert DeviceSharedRows(LIKE, 3, 1, DEVICE).num_bytes == 5 * PAGE


def test_too_much_is_refused_with_the_number_and_the_remedy(driver):
    driver.room = 7 * PAGE
    shared = DeviceSharedRows(LIKE, 3, 1, DEVICE)
    with pytest.raises(RowSpaceError, match=rf"no {3 * PAGE} bytes of GPU memory .*give less to the cache \(slots_per"):
        shared.row_space(0)


def test_a_gpu_that_cannot_map_memory_is_refused_by_name(driver, monkeypatch):
    def refuse(_device):
        raise RuntimeError("GPU 0 does not support CUDA's virtual memory management")

    monkeypatch.setattr(driver, "row_space_granularity", refuse, raising=False)
    with pytest.raises(RowSpaceError, match=r"^expert_prefetch: GPU 0 does not support.*cache_fraction 1"):
        granularity(DEVICE)
