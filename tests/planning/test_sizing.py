"""How many slots a layer gets, and what an impossible size is answered."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.sizing import GB, CacheSize, MemoryBudget, ModelShape, size_cache

SHAPE = ModelShape(num_layers=10, num_experts=64, top_k=8, expert_bytes=64 * GB)
"""One slot in every layer: 1 GB. A stream buffer: 6.4 GB."""
BUDGET = MemoryBudget(
    total_bytes=40 * GB, utilization=0.9, other_bytes=10 * GB, activation_bytes=2 * GB, kv_reserve_bytes=1 * GB
)
"""36 - 10 - 2 - 1 = 23 GB for the cache."""


def budget_of(cache_gb):
    """A budget that leaves `cache_gb`."""
    return MemoryBudget(100 * GB, 1.0, 0, 0, (100 - cache_gb) * GB)


def size(budget=None, shape=SHAPE, **options):
    return size_cache(ExpertPrefetchConfig(**options), shape, budget)


def test_the_size_of_a_slot_and_of_a_stream_buffer_follow_from_the_experts():
    assert (SHAPE.slot_bytes, SHAPE.buffer_bytes) == (GB, 6.4 * GB)


def test_the_gpu_budget_is_what_vllm_may_use_without_everything_else():
    assert BUDGET.cache_bytes == 23 * GB
    assert (
        BUDGET.describe() == "0.90 x 40.00 GB - other weights 10.00 GB - activations 2.00 GB - KV reserve 1.00 GB"
        " = 23.00 GB"
    )


@pytest.mark.parametrize("budget", [None, BUDGET])
@pytest.mark.parametrize(
    ("options", "num_slots"),
    [
        ({"slots_per_layer": 20}, 20),
        ({"slots_per_layer": 8}, 8),
        ({"cache_fraction": 0.25}, 16),
        ({"cache_fraction": 0.99}, 63),
        ({"cache_gb": 12.9}, 12),
        ({"cache_gb": 8}, 8),
    ],
)
def test_an_explicit_size_is_taken_as_it_is_rounded_down_to_whole_slots(options, num_slots, budget):
    assert size(budget, stream_buffer="off", **options) == CacheSize(num_slots, stream_buffer=False)


@pytest.mark.parametrize("options", [{"slots_per_layer": 64}, {"cache_fraction": 1.0}, {"cache_gb": 64}])
@pytest.mark.parametrize("stream_buffer", ["auto", "on", "off"])
def test_room_for_all_experts_leaves_a_stream_buffer_nothing_to_do(options, stream_buffer):
    assert size(stream_buffer=stream_buffer, **options) == CacheSize(64, stream_buffer=False)


@pytest.mark.parametrize(("slots", "pays"), [(57, True), (58, False)])  # 57 + 6.4 < 64 <= 58 + 6.4
def test_a_stream_buffer_comes_by_itself_when_both_together_are_smaller_than_the_experts(slots, pays):
    assert size(slots_per_layer=slots) == CacheSize(slots, stream_buffer=pays)


def test_a_stream_buffer_that_was_asked_for_comes_whether_it_pays_or_not():
    assert size(slots_per_layer=60, stream_buffer="on") == CacheSize(60, stream_buffer=True)


@pytest.mark.parametrize(
    ("stream_buffer", "expected"),
    [("auto", CacheSize(13, True)), ("on", CacheSize(13, True)), ("off", CacheSize(20, False))],
)
def test_a_size_in_bytes_covers_slots_and_stream_buffer(stream_buffer, expected):
    assert size(cache_gb=20, stream_buffer=stream_buffer) == expected
    assert size(budget_of(20), stream_buffer=stream_buffer) == expected


def test_a_stream_buffer_that_would_leave_too_few_slots_is_left_out():
    assert size(cache_gb=14.5) == CacheSize(8, stream_buffer=True)
    assert size(cache_gb=14.3) == CacheSize(14, stream_buffer=False)


def test_without_a_size_a_gpu_gets_what_its_budget_allows():
    assert size(BUDGET, stream_buffer="off") == CacheSize(23, stream_buffer=False)
    assert size(BUDGET) == CacheSize(16, stream_buffer=True)


@pytest.mark.parametrize("cache_gb", [64, 65, 70, 99])
def test_without_a_size_a_gpu_gets_a_slot_for_every_expert_if_they_fit_and_never_more(cache_gb):
    assert size(budget_of(cache_gb)) == CacheSize(64, stream_buffer=False)


def test_without_a_size_the_cpu_platform_gets_half_of_the_experts():
    assert size(stream_buffer="off") == CacheSize(32, stream_buffer=False)


@pytest.mark.parametrize(("num_experts", "top_k", "expected"), [(9, 2, 4), (8, 6, 6), (4, 4, 4), (1, 1, 1)])
def test_half_of_the_experts_is_rounded_down_and_never_less_than_a_token_needs(num_experts, top_k, expected):
    assert size(shape=ModelShape(2, num_experts, top_k, num_experts * GB)).num_slots == expected


@pytest.mark.parametrize(
    ("budget", "options", "source", "given"),
    [
        (None, {"slots_per_layer": 7}, "slots_per_layer = 7", 7),
        (None, {"cache_fraction": 0.1}, "cache_fraction = 0.1", 6),
        (None, {"cache_gb": 7.5}, "cache_gb = 7.5", 7),
        (None, {"cache_gb": 10, "stream_buffer": "on"}, "cache_gb = 10 with a stream buffer of 6.4 GB", 3),
        (None, {"cache_gb": 2, "stream_buffer": "on"}, "cache_gb = 2 with a stream buffer of 6.4 GB", 0),
        (budget_of(5), {}, "automatic sizing (1.00 x 100.00 GB - other weights 0.00 GB", 5),
        (budget_of(-3), {}, "KV reserve 103.00 GB = -3.00 GB)", 0),
    ],
)
def test_too_few_slots_are_refused_with_both_numbers_and_the_remedy(budget, options, source, given):
    with pytest.raises(ConfigError) as refused:
        size(budget, **options)
    message = str(refused.value)
    assert source in message
    assert f"gives {given} slots per layer, and one token needs 8 (top-k)" in message
    assert "at least slots_per_layer = 8, i.e. cache_gb = 8 per rank" in message
    assert "lower max_model_len or raise gpu_memory_utilization" in message


@pytest.mark.parametrize(
    ("options", "source", "given"),
    [
        ({"slots_per_layer": 65}, "slots_per_layer = 65", 65),
        ({"slots_per_layer": 65, "stream_buffer": "on"}, "slots_per_layer = 65", 65),
        ({"cache_gb": 99}, "cache_gb = 99", 99),
        ({"cache_gb": 70.4}, "cache_gb = 70.4", 70),  # all experts and a stream buffer
    ],
)
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_more_slots_than_experts_are_refused_with_both_numbers_and_the_remedy(budget, options, source, given):
    with pytest.raises(ConfigError) as refused:
        size(budget, **options)
    message = str(refused.value)
    assert source in message
    assert f"gives {given} slots per layer, more than the 64 experts (64 GB per rank)" in message
    assert "at most slots_per_layer = 64, or drop expert_prefetch: the experts fit" in message


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    num_layers=st.integers(1, 100),
    num_experts=st.integers(1, 512),
    top_k=st.integers(1, 16),
    expert_bytes=st.integers(10**3, 10**12),
)
def test_the_size_that_an_error_suggests_is_enough(num_layers, num_experts, top_k, expert_bytes):
    shape = ModelShape(num_layers, num_experts, min(top_k, num_experts), expert_bytes)
    with pytest.raises(ConfigError) as refused:
        size(budget_of(0), shape)
    suggested = float(re.search(r"cache_gb = (\S+) per rank", str(refused.value)).group(1))
    if suggested * GB < expert_bytes:
        assert size(None, shape, cache_gb=suggested, stream_buffer="off").num_slots >= shape.top_k
