"""What a worker's recording says of it, and the slots that a profile warms: on every rank, of every stage."""

import logging
from types import SimpleNamespace

import pytest
import torch
from routed import CARD, EXPERTS, LAYERS, SLOTS, TOP_K, make_caches

from vllm_expert_prefetch.cache.base import tables_of
from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.serving import recording
from vllm_expert_prefetch.tracing.folder import TraceFolder
from vllm_expert_prefetch.tracing.profile import Profile, write_profile

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))
ROUTED = 2 * EXPERTS


def make_worker(rank=None, **config):
    """`rank`: of two that share the experts of each layer, one every second expert, the other one the rest."""
    caches = make_caches()
    if rank is not None:
        expert_map = torch.full((ROUTED + 1,), -1, dtype=torch.int32)
        expert_map[rank:ROUTED:2] = torch.arange(EXPERTS, dtype=torch.int32)
        for cache in caches.layers:
            cache.expert_map = expert_map
    layers = [
        SimpleNamespace(layer_name=f"model.layers.{number}.mlp.experts", number=number, cache=cache, accelerator="cpu")
        for number, cache in enumerate(caches.layers)
    ]
    publisher = SimpleNamespace(counters={"link_bytes_per_second": 3e9})
    settings = ExpertPrefetchConfig(**config)
    return SimpleNamespace(
        caches=caches, layers=layers, publisher=publisher, config=settings, execution="exact", prefetch="off"
    )


def make_config(num_ranks=1, num_stages=1):
    parallel = SimpleNamespace(
        rank=0, tensor_parallel_size=num_ranks, enable_expert_parallel=num_ranks > 1, pipeline_parallel_size=num_stages
    )
    return SimpleNamespace(model_config=SimpleNamespace(model="there/m", enforce_eager=True), parallel_config=parallel)


def resident(worker, layer):
    """The experts in slots, by their numbers among the rank's."""
    _, (row_of, *_) = tables_of(worker.caches.layers[layer].state)
    return {expert for expert, row in enumerate(row_of) if 0 <= row < SLOTS}


@pytest.mark.parametrize(
    ("rank", "num_ranks", "num_experts", "num_slots"),
    [(None, 1, EXPERTS, SLOTS), (0, 2, ROUTED, 2 * SLOTS), (1, 2, ROUTED, 2 * SLOTS)],
)
def test_a_recording_is_of_all_ranks_together(tmp_path, rank, num_ranks, num_experts, num_slots):
    worker = make_worker(rank)
    made = recording._recorder(worker, make_config(num_ranks), TraceFolder(tmp_path, 10**9), False)
    card = made.card
    made.finish()
    assert (card.num_experts, card.num_slots) == ((num_experts,) * LAYERS, (num_slots,) * LAYERS)
    assert (card.top_k, card.record_bytes) == (CARD.top_k, (worker.layers[0].cache.record_bytes,) * LAYERS)
    assert card.link_bytes_per_second == num_ranks * 3e9


def profile_in(tmp_path, layers, num_experts):
    """A higher number is used more."""
    write_profile(tmp_path / "p", Profile("m", {name: list(range(num_experts)) for name in layers}))
    return str(tmp_path / "p")


@pytest.mark.parametrize(("rank", "num_experts"), [(None, EXPERTS), (0, ROUTED), (1, ROUTED)])
def test_slots_are_warm_with_the_hottest_experts_that_the_rank_has(tmp_path, rank, num_experts):
    uses = [(7 * expert) % num_experts for expert in range(num_experts)]
    write_profile(tmp_path / "p", Profile("m", {name: uses for name in CARD.layers}))
    worker = make_worker(rank, profile=str(tmp_path / "p"))
    start = recording.warm_slots(worker, make_config())
    own = range(num_experts) if rank is None else range(rank, num_experts, 2)
    hottest = sorted(own, key=lambda expert: uses[expert])[-SLOTS:]
    assert [resident(worker, layer) for layer in range(LAYERS)] == [{own.index(expert) for expert in hottest}] * LAYERS
    assert start is not None


def test_a_profile_that_counts_one_ranks_experts_is_refused(tmp_path):
    worker = make_worker(0, profile=profile_in(tmp_path, CARD.layers, EXPERTS))
    with pytest.raises(ConfigError, match=rf"profile: .*says {EXPERTS} experts of layer 0, which has {ROUTED}"):
        recording.warm_slots(worker, make_config(2))


def test_a_stage_of_a_pipeline_takes_what_the_profile_has_of_its_layers(tmp_path, caplog):
    settings = {"profile": profile_in(tmp_path, ["1", "7"], EXPERTS)}
    worker = make_worker(**settings)
    with caplog.at_level(logging.INFO, "vllm.expert_prefetch"):
        start = recording.warm_slots(worker, make_config(num_stages=2))
    assert [len(resident(worker, layer)) for layer in range(LAYERS)] == [0, SLOTS, 0]
    assert f"{SLOTS} slots are warm" in caplog.messages[0]
    assert "says nothing of layers 0, 2: they start cold" in caplog.messages[1]
    for layer in range(LAYERS):  # each is asked what it gained
        start.note(layer, torch.zeros(1, TOP_K, dtype=torch.int64).numpy())
    with pytest.raises(ConfigError, match="nothing of layer 0"):
        recording.warm_slots(make_worker(**settings), make_config())
