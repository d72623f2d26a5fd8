"""The checks of the CUDA bindings, which need no GPU."""

import pytest
import torch
import tvm_ffi

from vllm_expert_prefetch.cache.words import Words

GOOD = [4096, 256, 8192, 128]
NUM_WORDS = len(Words._fields)


@pytest.fixture(scope="module")
def library(cuda_build):
    return tvm_ffi.load_module(str(cuda_build))


def table(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def test_the_words_have_the_names_that_python_knows(library):
    assert tuple(library.word_names().split()) == Words._fields


def test_a_record_is_all_its_rows(library):
    assert library.check_layout(table(GOOD, [65536, 256, 4096, 48]), 4) == 176


@pytest.mark.parametrize("row_bytes", [1, 4, 18, 33])
def test_rows_of_scales_may_have_any_length(library, row_bytes):
    whole_vectors = -(-row_bytes // 16) * 16
    assert library.check_layout(table(GOOD, [65536, 256, 4096, row_bytes]), 4) == 128 + whole_vectors


@pytest.mark.parametrize("column", range(3))
def test_what_is_no_multiple_of_16_is_refused_with_segment_and_number(library, column):
    bad = list(GOOD)
    bad[column] += 8
    with pytest.raises(ValueError, match=rf"segment 1: .* is {bad[column]}, must be a positive multiple of 16"):
        library.check_layout(table(GOOD, bad), 4)


@pytest.mark.parametrize("column", [0, 2, 3])
def test_a_null_address_and_an_empty_row_are_refused(library, column):
    bad = list(GOOD)
    bad[column] = 0
    with pytest.raises(ValueError, match=r"segment 0: .* is 0, must be"):
        library.check_layout(table(bad), 4)


def test_too_many_segments_are_refused(library):
    with pytest.raises(ValueError, match="number of segments is 17, must be 1 to 16"):
        library.check_layout(table(*[GOOD] * 17), 4)


def gather(library, num_blocks=16):
    orders = [ints(4, 2), ints(1), ints(4), ints(1)]
    library.gather_records(table(GOOD), 4, *orders, ints(library.board_ints(4)), ints(2), num_blocks, 0)


def test_lists_on_the_cpu_are_refused(library):
    with pytest.raises(ValueError, match="loads must lie on a GPU"):
        gather(library)


@pytest.mark.parametrize("num_blocks", [0, 1025])
def test_grids_out_of_range_are_refused(library, num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}, must be 1 to 1024"):
        gather(library, num_blocks)


def plan(library, state_words=NUM_WORDS + 20, ids=(1, 3), num_real=1, budget=4096):
    """A prefetch of a layer of 4 experts and 2 slots; every tensor on the CPU."""
    state, real = torch.zeros(state_words, dtype=torch.int64), torch.zeros(num_real, dtype=torch.int64)
    library.plan_prefetch(state, ints(4), ints(*ids), real, budget, ints(4), ints(1), ints(2), 0)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"state_words": NUM_WORDS + 19}, "not a layer of at most 1024 experts"),
        ({"state_words": NUM_WORDS + 26}, "not a layer of at most 1024 experts"),
        ({}, "must lie on a GPU"),
    ],
)
def test_plans_with_bad_input_are_refused(library, bad, text):
    with pytest.raises(ValueError, match=text):
        plan(library, **bad)


def test_a_range_of_no_memory_is_refused(library):
    with pytest.raises(ValueError, match="a range needs memory"):
        library.row_space_map([])


def test_memory_is_refused_where_there_is_no_driver(library):
    if library.driver_version():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError):
        library.row_space_granularity(0)
    assert library.row_space_bytes() == 0
