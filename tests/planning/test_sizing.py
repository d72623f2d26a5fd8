"""How many slots a layer gets, and what an impossible size is answered."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.sizing import GB, LayerShape, MemoryBudget, cache_bytes, size_cache

LAYER = LayerShape(num_experts=64, top_k=8, row_bytes=(60_000_000, 40_000_000))
MODEL = [LAYER] * 10
"""A record is 0.1 GB. C slots and the overflow rows that all layers share take C + (64 - C) / 10 GB, 6.4 + 0.9 C."""
BUDGET = MemoryBudget(
    total_bytes=40 * GB, utilization=0.9, other_bytes=10 * GB, activation_bytes=2 * GB, kv_reserve_bytes=1 * GB
)
"""36 - 10 - 2 - 1 = 23 GB for the cache."""
HUGE_PAGE = 2 << 20


def budget_of(cache_gb):
    """A budget that leaves `cache_gb`."""
    return MemoryBudget(100 * GB, 1.0, 0, 0, round((100 - cache_gb) * GB))


def size(layers=MODEL, budget=None, page=1, **options):
    return size_cache(ExpertPrefetchConfig(**options), layers, budget, page)


def refusal(*arguments, **options):
    with pytest.raises(ConfigError) as refused:
        size(*arguments, **options)
    return str(refused.value)


def test_the_gpu_budget_is_what_vllm_may_use_without_everything_else():
    assert BUDGET.cache_bytes == 23 * GB
    assert (
        BUDGET.describe() == "0.90 x 40.00 GB - other weights 10.00 GB - activations 2.00 GB - KV reserve 1.00 GB"
        " = 23.00 GB"
    )


def test_layers_of_one_shape_share_overflow_rows_and_areas_do_not():
    assert LAYER.bytes == 6.4 * GB
    assert cache_bytes(MODEL, [8] * 10, page=1) == 13.6 * GB
    assert cache_bytes(MODEL, [8] * 10, page=1, areas=2) == 19.2 * GB
    assert cache_bytes(MODEL, [64] * 10, page=1, areas=2) == 64 * GB
    other = replace(LAYER, row_bytes=(100_000_000,))
    assert cache_bytes([*MODEL, other], [8] * 11, page=1) == 13.6 * GB + LAYER.bytes
    assert cache_bytes([LAYER, LAYER], [8, 9], page=1) == 2 * LAYER.bytes, "with as many slots only"


def test_whole_pages_are_counted():
    layer = LayerShape(8, 1, (1000, 10))
    # Of 8000 bytes two pages: one of them holds 3 slots, the other one is shared. Of 80 bytes one page, not shared.
    assert cache_bytes([layer] * 5, [3] * 5, page=4096) == 5 * 2 * 4096 + 4096


@pytest.mark.parametrize("budget", [None, BUDGET])
@pytest.mark.parametrize(
    ("options", "num_slots"),
    [
        ({"slots_per_layer": 20}, 20),
        ({"slots_per_layer": 8}, 8),
        ({"slots_per_layer": 64}, 64),
        ({"cache_fraction": 0.25}, 16),
        ({"cache_fraction": 0.99}, 63),
        ({"cache_fraction": 1.0}, 64),
        ({"cache_gb": 13.6}, 8),
        ({"cache_gb": 14.49}, 8),
        ({"cache_gb": 14.5}, 9),
        ({"cache_gb": 64}, 64),
        ({"cache_gb": 64.9}, 64),
    ],
)
def test_an_explicit_size_is_taken_as_it_is_rounded_down_to_whole_slots(options, num_slots, budget):
    assert size(budget=budget, **options) == [num_slots] * 10


def test_a_fraction_that_is_a_whole_number_of_experts_is_not_rounded_down():
    assert size([replace(LAYER, num_experts=100)], cache_fraction=0.29) == [29]


def test_without_a_size_a_gpu_gets_what_its_budget_allows():
    assert size(budget=BUDGET) == [18] * 10  # 6.4 + 16.2 GB


@pytest.mark.parametrize("cache_gb", [64, 65, 70, 99])
def test_without_a_size_a_gpu_gets_a_slot_for_every_expert_if_they_fit_and_never_more(cache_gb):
    assert size(budget=budget_of(cache_gb)) == [64] * 10


@pytest.mark.parametrize(
    ("num_experts", "top_k", "expected"), [(64, 8, 32), (9, 2, 4), (8, 6, 6), (4, 4, 4), (1, 1, 1)]
)
def test_without_a_size_the_cpu_platform_gets_half_of_the_experts_and_what_a_token_needs(num_experts, top_k, expected):
    assert size([LayerShape(num_experts, top_k, (GB,))] * 2) == [expected] * 2


def test_layers_with_different_numbers_of_experts():
    few, many = replace(LAYER, num_experts=16), LAYER
    assert size([few, many], cache_fraction=0.5) == [8, 32]
    assert size([few, many]) == [8, 32]
    assert size([few, many] * 2, cache_gb=cache_bytes([few, many] * 2, [16, 40] * 2, 1) / GB) == [16, 40] * 2
    assert "slots_per_layer = 20 gives 20 slots per layer, more than the 16 experts (8 GB" in refusal(
        [many, few], slots_per_layer=20
    )


def test_a_size_in_bytes_gives_layers_of_different_records_the_same_number_of_slots():
    layers = [LAYER, LAYER, replace(LAYER, row_bytes=(10, 20))]
    for num_slots in (8, 9, 40, 64):
        cache_gb = cache_bytes(layers, [num_slots] * 3, HUGE_PAGE) / GB
        assert size(layers, page=HUGE_PAGE, cache_gb=cache_gb) == [num_slots] * 3
        assert size(layers, budget_of(cache_gb), HUGE_PAGE) == [num_slots] * 3


@pytest.mark.parametrize(
    ("budget", "options", "source", "given"),
    [
        (None, {"slots_per_layer": 7}, "slots_per_layer = 7", 7),
        (None, {"cache_fraction": 0.1}, "cache_fraction = 0.1", 6),
        (None, {"cache_gb": 13.5}, "cache_gb = 13.5", 7),
        (None, {"cache_gb": 6}, "cache_gb = 6", 0),
        (budget_of(10), {}, "automatic sizing (1.00 x 100.00 GB - other weights 0.00 GB", 4),
        (budget_of(-3), {}, "KV reserve 103.00 GB = -3.00 GB)", 0),
    ],
)
def test_too_few_slots_are_refused_with_both_numbers_and_the_remedy(budget, options, source, given):
    message = refusal(budget=budget, **options)
    assert source in message
    assert f"gives {given} slots per layer, and one token needs 8 (top-k)" in message
    assert "at least slots_per_layer = 8, i.e. cache_gb = 13.6 per rank" in message
    assert "lower max_model_len or raise gpu_memory_utilization" in message


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_more_slots_than_experts_are_refused_with_both_numbers_and_the_remedy(budget):
    message = refusal(budget=budget, slots_per_layer=65)
    assert "slots_per_layer = 65 gives 65 slots per layer, more than the 64 experts (64 GB per rank)" in message
    assert "at most slots_per_layer = 64, or drop expert_prefetch: the experts fit" in message


@pytest.mark.parametrize("budget", [None, BUDGET])
@pytest.mark.parametrize("cache_gb", [65, 99])
def test_more_bytes_than_all_experts_are_refused_with_both_numbers_and_the_remedy(cache_gb, budget):
    message = refusal(budget=budget, cache_gb=cache_gb)
    assert f"cache_gb = {cache_gb} is more than all experts take (64 GB per rank)" in message
    assert "Drop expert_prefetch: the experts fit" in message


@st.composite
def models(draw):
    """One to three groups of layers, with experts, top-k and records of their own."""
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        num_experts = draw(st.integers(1, 130))
        row_bytes = tuple(draw(st.lists(st.integers(1, 10**8), min_size=1, max_size=3)))
        layer = LayerShape(num_experts, draw(st.integers(1, min(16, num_experts))), row_bytes)
        layers += [layer] * draw(st.integers(1, 6))
    return layers


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(models(), st.sampled_from([1, 4096, HUGE_PAGE]))
def test_following_the_error_message_is_enough(layers, page):
    message = refusal(layers, budget_of(0), page)
    slots = int(re.search(r"slots_per_layer = (\d+)", message)[1])
    cache_gb = float(re.search(r"cache_gb = (\S+) per rank", message)[1])
    for found in (
        size(layers, budget_of(cache_gb), page),
        size(
            layers, budget_of(cache_bytes(layers, [min(slots, layer.num_experts) for layer in layers], page) / GB), page
        ),
    ):
        assert all(layer.top_k <= num <= layer.num_experts for layer, num in zip(layers, found, strict=True))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(models(), st.sampled_from([1, 4096, HUGE_PAGE]), st.floats(0.01, 1))
def test_a_size_in_bytes_is_kept_and_one_more_slot_would_exceed_it(layers, page, share):
    cache_gb = share * cache_bytes(layers, [layer.num_experts for layer in layers], page) / GB
    try:
        slots = size(layers, budget_of(cache_gb), page)
    except ConfigError:
        return
    assert cache_bytes(layers, slots, page) <= budget_of(cache_gb).cache_bytes
    more = [min(max(slots) + 1, layer.num_experts) for layer in layers]
    assert more == slots or cache_bytes(layers, more, page) > budget_of(cache_gb).cache_bytes
