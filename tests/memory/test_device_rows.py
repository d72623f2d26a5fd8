"""The row space of a GPU, as far as a machine without one can tell: what is asked of the driver."""

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
        self.mapped: list[list[int]] = []

    def row_space_granularity(self, _device):
        return PAGE

    def row_space_create(self, num_bytes, _device):
        if num_bytes > self.room:
            raise RuntimeError(f"no {num_bytes} bytes of GPU memory for expert rows: out of memory")
        self.room -= num_bytes
        return num_bytes

    def row_space_map(self, parts):
        self.mapped.append(parts)
        return torch.zeros(sum(parts), dtype=torch.uint8)


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
    assert driver.mapped == [[3 * PAGE, 5 * PAGE]]
    assert {name: (t.shape, t.dtype) for name, t in space.tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in LIKE.items()
    }
    assert space.private_bytes == 3 * PAGE + 8 * 16, "what is too small to share is a plain tensor"


def test_with_a_slot_for_every_expert_nothing_is_shared(driver):
    shared = DeviceSharedRows(LIKE, 8, 1, DEVICE)
    assert shared.num_bytes == 0
    assert shared.row_space(0).private_bytes == sum(8 * tensor[0].nbytes for tensor in LIKE.values())
    assert driver.mapped == []


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
