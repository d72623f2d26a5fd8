"""What fits, and what is answered where it does not."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engines import TINY_MODEL, layers, open_engine

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import Load, Ranks, layer_shapes, make_budget
from vllm_expert_prefetch.planning.model_files import find
from vllm_expert_prefetch.planning.sizing import GB, cache_bytes
from vllm_expert_prefetch.planning.timing import Machine

CARD = Machine(24e9, 1e12, None, 25e9)
QWEN = find("Qwen3-30B-A3B")
PAGE = 4096


def test_everything_together_is_no_more_than_vllm_may_use_and_another_slot_would_be():
    budget = make_budget(QWEN, CARD, Load(8192, 4))
    taken = budget.weights_bytes + budget.activation_bytes + budget.kv_bytes + budget.cache_bytes
    assert taken <= budget.requested_bytes == int(0.9 * 24e9)
    more = cache_bytes(budget.layers, [num + 1 for num in budget.slots], 2 << 20)
    assert taken - budget.cache_bytes + more > budget.requested_bytes
    assert budget.overflow_rows == 128 - budget.slots[0]


def test_a_longer_context_and_more_sequences_leave_fewer_slots_and_smaller_records_more():
    plain = make_budget(QWEN, CARD, Load(8192, 1)).slots[0]
    assert make_budget(QWEN, CARD, Load(32768, 1)).slots[0] < plain
    assert make_budget(QWEN, CARD, Load(8192, 4)).slots[0] < plain
    assert make_budget(QWEN, CARD, Load(8192, 4, 1.0)).slots[0] > make_budget(QWEN, CARD, Load(8192, 4)).slots[0]
    assert make_budget(find("Qwen3-30B-A3B", "fp8"), CARD, Load(8192, 1)).share > 0.45


def test_ranks_divide_experts_and_layers():
    alone, two = layer_shapes(QWEN, Ranks()), layer_shapes(QWEN, Ranks(tp=2))
    assert [sum(own[0].row_bytes) for own in (alone, two)] == [9_437_184, 4_718_592]
    (shape, *_), stage = layer_shapes(QWEN, Ranks(tp=2, ep=2)), layer_shapes(QWEN, Ranks(pp=2))
    assert (shape.num_experts, sum(shape.row_bytes)) == (64, 9_437_184)
    assert len(stage) == 24
    with pytest.raises(ConfigError, match="768 cannot be divided over 5 GPUs: use 4"):
        layer_shapes(QWEN, Ranks(tp=5))


@pytest.mark.parametrize(
    ("model", "load"), [(QWEN, Load(40960, 64)), (find("DeepSeek-V3"), Load(8192, 1)), (find("GLM-5"), Load(65536, 8))]
)
def test_following_the_error_message_is_enough(model, load):
    with pytest.raises(ConfigError) as refused:
        make_budget(model, CARD, load)
    message = str(refused.value)
    assert model.name in message
    assert "there are 24.0 GB" in message
    ways = dict(re.findall(r"--(gpu-memory|context|concurrency|tp) (\d+)", message))
    assert "gpu-memory" in ways
    make_budget(model, replace(CARD, memory_bytes=int(ways["gpu-memory"]) * GB), load)
    if "context" in ways:
        make_budget(model, CARD, replace(load, context=int(ways["context"])))
    if "concurrency" in ways:
        make_budget(model, CARD, replace(load, concurrency=int(ways["concurrency"])))
    if "tp" in ways:
        make_budget(model, CARD, load, Ranks(tp=int(ways["tp"])))


@pytest.mark.engine
def test_a_worker_has_the_slots_and_bytes_that_were_planned():
    given = {"cache_gb": 0.003}
    planned = make_budget(find(str(TINY_MODEL)), CARD, Load(512, 1), config=ExpertPrefetchConfig(**given), page=PAGE)
    with open_engine(TINY_MODEL, given) as llm:
        served = layers(llm)
        assert [layer.cache.num_slots for layer in served] == list(planned.slots)
        assert {layer.cache.record_bytes for layer in served} == {planned.record_bytes}
        sizes = served[0].worker.sizes
        assert cache_bytes(sizes._shapes, sizes.slots, sizes._page) == planned.cache_bytes


def test_a_worker_that_grows_gets_the_slots_that_were_planned(monkeypatch):
    from vllm_expert_prefetch.serving import compat
    from vllm_expert_prefetch.serving.sizes import CacheSizes

    monkeypatch.setattr(compat, "measures_memory", lambda: True)
    model = find(str(TINY_MODEL))
    roomy = make_budget(model, CARD, Load(512, 1), page=PAGE)
    needed = roomy.weights_bytes + roomy.activation_bytes + roomy.kv_bytes + roomy.experts_bytes // 2
    planned = make_budget(model, replace(CARD, memory_bytes=needed / 0.9), Load(512, 1), page=PAGE)
    assert 2 < planned.slots[0] < 16, "neither the fewest slots nor all"
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=planned.kv_bytes),
        model_config=SimpleNamespace(max_model_len=512),
    )
    sizes = CacheSizes(vllm_config, ExpertPrefetchConfig())
    tensors = {"w13_weight": torch.empty(16, 128, 128).bfloat16(), "w2_weight": torch.empty(16, 128, 64).bfloat16()}
    moe_layers = [
        SimpleNamespace(
            local_num_experts=16, top_k=2, unprocessed_row_bytes=(32768, 16384), accelerator=torch.device("cpu")
        )
    ] * 8
    sizes.decide(moe_layers, moe_layers[0], tensors)
    smallest = cache_bytes(sizes._shapes, sizes.slots, PAGE)
    available = planned.requested_bytes - planned.weights_bytes - planned.activation_bytes - smallest
    sizes.grow(planned.requested_bytes, planned.activation_bytes, available, planned.kv_bytes)
    assert sizes.slots == list(planned.slots)
    assert cache_bytes(sizes._shapes, sizes.slots, PAGE) == planned.cache_bytes
