"""Demand copies: the right bytes, nothing else, whatever the sizes."""

import random

import pytest
import torch
from gpu_layer import READY, word

RECORDS = {
    "one vector": [16],
    "uneven": [48, 4112, 16],
    "with scales": [393216, 196608, 3072, 1536],
    "large": [3 << 20, 1 << 20],
}


@pytest.mark.parametrize("num_blocks", [1, 4, 13, 64, 200])
@pytest.mark.parametrize("row_bytes", RECORDS.values(), ids=RECORDS.keys())
def test_rows_hold_their_records_and_others_stay(make_layer, row_bytes, num_blocks):
    layer = make_layer(row_bytes, 9, 6, num_demand_blocks=num_blocks)
    for loads in ([(4, 2)], [(8, 0), (0, 5), (3, 3)], [(1, 2), (2, 1)]):
        layer.ask(loads)
        layer.cache.gather()
        assert all(layer.holds(row, expert) for expert, row in loads)
    assert layer.is_untouched(4)
    layer.ask([(expert, 8 - expert) for expert in range(9)])
    layer.cache.gather()
    assert all(layer.holds(8 - expert, expert) for expert in range(9))


def test_an_empty_plan_changes_nothing(make_layer):
    layer = make_layer([4096], 3, 3)
    layer.words.copy_(torch.arange(3, dtype=torch.int32) << 3)
    layer.ask([])
    layer.cache.gather()
    assert all(layer.is_untouched(row) for row in range(3))
    assert layer.words.tolist() == [0, 8, 16]


def test_a_landed_record_leaves_its_row_ready_with_the_same_ticket(make_layer):
    layer = make_layer([4096, 48], 3, 3)
    layer.words[1] = word(3, ticket=7)
    layer.ask([(2, 1)])
    layer.cache.gather()
    assert int(layer.words[1].item()) == word(READY, ticket=7)


@pytest.mark.parametrize(("bad", "num_errors"), [((9, 1), 1), ((-1, 1), 1), ((0, 9), 1), ((0, -1), 1), ((9, 9), 1)])
def test_a_load_out_of_range_is_skipped_and_counted(make_layer, bad, num_errors):
    layer = make_layer([65536], 9, 3, num_demand_blocks=7)
    layer.ask([(1, 0), bad, (2, 2)])
    layer.cache.gather()
    layer.num_expected_errors = num_errors
    assert layer.holds(0, 1)
    assert layer.holds(2, 2)
    assert layer.is_untouched(1)


@pytest.mark.parametrize(("count", "num_errors"), [(-5, 1), (1000, 1)])
def test_a_count_outside_the_list_is_cut_to_it_and_counted(make_layer, count, num_errors):
    layer = make_layer([4096], 3, 3)
    layer.ask([(0, 0), (1, 1), (2, 2)])
    layer.cache.demand.num_loads.fill_(count)
    layer.cache.gather()
    layer.num_expected_errors = num_errors
    assert all(layer.holds(row, row) if count > 0 else layer.is_untouched(row) for row in range(3))


def test_replays_copy_what_their_own_list_says(make_layer):
    layer = make_layer([4096, 48], 32, 8, num_demand_blocks=5)
    graph = torch.cuda.CUDAGraph()
    layer.ask([(0, 0)])
    with torch.cuda.graph(graph):
        layer.cache.gather()
    rng = random.Random(5)
    differing = torch.zeros(1, dtype=torch.int64, device="cuda")
    for _ in range(1000):
        loads = list(zip(rng.sample(range(32), 8), rng.sample(range(32), 8), strict=True))[: rng.randrange(9)]
        layer.ask(loads)
        graph.replay()
        for name, truth in layer.truth.items():
            for expert, row in loads:
                differing += (layer.tensors[name][row] != truth[expert]).sum()
    assert int(differing.item()) == 0
