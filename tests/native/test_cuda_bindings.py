"""The checks of the staging bindings, which need no GPU."""

import pytest
import torch
import tvm_ffi

GOOD = [4096, 256, 8192, 128, 128]


@pytest.fixture(scope="module")
def library(cuda_build):
    return tvm_ffi.load_module(str(cuda_build[0]))


def table(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def test_a_record_is_all_its_rows(library):
    assert library.check_layout(table(GOOD, [65536, 256, 4096, 64, 48]), 4, 2) == 176


@pytest.mark.parametrize("column", range(5))
def test_what_is_no_multiple_of_16_is_refused_with_segment_and_number(library, column):
    bad = list(GOOD)
    bad[column] += 8
    with pytest.raises(ValueError, match=rf"segment 1: .* is {bad[column]}, must be a positive multiple of 16"):
        library.check_layout(table(GOOD, bad), 4, 2)


@pytest.mark.parametrize("column", [0, 2, 4])
def test_a_null_address_and_an_empty_row_are_refused(library, column):
    bad = list(GOOD)
    bad[column] = 0
    with pytest.raises(ValueError, match=r"segment 0: .* is 0, must be"):
        library.check_layout(table(bad), 4, 2)


def test_overlapping_slots_are_refused(library):
    with pytest.raises(ValueError, match="pool stride 64 is below its 128 row bytes"):
        library.check_layout(table([4096, 256, 8192, 64, 128]), 4, 2)


def test_too_many_segments_are_refused(library):
    with pytest.raises(ValueError, match="number of segments is 17, must be 1 to 16"):
        library.check_layout(table(*[GOOD] * 17), 4, 2)


@pytest.mark.parametrize(("load", "text"), [((4, 0), "expert of a load is 4, must be 0 to 3"), ((0, -1), "slot .* -1")])
def test_host_loads_out_of_range_are_refused(library, load, text):
    with pytest.raises(ValueError, match=text):
        library.copy_records_async(table(GOOD), 4, 2, torch.tensor([load], dtype=torch.int32), 0, False, 0)


def test_lists_on_the_cpu_are_refused(library):
    lists = [torch.zeros(2, 2, dtype=torch.int32), *(torch.zeros(n, dtype=torch.int32) for n in (1, 2, 1))]
    board, lane = torch.zeros(library.board_ints(2), dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="loads must lie on a GPU"):
        library.gather_records(table(GOOD), 4, 2, *lists, board, lane, 16, 0)


@pytest.mark.parametrize("num_blocks", [0, 1025])
def test_grids_out_of_range_are_refused(library, num_blocks):
    nothing = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}, must be 1 to 1024"):
        library.gather_records(table(GOOD), 4, 2, *[nothing] * 6, num_blocks, 0)


def plan_prefetch(library, state_words=44, predicted=(1, 3), num_real=1, budget=4096):
    """A layer of 4 experts and 2 slots; every tensor on the CPU."""
    ids, real = torch.zeros(predicted, dtype=torch.int32), torch.zeros(num_real, dtype=torch.int64)
    state, words = torch.zeros(state_words, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    lists = [torch.zeros(number, dtype=torch.int32) for number in (4, 1, 2)]
    library.plan_prefetch(state, words, ids, real, budget, *lists, 0)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"state_words": 43}, "not a layer of at most 1024 experts"),
        ({"predicted": (3,)}, "ids must have shape"),
        ({"predicted": (2, 3)}, "real has room for 1, needs 2"),
        ({"budget": 0}, "budget must be an address that the GPU can read"),
        ({}, "must lie on a GPU"),
    ],
)
def test_prefetch_plans_with_bad_input_are_refused(library, bad, text):
    with pytest.raises(ValueError, match=text):
        plan_prefetch(library, **bad)
