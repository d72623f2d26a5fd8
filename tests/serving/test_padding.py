"""On a GPU, tokens are told from padding by where the KV cache takes them: by the mapping of an attention layer."""

from types import SimpleNamespace

import pytest
import torch
from engines import TINY_MODEL, greedy, open_engine, prompts
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError

SLOTS = torch.tensor([21, 41, 66, -1, -1])
NEVER_WRITTEN = torch.full((5,), -1)
"""vLLM leaves the mapping of recurrent states as dummy runs have filled it."""
X = torch.zeros(4, 8)


def layer(kind):
    made = type("Layer", (kind,), {})
    made.__abstractmethods__ = frozenset()
    return made()


LAYERS = {"recurrent": layer(MambaBase), "attention": layer(AttentionLayerBase)}


def context(*names):
    mappings = {name: SLOTS if name == "attention" else NEVER_WRITTEN for name in names}
    return SimpleNamespace(slot_mapping=mappings, no_compile_layers=LAYERS)


@pytest.mark.parametrize("names", [("attention",), ("attention", "recurrent"), ("recurrent", "attention")])
def test_the_mapping_is_that_of_an_attention_layer_wherever_it_comes(names):
    found = compat._slots_of_rows(context(*names), X)
    assert found.tolist() == [21, 41, 66, -1]
    assert found.data_ptr() == SLOTS.data_ptr(), "vLLM fills this very tensor before a replay"


def test_it_is_looked_for_once_in_each_forward_pass():
    one = context("attention")
    found = compat._rows_on_gpu(one, X)
    one.slot_mapping = None
    assert compat._rows_on_gpu(one, X) is found
    assert compat._rows_on_gpu(one, X[:2]).tolist() == [-1] * 2, "of a module with other rows"
    assert compat._rows_on_gpu(context("recurrent"), X).tolist() == [-1] * 4


@pytest.mark.parametrize("given", [context("recurrent"), context(), SimpleNamespace(slot_mapping=None), None])
def test_without_such_a_mapping_every_row_is_padding(given):
    assert compat._slots_of_rows(given, X).tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("names", "tells"),
    [(("recurrent", "attention"), True), (("attention",), True), (("recurrent",), False), ((), False)],
)
def test_a_model_tells_padding_if_it_has_an_attention_layer_with_slots(names, tells):
    layers = {name: LAYERS[name] for name in names} | {"model.layers.0.mlp.experts": object()}
    compilation_config = SimpleNamespace(static_forward_context=layers)
    assert compat.tells_padding(SimpleNamespace(compilation_config=compilation_config)) == tells


@pytest.mark.engine
def test_a_vllm_that_tells_tokens_in_another_way_computes_none_with_rows_for_experts(monkeypatch):
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5}) as llm:
        monkeypatch.setattr(compat, "_forward_context", lambda: SimpleNamespace(attn_metadata=object()))
        with pytest.raises(TakeoverError, match="finds no token in a step that has some"):
            greedy(llm, prompts(1), 2)
