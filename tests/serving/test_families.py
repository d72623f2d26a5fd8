"""Every family gives the tokens of plain vLLM with a part of its experts in slots: shared experts, expert biases,
grouped top-k with a correction bias, routed scaling and dense first layers are vLLM's own code."""

import pytest
from engines import caches, counters, greedy, layers, open_engine
from families import FAMILIES, write_checkpoint

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
