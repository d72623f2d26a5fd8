"""A model whose layers differ in their number of experts, their size and top-k: each is sized by its own numbers."""

import copy

import pytest
import transformers
from engines import caches, counters, greedy, open_engine
from families import FAMILIES, prompt, random_weights
from vllm.model_executor.models import qwen3_moe

KINDS = (
    {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 1},
    {"num_experts": 24, "moe_intermediate_size": 32, "num_experts_per_tok": 6},
    {"num_experts": 16, "moe_intermediate_size": 96, "num_experts_per_tok": 2},
)
USUAL = {**FAMILIES["qwen3-moe"].config, "num_hidden_layers": 6, "num_experts": 24}
RECORDS = [3 * USUAL["hidden_size"] * kind["moe_intermediate_size"] * 2 for kind in KINDS]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 256}
PROMPTS = [prompt(length, seed=3) for length in (70, 9, 41)]


def of_layer(config, number):
    """The model's configuration as its layer of this number is to see it."""
    changed = copy.deepcopy(config)
    for name, value in KINDS[number % 3].items():
        setattr(changed, name, value)
    return changed


class MixedBlock(qwen3_moe.Qwen3MoeSparseMoeBlock):
    def __init__(self, vllm_config, prefix="", **options):
        model, usual = vllm_config.model_config, vllm_config.model_config.hf_text_config
        model.hf_text_config = of_layer(usual, int(prefix.split(".")[-2]))
        super().__init__(vllm_config, prefix, **options)
        model.hf_text_config = usual


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of Qwen3-MoE with such layers, which vLLM's own code loads."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(**USUAL, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config)
    for number, layer in enumerate(model.model.layers):
        layer.mlp = Qwen3MoeSparseMoeBlock(of_layer(config, number)).to(model.dtype)
    random_weights(model)
    directory = tmp_path_factory.mktemp("mixed")
    model.save_pretrained(directory)
    return directory


@pytest.mark.engine
def test_such_a_model_is_bit_equal_with_a_share_of_each_layers_experts_and_within_a_size_in_bytes(model, monkeypatch):
    monkeypatch.setattr(qwen3_moe, "Qwen3MoeSparseMoeBlock", MixedBlock)
    with open_engine(model, None, **OPTIONS) as llm:
        expected = greedy(llm, PROMPTS, 24)
    link = {"prefetch": "on", "emulated_link_gbps": 0.1}
    with open_engine(model, {"cache_fraction": 0.5, **link}, **OPTIONS) as llm:
        assert greedy(llm, PROMPTS, 24) == expected
        words = [cache.words() for cache in caches(llm)]
        assert [cache.num_slots for cache in caches(llm)] == [2, 12, 8, 2, 12, 8]
        counted = counters(llm)
    assert all(min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0 for layer in words)
    assert counted["transfer_bytes_total/prefetch"] > 0
    with open_engine(model, {"cache_gb": 3e-3, **link}, **OPTIONS) as llm:
        assert greedy(llm, PROMPTS, 24) == expected
        slots = [cache.num_slots for cache in caches(llm)]
        counted = counters(llm)
    assert slots == [8, 8, 8, 8], "the layers of 4 experts hold them all"
    held = counted["cache_bytes"] + counted["overflow_bytes"] + 2 * KINDS[0]["num_experts"] * RECORDS[0]
    assert 3e6 - sum(RECORDS) < held <= 3e6
