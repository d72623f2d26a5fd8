"""Every family gives the tokens of plain vLLM with a part of its experts in slots: shared experts, expert biases,
grouped top-k with a correction bias, routed scaling and dense first layers are vLLM's own code."""

import pytest
from engines import caches, counters, greedy, layers, open_engine
from families import FAMILIES, OTHER_FAMILIES, PROMPT_LENGTHS, prompt, write_checkpoint

pytestmark = pytest.mark.engine

MOE_FAMILIES = [name for name in FAMILIES if FAMILIES[name].num_experts]


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_family_is_bit_equal_with_a_quarter_and_half_of_its_experts(name, tmp_path):
    model = write_checkpoint(name, tmp_path / name)
    family = FAMILIES[name]

    def generate(llm):
        return [greedy(llm, family.prompts, 24), greedy(llm, family.prompts[:1], 24)]

    options = {"skip_tokenizer_init": True, "max_model_len": 256}
    with open_engine(model, None, **options) as llm:
        expected = generate(llm)
    for share in (0.25, 0.5):
        with open_engine(model, {"cache_fraction": share}, **options) as llm:
            assert generate(llm) == expected
            assert [layer.layer_name for layer in layers(llm)] == family.moe_layers
            counted, words = counters(llm), [cache.words() for cache in caches(llm)]
        assert counted["slots"] == len(words) * family.num_experts * share
        assert all(min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0 for layer in words)


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_another_family_is_bit_equal_with_half_of_its_experts_and_looks_ahead(name, tmp_path):
    model = write_checkpoint(name, tmp_path / name)
    prompts = [prompt(length, seed=1) for length in PROMPT_LENGTHS]
    options = {"skip_tokenizer_init": True, "max_model_len": 256}
    with open_engine(model, None, **options) as llm:
        expected = greedy(llm, prompts, 12)
    config = {"cache_fraction": 0.5, "prefetch": "on", "emulated_link_gbps": 0.1}
    with open_engine(model, config, **options) as llm:
        assert greedy(llm, prompts, 12) == expected
        words = [cache.words() for cache in caches(llm)]
        prefetched = counters(llm)["transfer_bytes_total/prefetch"]
    assert len(words) == OTHER_FAMILIES[name][2]
    assert all(layer.hits > 0 and layer.steps > 0 for layer in words)
    assert min(sum(layer.misses for layer in words), sum(layer.wide_steps for layer in words), prefetched) > 0
