"""Steps that a GPU decides, as far as a machine without one can tell: how they are split, what vLLM tells them."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config
from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader

from vllm_expert_prefetch.metrics.definitions import INDEX
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

    def num_waves(self, num_tokens):
        return math.ceil(num_tokens / self.tokens_per_wave)

    def serve(self, topk_ids, real):
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


def test_what_the_gpu_has_counted_reaches_the_counters_once():
    totals = [0] * 24
    counted = dict.fromkeys(INDEX.values(), 0.0)
    cache = SimpleNamespace(totals=lambda: list(totals), staging=SimpleNamespace(record_bytes=10))
    published = DeviceTotals([cache], SimpleNamespace(add=lambda index, n: counted.update({index: counted[index] + n})))
    totals[10:15] = 9, 5, 1, 8, 7  # steps, hits, late, misses, evictions
    totals[21:23] = 2, 6  # of these streamed: steps, misses
    for _ in range(2):
        published._publish()
    found = {series: counted[index] for series, index in INDEX.items() if counted[index]}
    assert found == {
        "lookups_total/hit": 5,
        "lookups_total/late": 1,
        "lookups_total/miss": 8,
        "evictions_total": 7,
        "waves_total/none": 7,
        "waves_total/stream": 2,
        "transfer_bytes_total/stream": 60,
        "transfer_bytes_total/demand": 20,
    }
