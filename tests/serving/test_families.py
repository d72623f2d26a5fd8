"""Every family gives the tokens of plain vLLM with a part of its experts in slots: shared experts, expert biases,
grouped top-k with a correction bias, routed scaling and dense first layers are vLLM's own code."""

import pytest
import torch
from engines import caches, counters, greedy, layers, open_engine
from families import FAMILIES, OTHER_FAMILIES, PROMPT_LENGTHS, prompt, write_checkpoint
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.router import zero_expert_router

from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.planning.checkpoint import read_layer_shapes
from vllm_expert_prefetch.serving.sources import NotFound, find_sources

pytestmark = pytest.mark.engine

MOE_FAMILIES = [name for name in FAMILIES if FAMILIES[name].num_experts]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 256}
PROMPTS = [prompt(length, seed=1) for length in PROMPT_LENGTHS]
LINK = {"cache_fraction": 0.5, "emulated_link_gbps": 0.1}
MORE_OPTIONS = {"qwen3-vl-moe": {"limit_mm_per_prompt": {"image": 0, "video": 0}}}


@pytest.fixture
def routed(monkeypatch):
    """What is routed where there is look-ahead: layer, input (T, H) of the experts, and their ids (T, K)."""
    seen, after = [], LookAhead.after

    def note(self, layer, true, rows, routed):
        seen.append((layer, true.hidden[:rows].clone(), true.topk_ids[:rows].clone()))
        return after(self, layer, true, rows, routed)

    monkeypatch.setattr(LookAhead, "after", note)
    return seen


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_family_is_bit_equal_with_a_quarter_and_half_of_its_experts(name, tmp_path):
    model = write_checkpoint(name, tmp_path / name)
    family = FAMILIES[name]

    def generate(llm):
        return [greedy(llm, family.prompts, 24), greedy(llm, family.prompts[:1], 24)]

    with open_engine(model, None, **OPTIONS) as llm:
        expected = generate(llm)
    for share in (0.25, 0.5):
        with open_engine(model, {"cache_fraction": share}, **OPTIONS) as llm:
            assert generate(llm) == expected
            assert_the_checkpoint_tells_the_layers(model, llm)
            assert [layer.layer_name for layer in layers(llm)] == family.moe_layers
            counted, words = counters(llm), [cache.words() for cache in caches(llm)]
        assert counted["slots"] == len(words) * family.num_experts * share
        assert all(min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0 for layer in words)


@pytest.mark.parametrize("name", [name for name in OTHER_FAMILIES if name != "longcat"])
def test_another_family_is_bit_equal_with_half_of_its_experts_and_looks_ahead(name, tmp_path, torchvision, routed):
    model = write_checkpoint(name, tmp_path / name)
    options = OPTIONS | MORE_OPTIONS.get(name, {})
    with open_engine(model, None, **options) as llm:
        expected = greedy(llm, PROMPTS, 12)
    with open_engine(model, LINK | {"prefetch": "on"}, **options) as llm:
        assert greedy(llm, PROMPTS, 12) == expected
        assert_the_checkpoint_tells_the_layers(model, llm)
        assert share_understood(llm, routed) > 0.95  # vLLM rounds logits to bfloat16: near ties fall the other way
        words = [cache.words() for cache in caches(llm)]
        prefetched = counters(llm)["transfer_bytes_total/prefetch"]
    assert len(words) == OTHER_FAMILIES[name][2]
    assert all(layer.hits > 0 and layer.steps > 0 for layer in words)
    assert min(sum(layer.misses for layer in words), sum(layer.wide_steps for layer in words), prefetched) > 0


def test_experts_that_compute_nothing_are_bit_equal_and_not_looked_ahead_for(tmp_path, monkeypatch):
    """LongCat, with two kernels in torch that vLLM has for GPUs alone. Its gate also answers for those experts."""
    chosen = []

    def topk_softmax(weights, ids, _, logits, renormalize, bias, is_padding):
        scores = logits.float().softmax(-1)
        ids.copy_((scores + bias).topk(ids.shape[1])[1])
        weights.copy_(scores.gather(-1, ids.long()))

    def compute_nothing(expert_indices, expert_scales, num_experts, zero_expert_type, hidden_states):
        is_zero = expert_indices >= num_experts
        chosen.append(int(is_zero.sum()))
        return hidden_states * (expert_scales * is_zero).sum(-1, keepdim=True).to(hidden_states.dtype)

    monkeypatch.setattr(_custom_ops, "topk_softmax", topk_softmax)
    monkeypatch.setattr(zero_expert_router, "zero_experts_compute_triton", compute_nothing)
    model = write_checkpoint("longcat", tmp_path)
    with open_engine(model, None, **OPTIONS) as llm:
        expected = greedy(llm, PROMPTS, 12)
    with open_engine(model, LINK, **OPTIONS) as llm:
        assert greedy(llm, PROMPTS, 12) == expected
        words = [cache.words() for cache in caches(llm)]
        assert not counters(llm)["transfer_bytes_total/prefetch"]
        with pytest.raises(NotFound, match="no gate from 128 hidden values to 16 experts"):
            sources(llm)
    assert len(words) == OTHER_FAMILIES["longcat"][2]
    assert all(min(layer.hits, layer.misses) > 0 for layer in words)
    assert sum(chosen) > 0


def sources(llm):
    return find_sources(llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model())


def share_understood(llm, routed):
    """Of the experts that were chosen, the share that the gates choose which were found."""
    gates = [source.gate for source in sources(llm)]
    same = [
        (gates[layer].routing.choose(gates[layer].logits(hidden), ids.shape[1]).ids[..., None] == ids[:, None]).any(-1)
        for layer, hidden, ids in routed
    ]
    return torch.cat(same).float().mean().item()


def assert_the_checkpoint_tells_the_layers(model, llm):
    """What is read of the checkpoint's headers is what the layers turned out to be."""
    config = llm.llm_engine.vllm_config.model_config.hf_text_config
    found = [
        (
            layer.local_num_experts,
            layer.top_k,
            sorted(tensor.rows[0].nbytes for tensor in layer.expert_tensors.values()),
        )
        for layer in layers(llm)
    ]
    told = read_layer_shapes(model, range(config.num_hidden_layers), found[0][1], element_bytes=2, num_ranks=1)
    assert [(layer.num_experts, layer.top_k, sorted(layer.row_bytes)) for layer in told] == found
