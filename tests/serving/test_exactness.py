"""The tokens and log-probabilities of the plugin are those of plain vLLM."""

import pytest
from engines import TINY_MODEL, Output, counters, greedy, layers, open_engine, prompts

from vllm_expert_prefetch.residency import Split

pytestmark = pytest.mark.engine

PROMPTS = prompts(16)


def generate(llm) -> list[list[Output]]:
    """Batch 16, then three of the prompts alone."""
    return [greedy(llm, PROMPTS), *(greedy(llm, [prompt]) for prompt in PROMPTS[:3])]


@pytest.fixture(scope="module")
def stock() -> list[list[Output]]:
    with open_engine(TINY_MODEL, None) as llm:
        return generate(llm)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_smoke_bit_equal_at_every_residency(stock, share):
    with open_engine(TINY_MODEL, {"cache_fraction": share}) as llm:
        assert generate(llm) == stock
        counted = counters(llm)
    assert (counted["transfer_bytes_total/demand"] > 0) == (share < 1)
    assert counted["waves_total/experts"] == counted["waves_total/tokens"] == 0


@pytest.mark.parametrize("policy", ["lfu", "lfru", "random"])
def test_bit_equal_with_every_policy(stock, policy):
    with open_engine(TINY_MODEL, {"cache_fraction": 0.25, "policy": policy}) as llm:
        assert generate(llm) == stock


def test_bit_equal_when_planned_in_python_and_staged_by_torch(stock):
    with open_engine(TINY_MODEL, {"cache_fraction": 0.25, "staging": "torch"}) as llm:
        assert generate(llm) == stock
        assert layers(llm)[0].cache.staging.name == "torch"


def test_waves_by_tokens_are_bit_equal(stock):
    config = {"slots_per_layer": 4, "stream_buffer": "off", "max_token_waves": 64}
    with open_engine(TINY_MODEL, config) as llm:
        assert generate(llm) == stock
        counted = counters(llm)
    assert counted["waves_total/tokens"] > 0
    assert counted["waves_total/experts"] == counted["waves_total/stream"] == 0


def test_waves_by_experts_deviate_by_rounding_only(stock):
    """The logits are bf16, up to 32: one unit in the last place is 0.125. Wrong experts deviate by several nats."""
    config = {"slots_per_layer": 4, "stream_buffer": "off", "max_token_waves": 0}
    with open_engine(TINY_MODEL, config) as llm:
        ours = generate(llm)
        counted = counters(llm)
    assert counted["waves_total/experts"] > 0
    assert counted["waves_total/tokens"] == counted["waves_total/stream"] == 0
    deviations = [
        abs(mine.logprobs[0][0] - theirs.logprobs[0][0])
        for mine_batch, theirs_batch in zip(ours, stock, strict=True)
        for mine, theirs in zip(mine_batch, theirs_batch, strict=True)
    ]
    assert max(deviations) <= 0.3
    assert sum(deviations) / len(deviations) <= 0.1


def test_waves_by_experts_of_one_layer_stay_within_bf16_rounding(stock):
    """Layer by layer, where nothing amplifies: each of the K partial sums is rounded to bf16 once more."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator).bfloat16()
    weights = torch.softmax(torch.randn(64, 2, generator=generator), dim=1)
    ids = torch.stack([torch.randperm(16, generator=generator)[:2] for _ in range(64)]).to(torch.int32)
    outputs, splits = [], []
    for config in ({"stream_buffer": "on"}, {"stream_buffer": "off", "max_token_waves": 0}):
        with torch.inference_mode(), open_engine(TINY_MODEL, {"slots_per_layer": 4} | config) as llm:
            layer = layers(llm)[3]
            output, step = layer.executor.run(layer.cache.serve(ids, 64), x, weights, ids)
            outputs.append(output.float())
            splits.append((step.split, step.num_waves > 1))
    exact, split = outputs
    assert splits == [(Split.STREAM, False), (Split.EXPERTS, True)]
    assert (split - exact).abs().max() <= 3 * 2**-8 * exact.abs().max()


def test_compiled_is_bit_equal_to_compiled_stock():
    results = []
    for config in (None, {"cache_fraction": 0.5}):
        with open_engine(TINY_MODEL, config, enforce_eager=False) as llm:
            results.append([greedy(llm, PROMPTS), greedy(llm, PROMPTS[:1])])
    assert results[0] == results[1]


def test_counters_are_conserved():
    """Every miss moved one record; lookups are the distinct experts of each wave; nothing counted before a request."""
    with open_engine(TINY_MODEL, {"cache_fraction": 0.25}) as llm:
        assert sum(value for series, value in counters(llm).items() if "_total" in series) == 0
        greedy(llm, PROMPTS[:4], num_tokens=8)
        counted = counters(llm)
        record_bytes = layers(llm)[0].store.record_bytes
        for layer in layers(llm):
            layer.cache.planner.check_integrity()
    misses = counted["lookups_total/miss"]
    moved = counted["transfer_bytes_total/demand"] + counted["transfer_bytes_total/stream"]
    assert moved == misses * record_bytes > 0
    assert counted["waves_total/none"] + counted["waves_total/stream"] == 8 * len(layers_of_tiny())
    # top-2 of 4 requests: 2 to 8 distinct experts in each decode step of each layer
    assert counted["lookups_total/hit"] + misses >= 2 * 8 * len(layers_of_tiny())


def layers_of_tiny() -> range:
    return range(8)
