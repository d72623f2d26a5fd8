"""The tokens and log-probabilities of the plugin are those of plain vLLM, while the cache is at work."""

import pytest
from engines import TINY_MODEL, Output, caches, counters, greedy, layers, open_engine, prompts
from families import FAMILIES, write_checkpoint

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.residency import POLICIES

pytestmark = pytest.mark.engine

PROMPTS = prompts(16)
NUM_EXPERTS, NUM_LAYERS, RECORD_BYTES = 16, 8, 49152


def generate(llm) -> list[list[Output]]:
    """Batch 16, then three of the prompts alone."""
    return [greedy(llm, PROMPTS), *(greedy(llm, [prompt]) for prompt in PROMPTS[:3])]


def words_of(llm) -> list[Words]:
    return [cache.words() for cache in caches(llm)]


@pytest.fixture(scope="module")
def stock() -> list[list[Output]]:
    with open_engine(TINY_MODEL, None) as llm:
        return generate(llm)


@pytest.mark.proves("eager mode, a quarter to 95 % of the experts resident")
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9, 0.95])
def test_smoke_bit_equal_at_every_residency(stock, share):
    with open_engine(TINY_MODEL, {"cache_fraction": share}) as llm:
        assert generate(llm) == stock
        words = words_of(llm)
    assert [layer.num_slots for layer in words] == [int(share * NUM_EXPERTS)] * NUM_LAYERS
    # 16 prompts together need every expert: more than there are slots, and some find none that is cold.
    for layer in words:
        assert min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0
        assert layer.steps > layer.wide_steps


def test_smoke_bit_equal_with_a_slot_for_every_expert(stock):
    with open_engine(TINY_MODEL, {"cache_fraction": 1.0}) as llm:
        assert generate(llm) == stock
        assert caches(llm) == []
        assert {type(layer).__name__ for layer in layers(llm)} == {"CachedRoutedExperts"}
        counted = counters(llm)
    assert counted["slots"] == counted["experts"] == NUM_LAYERS * NUM_EXPERTS
    assert counted["lookups_total/hit"] == counted["transfer_bytes_total/demand"] == counted["overflow_bytes"] == 0


@pytest.mark.proves("every eviction policy")
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "ewma"])
def test_bit_equal_with_every_policy(stock, policy):
    with open_engine(TINY_MODEL, {"cache_fraction": 0.25, "policy": policy}) as llm:
        assert generate(llm) == stock
        words = words_of(llm)
    assert {list(POLICIES)[layer.policy] for layer in words} == {policy}
    assert all(min(layer.evictions, layer.overflow) > 0 for layer in words)


@pytest.mark.parametrize("num_slots", [2, 5, 15])
def test_a_model_of_two_layers_is_bit_equal(num_slots, tmp_path):
    """Each layer's overflow rows are those that the layer before has just read."""
    model = write_checkpoint("qwen3-moe", tmp_path / "shallow", num_hidden_layers=2)
    family, results = FAMILIES["qwen3-moe"], []
    for config in (None, {"slots_per_layer": num_slots}):
        with open_engine(model, config, skip_tokenizer_init=True, max_model_len=256) as llm:
            results.append([greedy(llm, family.prompts, 24), greedy(llm, family.prompts[:1], 24)])
            words = words_of(llm) if config else []
    assert results[0] == results[1]
    assert len(words) == 2
    assert all(layer.num_slots == num_slots and min(layer.wide_steps, layer.overflow) > 0 for layer in words)


@pytest.mark.proves("compilation (torch.compile)")
def test_compiled_is_bit_equal_to_compiled_stock():
    """With look-ahead as well: `benchmarks/exactness.py` compares without."""
    results = []
    for config in (None, {"cache_fraction": 0.5, "emulated_link_gbps": 0.5, "prefetch": "on"}):
        with open_engine(TINY_MODEL, config, enforce_eager=False) as llm:
            results.append([greedy(llm, PROMPTS), greedy(llm, PROMPTS[:1])])
            words = words_of(llm) if config else []
            used = counters(llm)["predictions_total/used"] if config else 0
    assert results[0] == results[1]
    assert all(min(layer.misses, layer.overflow) > 0 for layer in words)
    assert used > 0


def test_counters_are_conserved():
    """Nothing is counted before a request, and every lookup, layer step and record once."""
    with open_engine(TINY_MODEL, {"cache_fraction": 0.25}) as llm:
        assert sum(value for series, value in counters(llm).items() if "_total" in series) == 0
        greedy(llm, PROMPTS[:4], num_tokens=8)
        counted, words = counters(llm), words_of(llm)
    hits, misses = counted["lookups_total/hit"], counted["lookups_total/miss"]
    assert (hits, misses) == (sum(layer.hits for layer in words), sum(layer.misses for layer in words))
    moved = counted["transfer_bytes_total/demand"] + counted["transfer_bytes_total/overflow"]
    assert moved == misses * RECORD_BYTES > 0
    assert counted["moe_steps_total/narrow"] + counted["moe_steps_total/wide"] == 8 * NUM_LAYERS
    # Top-2 of 4 requests: 2 to 8 distinct experts in each decode step of each layer.
    assert hits + misses >= 2 * 8 * NUM_LAYERS
    assert counted["resident_slots"] == sum(layer.num_resident for layer in words) > 0
