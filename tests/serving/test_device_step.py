"""Steps that a GPU decides, as far as a machine without one can tell: how they are split, what vLLM tells them."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader

from vllm_expert_prefetch.metrics.counters import layer_index
from vllm_expert_prefetch.metrics.definitions import INDEX
from vllm_expert_prefetch.prediction.count_gate import Outcomes
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.device_step import DeviceStep
from vllm_expert_prefetch.serving.device_totals import DeviceTotals

NUM_EXPERTS, NUM_SLOTS, TOP_K = 16, 6, 2


class FakeCache:
    """Slots that hold, after each call, just what that call asked for."""

    tokens_per_wave = NUM_SLOTS // TOP_K

    def __init__(self):
        self.slots = [-1] * NUM_SLOTS
        self.streamed = []
        self.waves = []
        self.calls = []

    def num_waves(self, num_tokens):
        return math.ceil(num_tokens / self.tokens_per_wave)

    def serve(self, topk_ids, real):
        self.calls.append("serve")
        assert topk_ids.numel() <= NUM_SLOTS, "a wave that may not fit"
        assert len(real) == len(topk_ids)
        experts = topk_ids.unique().tolist()
        self.slots[: len(experts)] = experts
        self.waves.append(len(topk_ids))
        return torch.tensor([[self.slots.index(e) for e in row] for row in topk_ids.tolist()])

    def stream(self, topk_ids, real):
        self.streamed.append((len(topk_ids), len(real)))


def device_step(max_token_waves=8, can_stream=True):
    """Kernels that add up, per row, the weighted numbers of the experts that they find."""
    cache = FakeCache()

    def slot_kernel(x, weights, slot_ids):
        cache.calls.append("kernel")
        experts = torch.tensor(cache.slots)[slot_ids]
        return x + (weights * experts).sum(1, keepdim=True)

    def buffer_kernel(x, weights, ids):
        return x + (weights * ids).sum(1, keepdim=True)

    return cache, DeviceStep(cache, slot_kernel, buffer_kernel if can_stream else None, max_token_waves)


def routed(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    return torch.rand(num_tokens, 4, generator=generator), torch.rand(num_tokens, TOP_K, generator=generator), ids


@pytest.mark.parametrize(
    ("num_tokens", "waves", "streamed"),
    [(1, [1], []), (3, [3], []), (4, [3, 1], []), (9, [3, 3, 3], []), (10, [], [(10, 10)]), (200, [], [(200, 200)])],
)
def test_a_step_is_split_by_its_width_alone_and_every_row_is_computed(num_tokens, waves, streamed):
    cache, step = device_step(max_token_waves=3)
    x, weights, ids = routed(num_tokens)
    assert torch.equal(step.run(x, weights, ids), x + (weights * ids).sum(1, keepdim=True))
    assert (cache.waves, cache.streamed) == (waves, streamed)


def test_without_a_stream_buffer_there_are_as_many_waves_as_it_takes():
    cache, step = device_step(max_token_waves=3, can_stream=False)
    x, weights, ids = routed(20)
    assert torch.equal(step.run(x, weights, ids), x + (weights * ids).sum(1, keepdim=True))
    assert cache.waves == [3] * 6 + [2]


@pytest.mark.parametrize(("num_tokens", "looks_ahead"), [(1, True), (3, True), (4, False), (200, False)])
def test_a_step_of_one_wave_looks_ahead_between_staging_and_kernel_and_no_other_does(num_tokens, looks_ahead):
    cache, step = device_step(max_token_waves=3)
    x, weights, ids = routed(num_tokens)

    def look_ahead(signals, real):
        cache.calls.append("look ahead")
        assert all(torch.equal(*pair) for pair in zip(signals, (x, ids, weights), strict=True))
        assert real.shape == (num_tokens,)

    assert torch.equal(step.run(x, weights, ids, look_ahead), x + (weights * ids).sum(1, keepdim=True))
    if looks_ahead:
        assert cache.calls == ["serve", "look ahead", "kernel"]
    else:
        assert "look ahead" not in cache.calls


def context(slot_mapping):
    return override_forward_context(ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping=slot_mapping))


def test_rows_are_real_where_the_kv_cache_has_a_place_for_them():
    mapping = torch.tensor([7, 8, -1, -1, 99])
    with context({"layer": mapping}):
        found = compat.slot_mapping(4, torch.device("cpu"))
    assert found.tolist() == [7, 8, -1, -1]
    assert found.data_ptr() == mapping.data_ptr(), "vLLM's own tensor, which it fills before each replay"


def test_a_profile_run_has_no_real_row():
    assert compat.slot_mapping(3, torch.device("cpu")).tolist() == [-1] * 3
    with context({}):
        assert compat.slot_mapping(2, torch.device("cpu")).tolist() == [-1] * 2


def test_the_kernel_takes_the_tiles_of_all_experts_inside_the_context():
    for_experts = compat.tiles_of((128, 1536, 2048), (128, 2048, 768), 8, 4)
    with compat.fixed_tiles({**for_experts, "BLOCK_SIZE_K": 4711}):
        inside = try_get_optimal_moe_config((16, 1536, 2048), (16, 2048, 768), 8, None, 4)
    after = try_get_optimal_moe_config((16, 1536, 2048), (16, 2048, 768), 8, None, 4)
    assert inside["BLOCK_SIZE_K"] == 4711
    assert after["BLOCK_SIZE_K"] != 4711


def test_vllm_joins_the_prefetch_stream_around_captures_and_replays():
    calls = []
    try:
        compat.install_offloader(lambda: calls.append("join"))
        get_offloader().sync_prev_onload()
        get_offloader().join_after_forward()
        assert get_offloader().wrap_modules(iter(["module"])) == ["module"]
    finally:
        set_offloader(NoopOffloader())
    assert calls == ["join", "join"]


class FakeCounters:
    """Sums by index; gauges by name."""

    def __init__(self, layers=()):
        self.layers = layers
        self.counted = {}

    def add(self, index, amount):
        assert amount >= 0, "a counter fell"
        self.counted[index] = self.counted.get(index, 0.0) + amount

    def set(self, series, value):
        self.counted[series] = value

    def get(self, series):
        return self.counted.get(INDEX.get(series, series), 0.0)

    def found(self):
        return {series: value for series, index in INDEX.items() if (value := self.counted.get(index))}


def publisher(counters, look_ahead=None):
    """The totals of one layer, to be changed, and what publishes them."""
    totals = [0] * 24
    cache = SimpleNamespace(totals=lambda: list(totals), staging=SimpleNamespace(record_bytes=10))
    return totals, DeviceTotals([cache], counters, look_ahead)


def test_what_the_gpu_has_counted_reaches_the_counters_once():
    counters = FakeCounters()
    totals, published = publisher(counters)
    totals[10:15] = 9, 5, 1, 8, 7  # steps, hits, late, misses, evictions
    totals[21:23] = 2, 6  # of these streamed: steps, misses
    for _ in range(2):
        published._publish()
    assert counters.found() == {
        "lookups_total/hit": 5,
        "lookups_total/late": 1,
        "lookups_total/miss": 8,
        "evictions_total": 7,
        "waves_total/none": 7,
        "waves_total/stream": 2,
        "transfer_bytes_total/stream": 60,
        "transfer_bytes_total/demand": 20,
    }


def test_what_became_of_prefetches_reaches_the_counters_and_the_gates():
    counters = FakeCounters(layers=["3"])
    noted = []
    look_ahead = SimpleNamespace(
        note=lambda *told: noted.append(told),
        num_closed=4,
        truth=SimpleNamespace(totals=lambda: [10.0, 20.0, 12.0, 15.0, 7.5]),
    )
    totals, published = publisher(counters, look_ahead)
    totals[10:20] = 9, 5, 3, 0, 0, 4, 2, 1, 12, 5  # ... used, unused, displaced, issued, cancelled
    totals[23] = 1  # of the late, copied by the step
    counters.add(INDEX["steps_total/decode"], 8)
    counters.add(INDEX["step_seconds/decode/sum"], 0.4)
    for _ in range(2):
        published._publish()
    assert counters.found() == {
        "steps_total/decode": 8,
        "step_seconds/decode/sum": 0.4,
        "lookups_total/hit": 5,
        "lookups_total/late": 3,
        "waves_total/none": 9,
        "predictions_total/used": 4,
        "predictions_total/unused": 2,
        "predictions_total/cancelled": 5,
        "displaced_lookups_total": 1,
        "transfer_bytes_total/prefetch": 60,
        "transfer_bytes_total/demand": 10,
        "scored_tokens_total": 10,
        "recall_routed_total": 20,
        "recall_found_total/top_k": 12,
        "recall_found_total/fetched": 15,
        "missing_gate_mass_total": 2.5,
    }
    assert counters.counted["gated_layers"] == 4
    assert noted == [(0, Outcomes(9, saved=3, wasted=2, displaced=1), 0.05), (0, Outcomes(0, 0, 0, 0), None)]
    assert counters.counted[layer_index(0, "layer_lookups_total/late")] == 3


def test_bytes_brought_ahead_never_fall_when_totals_are_read_while_they_are_written():
    counters = FakeCounters()
    totals, published = publisher(counters)
    for totals[18], totals[19] in ((5, 1), (5, 3), (9, 3)):  # issued, cancelled
        published._publish()
    assert counters.found()["transfer_bytes_total/prefetch"] == 60
