"""GPU memory that is mapped at several addresses: what is shared and what is not, and that all of it is given back."""

import gc

import pytest
import torch
from gpu_layer import device

from vllm_expert_prefetch.memory.device_rows import DeviceSharedRows, granularity
from vllm_expert_prefetch.memory.row_space import RowSpaceError
from vllm_expert_prefetch.native.library import cuda_library


def bytes_taken():
    """Physical bytes behind all mapped rows of this process, shared ones once; plain tensors are not among them."""
    return cuda_library().row_space_bytes()


@pytest.fixture
def page():
    return granularity(device())


@pytest.fixture(autouse=True)
def _nothing_is_left():
    gc.collect()
    before = bytes_taken()
    yield
    gc.collect()
    assert bytes_taken() == before


def rows_like(num_experts, row_values, dtype=torch.bfloat16):
    return {"w": torch.empty(num_experts, row_values, dtype=dtype, device="meta")}


@pytest.mark.parametrize("row_bytes_of_page", [1, 3 / 4, 5 / 2])
def test_overflow_rows_are_one_memory_and_slots_are_not(page, row_bytes_of_page):
    values = int(page * row_bytes_of_page) // 2
    shared = DeviceSharedRows(rows_like(8, values), 3, 1, device())
    one, other = (shared.row_space(0)["w"] for _ in range(2))
    assert one.shape == (8, values)
    assert one.dtype == torch.bfloat16
    assert not one.any()
    for row in range(8):
        one[row].fill_(row + 1)
    first_shared = -(-3 * values * 2 // page) * page // 2  # a value, not a row
    seen = other.flatten()
    assert not seen[:first_shared].any()
    assert torch.equal(seen[first_shared:], one.flatten()[first_shared:])
    other[:3].fill_(-1)
    assert (one[:3] > 0).all()


def test_areas_do_not_touch_each_other(page):
    shared = DeviceSharedRows(rows_like(8, page // 2), 3, 2, device())
    assert shared.num_bytes == 2 * 5 * page
    spaces = [shared.row_space(area) for area in (0, 1, 0)]
    spaces[0]["w"].fill_(1)
    assert not spaces[1]["w"].any()
    assert spaces[2]["w"][3:].all()


def test_what_is_taken_is_what_is_said(page):
    before = bytes_taken()
    shared = DeviceSharedRows(rows_like(8, page // 2), 3, 1, device())
    spaces = [shared.row_space(0) for _ in range(3)]
    assert bytes_taken() - before == shared.num_bytes + shared.private_bytes == 14 * page
    del shared
    spaces[0]["w"].fill_(1)
    assert spaces[1]["w"][3:].all(), "the tensors keep the memory"


def test_growing_makes_slots_of_overflow_rows_and_moves_no_row(page):
    before = bytes_taken()
    shared = DeviceSharedRows(rows_like(8, page // 2), 3, 1, device())
    one, other = (shared.row_space(0)["w"] for _ in range(2))
    addresses = one.data_ptr(), other.data_ptr()
    one.fill_(1)
    shared.grow(6, 1)
    assert (one.data_ptr(), other.data_ptr()) == addresses
    assert not one[3:].any(), "new pages are zero"
    one.fill_(1)
    assert not other[:6].any()
    assert other[6:].all()
    assert bytes_taken() - before == shared.num_bytes + shared.private_bytes == 14 * page
    shared.grow(8, 1)
    one.fill_(2)
    other.fill_(3)
    assert (one == 2).all()
    assert bytes_taken() - before == 16 * page


def test_a_tensor_that_would_share_less_than_a_page_is_a_plain_one(page):
    shared = DeviceSharedRows(rows_like(8, 24, torch.float32), 3, 1, device())
    one, other = (shared.row_space(0) for _ in range(2))
    assert (shared.num_bytes, shared.private_bytes) == (0, 2 * 8 * 24 * 4)
    one["w"].fill_(1)
    assert not other["w"].any()


def test_too_much_is_refused_with_the_number_and_leaves_nothing_behind(page):
    free, _ = torch.cuda.mem_get_info()
    values = 5 * free // 32 // page * page // 2
    # Five eighths of what there is, and then as much again.
    shared = DeviceSharedRows(rows_like(8, values), 4, 1, device())
    before = bytes_taken()
    with pytest.raises(RowSpaceError, match=rf"no {4 * values * 2} bytes of GPU memory.*give less to the cache"):
        shared.row_space(0)
    assert bytes_taken() == before


def test_a_kernel_that_still_runs_when_the_last_tensor_goes_is_awaited(page):
    shared = DeviceSharedRows(rows_like(8, page // 2), 3, 1, device())
    tensor, total = shared.row_space(0)["w"], torch.zeros((), device="cuda")
    tensor.fill_(1)
    for _ in range(200):
        total += tensor.sum(dtype=torch.float32)
    del tensor
    assert total.item() == 200 * 4 * page
