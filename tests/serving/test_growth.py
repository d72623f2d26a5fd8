"""The expert cache grows when vLLM has measured memory: on the CPU platform, with figures that stand in for a GPU's."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.serving import compat, steps
from vllm_expert_prefetch.serving.layer import CachedRoutedExperts
from vllm_expert_prefetch.serving.sizes import CacheSizes
from vllm_expert_prefetch.serving.worker import Worker

NUM_LAYERS, NUM_EXPERTS, TOP_K = 8, 16, 2
RECORD = 3 * 128 * 64 * 2
"""Bytes of an expert of the tiny model."""
KV_BYTES = 64 << 20
LINK = {"prefetch": "on", "emulated_link_gbps": 0.1}


@pytest.fixture(scope="module")
def expected():
    with open_engine(TINY_MODEL, None) as llm:
        return greedy(llm, prompts(6), 24)


class Measured:
    """What the stand-in for vLLM's profile saw, and what came of it."""

    def __init__(self, monkeypatch, records):
        """`records`: how many more than the fewest slots fit beside a KV cache of KV_BYTES."""
        self.addresses, self.slots, self.stores, self.looks_ahead, self.kv_bytes_seen = [], [], [], [], []
        available = KV_BYTES + int(records * RECORD)

        def measure(worker):
            worker.model_runner.warming_up_model()
            worker.requested_memory, worker.peak_activation_memory = 10 * available, available
            moe_layers = compat.moe_layers_of(worker.model_runner.model)
            self.slots = [layer.cache.num_slots for layer in moe_layers]
            self.looks_ahead = [layer.look_ahead is not None for layer in moe_layers]
            self.stores = [weakref.ref(layer.cache.store.views["w13_weight"]) for layer in moe_layers]
            self.addresses = addresses_of(moe_layers)
            self.kv_bytes_seen.append(worker.cache_config.kv_cache_memory_bytes)
            return available

        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # a size of the KV cache before all others
        monkeypatch.setattr(compat, "measures_memory", lambda: True)
        monkeypatch.setattr(CPUWorker, "determine_available_memory", measure)


def addresses_of(moe_layers):
    return [[getattr(layer, name).data_ptr() for name in ("w13_weight", "w2_weight")] for layer in moe_layers]


@pytest.mark.proves("a cache that grows into free memory")
@pytest.mark.engine
def test_it_starts_with_the_fewest_slots_and_takes_what_the_kv_cache_need_not_have(monkeypatch, expected):
    measured = Measured(monkeypatch, records=7 * 6.5)  # another slot takes 8 records and gives one back
    with open_engine(TINY_MODEL, LINK, kv_cache_memory_bytes=KV_BYTES) as llm:
        assert greedy(llm, prompts(6), 24) == expected
        assert (measured.slots, measured.kv_bytes_seen) == ([TOP_K] * NUM_LAYERS, [None])
        assert measured.looks_ahead == [True] * NUM_LAYERS, "so that vLLM measures it"
        assert [cache.num_slots for cache in caches(llm)] == [TOP_K + 6] * NUM_LAYERS
        assert addresses_of(layers(llm)) == measured.addresses
        found, worker = counters(llm), layers(llm)[0].worker
        assert found["slots"] == NUM_LAYERS * (TOP_K + 6)
        assert found["cache_bytes"] == NUM_LAYERS * (TOP_K + 6) * RECORD
        assert found["overflow_bytes"] == (NUM_EXPERTS - TOP_K - 6) * RECORD
        assert min(found["lookups_total/hit"], found["lookups_total/miss"], found["predictions_total/used"]) > 0
        assert llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes == KV_BYTES
        assert "GB KV cache" in "".join(worker.describe())
        assert all(budget.num_records <= TOP_K + 6 for budget in worker.publisher._look_ahead.budgets)


@pytest.mark.engine
def test_with_room_for_all_experts_the_model_is_served_as_vllm_does_and_the_host_keeps_none(monkeypatch, expected):
    measured = Measured(monkeypatch, records=NUM_LAYERS * NUM_EXPERTS)
    with open_engine(TINY_MODEL, LINK | {"prefetch": "auto"}, kv_cache_memory_bytes=KV_BYTES) as llm:
        assert greedy(llm, prompts(6), 24) == expected
        worker = layers(llm)[0].worker
        assert [layer.cache for layer in layers(llm)] == [None] * NUM_LAYERS
        assert worker.caches is None
        found = counters(llm)
        assert (found["slots"], found["host_store_bytes"], found["overflow_bytes"]) == (128, 0, 0)
        assert worker.prefetch == "off: every expert has a slot"
        gc.collect()
        assert [store() for store in measured.stores] == [None] * NUM_LAYERS


@pytest.mark.engine
def test_a_kv_cache_that_does_not_fit_is_an_error_at_start(monkeypatch):
    Measured(monkeypatch, records=-1)
    with (
        pytest.raises(ConfigError, match=r"the KV cache that was asked for takes 0.0671 GB, and there are 0.0671 GB "),
        open_engine(TINY_MODEL, {}, kv_cache_memory_bytes=KV_BYTES),
    ):
        pass


def test_a_layer_that_becomes_resident_has_every_expert_in_its_own_row():
    views, rows = ({"w": torch.rand(4, 3), "s": torch.rand(4)} for _ in range(2))
    layer = SimpleNamespace(cache=SimpleNamespace(store=SimpleNamespace(views=views), tensors=rows))
    CachedRoutedExperts.become_resident(layer)
    assert layer.cache is None
    assert all(torch.equal(rows[name], view) for name, view in views.items())


def watched(monkeypatch, ours, measure):
    """A worker of vLLM's that is watched, with `ours` behind it."""
    cache_config = SimpleNamespace(kv_cache_memory_bytes=1000)
    worker = SimpleNamespace(determine_available_memory=measure, compile_or_warm_up_model=lambda: "compiled")
    worker.requested_memory, worker.peak_activation_memory = 9000, 10
    monkeypatch.setattr(steps, "find_worker", lambda _: ours)
    monkeypatch.setattr(compat, "kv_bytes_of", lambda _: 7)
    monkeypatch.setattr(compat, "least_of_ranks", lambda value: value - 1)
    steps.watch_memory(worker, SimpleNamespace(cache_config=cache_config))
    return worker, cache_config


def test_vllm_measures_although_it_was_told_the_size_of_its_kv_cache_and_all_ranks_take_the_least(monkeypatch):
    ours = SimpleNamespace(sizes=SimpleNamespace(grows=True), measured=lambda *figures: figures)
    seen = []
    worker, cache_config = watched(monkeypatch, ours, lambda: seen.append(cache_config.kv_cache_memory_bytes) or 5000)
    assert worker.determine_available_memory() == (9000, 10, 4999, 7)
    assert (seen, cache_config.kv_cache_memory_bytes) == ([None], 1000)


def test_a_measurement_that_fails_leaves_the_configuration_as_it_was(monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    worker, cache_config = watched(monkeypatch, SimpleNamespace(sizes=SimpleNamespace(grows=True)), fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.determine_available_memory()
    assert cache_config.kv_cache_memory_bytes == 1000


@pytest.mark.parametrize("ours", [None, SimpleNamespace(sizes=SimpleNamespace(grows=False))])
def test_where_nothing_grows_vllm_goes_its_own_way(monkeypatch, ours):
    worker, cache_config = watched(monkeypatch, ours, lambda: cache_config.kv_cache_memory_bytes)
    assert worker.determine_available_memory() == 1000
    assert worker.compile_or_warm_up_model() == "compiled"


def test_a_model_without_a_kv_cache_is_started_before_it_is_compiled(monkeypatch):
    started = []
    ours = SimpleNamespace(sizes=SimpleNamespace(grows=True), start_grown=lambda: started.append(True))
    worker, _ = watched(monkeypatch, ours, lambda: 0)
    assert worker.compile_or_warm_up_model() == "compiled"
    assert started == [True]


@pytest.mark.parametrize(("looks_ahead", "areas"), [(True, 2), (False, 1)])
def test_a_second_area_goes_where_nothing_looks_ahead(monkeypatch, looks_ahead, areas):
    monkeypatch.setattr(compat, "measures_memory", lambda: True)
    model, cache = SimpleNamespace(max_model_len=100), SimpleNamespace(kv_cache_memory_bytes=None)
    config = ExpertPrefetchConfig(areas=2, prefetch="on")
    sizes = CacheSizes(SimpleNamespace(cache_config=cache, model_config=model), config)
    rows = torch.empty(8, 4096, dtype=torch.uint8)
    layer = SimpleNamespace(accelerator=rows.device, local_num_experts=8, top_k=2, unprocessed_row_bytes=())
    sizes.decide([layer] * 4, layer, {"w": rows})
    made = SimpleNamespace(caches=None, sizes=sizes, _verify=lambda: None)
    made._look_ahead = lambda model, link_rate: "look-ahead" if looks_ahead else None
    Worker.start(made, torch.nn.Module())
    sizes.grow(10**6, 0, 50_000, 10_000)
    assert sizes.areas == areas


def test_nothing_grows_where_a_token_needs_every_expert(monkeypatch):
    monkeypatch.setattr(compat, "measures_memory", lambda: True)
    sizes = CacheSizes(SimpleNamespace(), ExpertPrefetchConfig())
    rows = torch.empty(2, 4096, dtype=torch.uint8)
    layer = SimpleNamespace(accelerator=rows.device, local_num_experts=2, top_k=2, unprocessed_row_bytes=())
    sizes.decide([layer] * 4, layer, {"w": rows})
    assert (sizes.slots, sizes.grows) == ([2] * 4, False)


@pytest.mark.parametrize(("tokens", "left"), [(50, 50_000), (250, 250_000), (251, 251_000)])
def test_tokens_for_the_kv_cache_are_a_share_of_a_sequence_or_several(monkeypatch, tokens, left):
    monkeypatch.setattr(compat, "measures_memory", lambda: True)
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None), model_config=SimpleNamespace(max_model_len=100)
    )
    sizes = CacheSizes(vllm_config, ExpertPrefetchConfig(kv_cache_tokens=tokens))
    rows = torch.empty(8, 4096, dtype=torch.uint8)
    layer = SimpleNamespace(accelerator=rows.device, local_num_experts=8, top_k=2, unprocessed_row_bytes=())
    sizes.decide([layer] * 4, layer, {"w": rows})
    assert sizes.slots == [2] * 4
    assert sizes.grow(10**6, 0, 300_000, 100_000) == left
    assert sizes.slots == [2 + (300_000 - left) // (3 * 4096) if left > 240_000 else 8] * 4
