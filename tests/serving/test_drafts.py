"""Speculative decoding with a draft model: vLLM hands it the target's settings, and the plugin leaves it alone."""

import pytest
from engines import TINY_MODEL, counters, greedy, layers, open_engine
from families import write_checkpoint

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """A dense draft with the target's vocabulary."""
    folder = write_checkpoint("llama", tmp_path_factory.mktemp("draft"), vocab_size=4096, num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((TINY_MODEL / name).read_text())
    return {"model": str(folder), "method": "draft_model", "num_speculative_tokens": 2}


def test_a_dense_draft_gives_the_tokens_of_plain_vllm_and_only_the_targets_layers_count(draft):
    prompts = [f"It is a truth, number {number}," for number in range(3)]
    with open_engine(TINY_MODEL, None, speculative_config=draft) as llm:
        stock = greedy(llm, prompts)
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5}, speculative_config=draft) as llm:
        assert greedy(llm, prompts) == stock
        values = counters(llm)
        assert len(layers(llm)) == values["moe_layers"] == 8
        assert values["lookups_total/miss"] > 0
        steps = values["steps_total/decode"] + values["steps_total/prefill"] + values["steps_total/mixed"]
        assert values["moe_steps_total/narrow"] + values["moe_steps_total/wide"] == 8 * steps
