"""Off means off: with the plugin installed and not asked for, nothing of vLLM changes."""

import gc

import pytest
from engines import TINY_MODEL, greedy, layers, open_engine, prompts
from families import FAMILIES, write_checkpoint
from prometheus_client import REGISTRY
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

pytestmark = pytest.mark.engine


def plugin_metrics() -> dict[str, list[float]]:
    """Values of every sample of the plugin in this process."""
    metrics = [metric for metric in REGISTRY.collect() if metric.name.startswith("vllm_expert_prefetch_")]
    return {metric.name: [sample.value for sample in metric.samples] for metric in metrics}


@pytest.mark.parametrize("asked", [None, False])
def test_every_layer_is_vllms_own_class(asked):
    gc.collect()
    before = plugin_metrics()  # empty, but for an engine that another test still holds
    with open_engine(TINY_MODEL, asked) as llm:
        greedy(llm, prompts(1), 4)
        assert [type(layer) for layer in layers(llm)] == [RoutedExperts] * 8
        assert all(layer.w13_weight.shape[0] == 16 for layer in layers(llm))
        assert plugin_metrics() == before


def test_a_models_own_subclass_stays_itself(tmp_path):
    model = write_checkpoint("gpt-oss", tmp_path / "gpt-oss")
    with open_engine(model, None, skip_tokenizer_init=True, max_model_len=256) as llm:
        names = {type(layer).__name__ for layer in layers(llm)}
        assert all(type(layer).__module__.startswith("vllm.") for layer in layers(llm))
    assert names == {"GptOssRoutedExperts"}


def test_turning_it_on_once_does_not_turn_it_on_for_the_next_engine():
    with open_engine(TINY_MODEL, True) as llm:
        assert {type(layer).__name__ for layer in layers(llm)} == {"CachedRoutedExperts"}
        served = greedy(llm, prompts(2))
        assert "vllm_expert_prefetch_lookups" in plugin_metrics()
    with open_engine(TINY_MODEL, None) as llm:
        assert {type(layer) for layer in layers(llm)} == {RoutedExperts}
        assert greedy(llm, prompts(2)) == served


def test_a_dense_model_is_served_as_ever(tmp_path):
    model = write_checkpoint("llama", tmp_path / "llama")
    with open_engine(model, None, skip_tokenizer_init=True, max_model_len=256) as llm:
        assert layers(llm) == []
        assert len(greedy(llm, FAMILIES["llama"].prompts[:1])[0].tokens) == 16
