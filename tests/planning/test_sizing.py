"""How many slots a layer gets, and what an impossible size is answered."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.sizing import (
    GB,
    LayerShape,
    MemoryProfile,
    areas_asked,
    cache_bytes,
    grow_cache,
    num_areas,
    size_cache,
)

LAYER = LayerShape(num_experts=64, top_k=8, row_bytes=(60_000_000, 40_000_000))
MODEL = [LAYER] * 10
"""A record is 0.1 GB. C slots and the overflow rows that all layers share take C + (64 - C) / 10 GB, 6.4 + 0.9 C."""
HUGE_PAGE = 2 << 20


def size(layers=MODEL, page=1, grows=False, **options):
    return size_cache(ExpertPrefetchConfig(**options), layers, page, grows)


def refusal(*arguments, **options):
    with pytest.raises(ConfigError) as refused:
        size(*arguments, **options)
    return str(refused.value)


def test_layers_of_one_shape_share_overflow_rows_and_areas_do_not():
    assert LAYER.bytes == 6.4 * GB
    assert cache_bytes(MODEL, [8] * 10, page=1) == 13.6 * GB
    assert cache_bytes(MODEL, [8] * 10, page=1, areas=2) == 19.2 * GB
    assert cache_bytes(MODEL, [64] * 10, page=1, areas=2) == 64 * GB
    other = replace(LAYER, row_bytes=(100_000_000,))
    assert cache_bytes([*MODEL, other], [8] * 11, page=1) == 13.6 * GB + LAYER.bytes
    assert cache_bytes([LAYER, LAYER], [8, 9], page=1) == 2 * LAYER.bytes, "with as many slots only"


def test_a_second_area_is_taken_where_it_costs_a_twentieth_of_the_cache_at_most():
    """C slots: 6.4 + 0.9 C GB, and the second area takes 6.4 - 0.1 C."""
    assert [num_areas(MODEL, [slots] * 10, 1, "auto") for slots in (8, 41, 42, 63, 64)] == [1, 1, 2, 2, 1]
    assert [num_areas(MODEL, [slots] * 10, 1, 2) for slots in (8, 63)] == [2, 2]
    assert cache_bytes(MODEL, [42] * 10, 1, "auto") == cache_bytes(MODEL, [42] * 10, 1, 2)
    assert cache_bytes(MODEL, [41] * 10, 1, "auto") == cache_bytes(MODEL, [41] * 10, 1, 1)


@pytest.mark.parametrize("areas", [1, 2, "auto"])
@pytest.mark.parametrize("cache_gb", [20, 43, 46.4, 55])
def test_a_size_in_bytes_covers_all_areas(cache_gb, areas):
    config = ExpertPrefetchConfig(cache_gb=cache_gb)
    slots = size_cache(config, MODEL, 1, areas=areas)
    assert cache_bytes(MODEL, slots, 1, areas) <= cache_gb * GB * (1 + 1e-9)
    assert cache_bytes(MODEL, [number + 1 for number in slots], 1, areas) > cache_gb * GB


@pytest.mark.parametrize(
    ("options", "on_gpu", "areas"),
    [
        ({}, True, "auto"),
        ({}, False, 1),
        ({"prefetch": "on"}, False, "auto"),
        ({"emulated_link_gbps": 1}, False, "auto"),
        ({"emulated_link_gbps": 1, "areas": 2}, False, 2),
        ({"areas": 2}, True, 2),
        ({"areas": 1}, False, 1),
        ({"prefetch": "off"}, True, 1),
    ],
)
def test_there_is_one_area_where_nothing_is_looked_ahead(options, on_gpu, areas):
    assert areas_asked(ExpertPrefetchConfig(**options), on_gpu) == areas


@pytest.mark.parametrize(
    ("options", "on_gpu", "reason"),
    [({"prefetch": "off"}, True, "prefetch is off"), ({}, False, "there is no link to hide on the CPU platform")],
)
def test_two_areas_are_refused_where_nothing_is_looked_ahead(options, on_gpu, reason):
    with pytest.raises(ConfigError, match=f"areas is 2, and nothing would be copied to the second one: {reason}. Set"):
        areas_asked(ExpertPrefetchConfig(areas=2, **options), on_gpu)


def test_there_is_one_area_where_cuda_graphs_are_broken():
    for areas in ("auto", 1):
        assert areas_asked(ExpertPrefetchConfig(areas=areas), True, breaks_graphs=True) == 1
    with pytest.raises(ConfigError, match=r"VLLM_USE_BREAKABLE_CUDAGRAPH=0 helps\. Set areas to auto$"):
        areas_asked(ExpertPrefetchConfig(areas=2), True, breaks_graphs=True)


def test_whole_pages_are_counted():
    layer = LayerShape(8, 1, (1000, 10))
    # Of 8000 bytes two pages: one of them holds 3 slots, the other one is shared. Of 80 bytes one page, not shared.
    assert cache_bytes([layer] * 5, [3] * 5, page=4096) == 5 * 2 * 4096 + 4096


@pytest.mark.parametrize("grows", [False, True])
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
def test_an_explicit_size_is_taken_as_it_is_rounded_down_to_whole_slots(options, num_slots, grows):
    assert size(grows=grows, **options) == [num_slots] * 10


def test_a_fraction_that_is_a_whole_number_of_experts_is_not_rounded_down():
    assert size([replace(LAYER, num_experts=100)], cache_fraction=0.29) == [29]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "expected"), [(64, 8, 32), (9, 2, 4), (8, 6, 6), (4, 4, 4), (1, 1, 1)]
)
def test_without_a_size_the_cpu_platform_gets_half_of_the_experts_and_what_a_token_needs(num_experts, top_k, expected):
    layers = [LayerShape(num_experts, top_k, (GB,))] * 2
    assert size(layers) == [expected] * 2
    assert size(layers, grows=True) == [top_k] * 2, "before it grows"


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


@pytest.mark.parametrize(
    ("options", "source", "given"),
    [
        ({"slots_per_layer": 7}, "slots_per_layer = 7", 7),
        ({"cache_fraction": 0.1}, "cache_fraction = 0.1", 6),
        ({"cache_gb": 13.5}, "cache_gb = 13.5", 7),
        ({"cache_gb": 6}, "cache_gb = 6", 0),
    ],
)
def test_too_few_slots_are_refused_with_both_numbers_and_the_remedy(options, source, given):
    message = refusal(**options)
    assert source in message
    assert f"gives {given} slots per layer, and one token needs 8 (top-k)" in message
    assert "at least slots_per_layer = 8, i.e. cache_gb = 13.6 per rank" in message


def test_more_slots_than_experts_are_refused_with_both_numbers_and_the_remedy():
    message = refusal(slots_per_layer=65)
    assert "slots_per_layer = 65 gives 65 slots per layer, more than the 64 experts (64 GB per rank)" in message
    assert "at most slots_per_layer = 64, or drop expert_prefetch: the experts fit" in message


@pytest.mark.parametrize("cache_gb", [65, 99])
def test_more_bytes_than_all_experts_are_refused_with_both_numbers_and_the_remedy(cache_gb):
    message = refusal(cache_gb=cache_gb)
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
    message = refusal(layers, page, cache_gb=1e-12)
    slots = int(re.search(r"slots_per_layer = (\d+)", message)[1])
    fewest = (cache_bytes(layers, [min(slots, layer.num_experts) for layer in layers], page) + 0.5) / GB
    for cache_gb in (float(re.search(r"cache_gb = (\S+) per rank", message)[1]), fewest):
        found = size(layers, page, cache_gb=cache_gb)
        assert all(layer.top_k <= num <= layer.num_experts for layer, num in zip(layers, found, strict=True))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(models(), st.sampled_from([1, 4096, HUGE_PAGE]), st.floats(0.01, 1))
def test_a_cache_that_grows_takes_what_it_may_and_one_more_slot_would_exceed_it(layers, page, share):
    slots = size(layers, page, grows=True)
    fewest, most = (cache_bytes(layers, num, page) for num in (slots, [layer.num_experts for layer in layers]))
    room = int(share * max(0, most - fewest))
    profile = MemoryProfile(10 * most, 0, room, fewest, sequence_bytes=0, kv_bytes=0)
    grown = grow_cache(layers, slots, profile, page)
    assert all(low <= num <= layer.num_experts for low, num, layer in zip(slots, grown, layers, strict=True))
    assert grown == slots or cache_bytes(layers, grown, page) <= fewest + room
    more = [min(max(grown) + 1, layer.num_experts) for layer in layers]
    assert more == grown or cache_bytes(layers, more, page) > fewest + room


QWEN3_30B = [LayerShape(128, 8, (2 * 768 * 2048 * 2, 2048 * 768 * 2))] * 48
DEEPSEEK_V3 = [LayerShape(256, 8, (2 * 2048 * 7168, 7168 * 2048, 4 * 2 * 16 * 56, 4 * 56 * 16))] * 58
"""FP8 in blocks of 128."""
QWEN3_TP2 = [LayerShape(128, 8, (768 * 2048 * 2, 2048 * 384 * 2))] * 48


def profiled(layers, gpu_gb, other_gb, activation_gb, sequence_gb, **asked):
    """What vLLM would find on a GPU of so many GB, at 0.90 of it, and how the cache grows."""
    slots = size(layers, HUGE_PAGE, grows=True)
    cache = cache_bytes(layers, slots, HUGE_PAGE)
    requested = int(0.9 * gpu_gb * GB)
    available = requested - int((other_gb + activation_gb) * GB) - cache
    profile = MemoryProfile(requested, int(activation_gb * GB), available, cache, int(sequence_gb * GB), **asked)
    return profile, grow_cache(layers, slots, profile, HUGE_PAGE)[0]


@pytest.mark.parametrize(
    ("layers", "gpu_gb", "other_gb", "activation_gb", "sequence_gb", "slots", "kv_gb"),
    [
        # Qwen3-30B-A3B in bfloat16: 58 GB of experts, 3.2 GB of other weights, 40,960 tokens take 4.03 GB.
        (QWEN3_30B, 141, 3.2, 3.0, 4.03, 128, 16.12),
        (QWEN3_30B, 80, 3.2, 3.0, 4.03, 109, 16.12),
        (QWEN3_30B, 48, 3.2, 3.0, 4.03, 44, 16.12),
        (QWEN3_30B, 24, 3.2, 2.0, 4.03, 15, 8.2),
        (QWEN3_30B, 16, 3.2, 1.0, 4.03, 8, 5.1),
        (QWEN3_TP2, 24, 1.6, 2.0, 2.02, 41, 8.08),
        # DeepSeek-V3 in FP8 over eight GPUs: not the experts, 655 GB; here one rank that holds all of each layer's.
        (DEEPSEEK_V3, 141, 20.0, 6.0, 11.3, 17, 45.2),
    ],
)
def test_well_known_models_on_well_known_gpus(layers, gpu_gb, other_gb, activation_gb, sequence_gb, slots, kv_gb):
    profile, found = profiled(layers, gpu_gb, other_gb, activation_gb, sequence_gb)
    assert (found, round(profile.kv_cache_bytes / GB, 2)) == (slots, kv_gb)


def test_a_kv_cache_that_was_asked_for_is_what_vllm_gets_and_experts_take_the_rest():
    less, more = (profiled(QWEN3_30B, 48, 3.2, 3.0, 4.03, kv_bytes=kv * GB) for kv in (4, 30))
    assert less[0].kv_cache_bytes == 4 * GB
    assert more[0].kv_cache_bytes == 30 * GB
    assert less[1] > more[1] > 8


def test_a_kv_cache_that_does_not_fit_is_refused_with_both_numbers_and_the_remedy():
    with pytest.raises(
        ConfigError, match=r"takes 40 GB, and there are 32.\d GB beside 4.\d+ GB .*Lower kv_cache_tokens"
    ):
        profiled(QWEN3_30B, 48, 3.2, 3.0, 4.03, kv_bytes=40 * GB)


def test_one_sequence_is_kept_where_half_of_the_room_is_less_and_no_more_than_there_is():
    assert MemoryProfile(100, 0, 60, 20, sequence_bytes=50).kv_cache_bytes == 50
    assert MemoryProfile(100, 0, 60, 20, sequence_bytes=70).kv_cache_bytes == 60
    assert MemoryProfile(100, 0, 60, 20, sequence_bytes=10).kv_cache_bytes == 40
    assert MemoryProfile(100, 0, 60, 20, sequence_bytes=11).most_cache_bytes == 40
    assert MemoryProfile(100, 0, 60, 20, sequence_bytes=0).most_cache_bytes == 80


def test_the_start_up_line_has_every_term():
    assert MemoryProfile(90 * GB, 3 * GB, 70 * GB, 5 * GB, 4 * GB).describe() == (
        "90.00 GB for vLLM - 12.00 GB weights and other - 3.00 GB activations and CUDA graphs - 16.00 GB KV cache "
        "(4 x max_model_len) = 59.00 GB for experts"
    )
