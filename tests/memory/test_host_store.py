"""Expert records: contents, layout and exact size."""

import pytest
import torch
from expert_tensors import NUM_EXPERTS, bits, expert_tensors

from vllm_expert_prefetch.memory import host_memory
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import SEGMENT_ALIGNMENT_BYTES, HostStore

ALIGNED_ROWS = {"w13": 768, "w2": 512, "scale": 256, "zeros": 256, "code": 512}
"""Row bytes of `expert_tensors` rounded up to 256, written down by hand."""


@pytest.fixture
def tensors():
    return expert_tensors()


@pytest.fixture
def store(tensors):
    return HostStore(tensors, HostMemoryOptions())


def test_every_row_has_the_bits_dtype_and_shape_it_came_with(tensors, store):
    assert list(store.views) == list(tensors)
    for name, tensor in tensors.items():
        view = store.views[name]
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(view), bits(tensor))


def test_every_row_starts_at_a_multiple_of_256_bytes_of_its_record(store):
    start = store.views["w13"].data_ptr()
    for expert in range(NUM_EXPERTS):
        for name in store.views:
            offset = store.views[name][expert].data_ptr() - start
            assert offset % SEGMENT_ALIGNMENT_BYTES == 0
            assert offset // store.record_bytes == expert, "a row lies in another expert's record"


def test_rows_do_not_overlap(tensors, store):
    for name in tensors:
        store.views[name].zero_()
        for other in tensors:
            if other != name:
                assert torch.equal(bits(store.views[other]), bits(tensors[other]))
        store.views[name].copy_(tensors[name])


def test_sizes_are_those_of_the_aligned_rows_and_no_more(store):
    assert store.record_bytes == sum(ALIGNED_ROWS.values())
    assert store.num_bytes == NUM_EXPERTS * store.record_bytes
    assert store.num_experts == NUM_EXPERTS


@pytest.mark.parametrize(
    ("row_bytes", "record_bytes"), [(1, 256), (255, 256), (256, 256), (257, 512), (512, 512), (513, 768)]
)
def test_rows_are_aligned_upwards_by_less_than_256_bytes(row_bytes, record_bytes):
    store = HostStore({"w": torch.ones(3, row_bytes, dtype=torch.int8)}, HostMemoryOptions())
    assert (store.record_bytes, store.num_bytes) == (record_bytes, 3 * record_bytes)


def test_the_store_is_a_copy(tensors, store):
    before = tensors["w2"].clone()
    tensors["w2"].zero_()
    assert torch.equal(store.views["w2"], before)


def test_tensors_may_be_kept_where_any_memory_will_do(tensors):
    store = HostStore(tensors, HostMemoryOptions(), may_keep=True)
    assert store.views == tensors
    assert all(store.views[name] is tensor for name, tensor in tensors.items())
    assert store.record_bytes == sum(tensor[0].nbytes for tensor in tensors.values())
    assert (store.num_bytes, store.is_pinned) == (NUM_EXPERTS * store.record_bytes, False)


@pytest.mark.parametrize("options", [{"huge_pages": True}, {"numa_node": 0, "must_bind": False}, {"pin": True}])
def test_tensors_are_copied_where_something_is_asked_of_their_memory(monkeypatch, tensors, options):
    monkeypatch.setattr(host_memory, "_lock", lambda memory, num_bytes: None)
    options = HostMemoryOptions(**options, must_have_huge_pages=False)
    store = HostStore(tensors, options, may_keep=True)
    assert store.views["w2"].data_ptr() != tensors["w2"].data_ptr()
    assert torch.equal(store.views["w2"], tensors["w2"])


def test_tensors_that_are_not_contiguous_are_stored_by_value():
    transposed = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    store = HostStore({"w": transposed}, HostMemoryOptions())
    assert torch.equal(store.views["w"], transposed)
    assert store.views["w"][0].is_contiguous()


def test_scalar_and_empty_rows_are_kept():
    store = HostStore({"scale": torch.arange(3.0), "empty": torch.zeros(3, 0)}, HostMemoryOptions())
    assert store.views["scale"].tolist() == [0.0, 1.0, 2.0]
    assert store.views["empty"].shape == (3, 0)
    assert store.record_bytes == 256
