"""Every family gives the tokens of plain vLLM at half residency: shared experts, expert biases, grouped top-k with a
correction bias, routed scaling and dense first layers are vLLM's own code."""

import pytest
from engines import counters, greedy, layers, open_engine
from families import FAMILIES, write_checkpoint

pytestmark = pytest.mark.engine

MOE_FAMILIES = [name for name in FAMILIES if FAMILIES[name].num_experts]
MODES = {
    "stream": {"stream_buffer": "on"},
    "tokens": {"stream_buffer": "off", "max_token_waves": 64},
}


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_family_is_bit_equal_at_half_residency(name, tmp_path):
    model = write_checkpoint(name, tmp_path / name)
    family = FAMILIES[name]

    def run(config):
        with open_engine(model, config, skip_tokenizer_init=True, max_model_len=256) as llm:
            outputs = [greedy(llm, family.prompts, 24), greedy(llm, family.prompts[:1], 24)]
            if config is None:
                return outputs, [], {}
            return outputs, [layer.layer_name for layer in layers(llm)], counters(llm)

    expected, _, _ = run(None)
    for mode, keys in MODES.items():
        outputs, names, counted = run({"cache_fraction": 0.5, **keys})
        assert outputs == expected
        assert names == family.moe_layers
        assert counted["slots"] == len(names) * family.num_experts // 2
        assert counted["lookups_total/miss"] > 0
        assert counted[f"waves_total/{mode}"] > 0
