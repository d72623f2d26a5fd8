"""Every configuration key changes something: for each, two values, and what is then seen to differ."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from toy_moe import LAYERS, TOP_K, make_gates

from vllm_expert_prefetch.cache.base import tables_of
from vllm_expert_prefetch.cache.create import create_shared_rows
from vllm_expert_prefetch.cache.host import HostCaches
from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead.create import choose_predictors, create_look_ahead, depth_of, why_not
from vllm_expert_prefetch.memory import host_memory
from vllm_expert_prefetch.memory import shared_store as shared_module
from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.metrics.counters import read_counters
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.planning.sizing import LayerShape, areas_asked, size_cache
from vllm_expert_prefetch.prediction import ArtifactError
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.serving import compat, steps, worker
from vllm_expert_prefetch.serving.draft_worker import worker_of_draft
from vllm_expert_prefetch.serving.recording import create_switch
from vllm_expert_prefetch.serving.scheduling import bound_of
from vllm_expert_prefetch.serving.sizes import CacheSizes
from vllm_expert_prefetch.serving.speculation import describe_execution
from vllm_expert_prefetch.serving.worker import Worker
from vllm_expert_prefetch.tracing import switch
from vllm_expert_prefetch.tracing.folder import TraceFolder
from vllm_expert_prefetch.tracing.profile import Profile, read_profile, write_profile

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))


class VllmConfig:
    speculative_config = None


SHAPES = [LayerShape(8, 2, (4096, 4096))] * 4


def made_worker(monkeypatch, config):
    """A worker with one layer of eight experts, half of them with a slot, and its cache."""
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    made = Worker(SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=512)), config)
    layer = SimpleNamespace(accelerator=torch.device("cpu"), number=0, top_k=TOP_K, local_num_experts=8, share=None)
    layer.layer_name, layer.look_ahead, layer.quant_method = "model.layers.0.mlp.experts", None, None
    made._layers.append(lambda: layer)
    made.sizes.slots = [4]
    store = HostStore({"w13": torch.zeros(8, 3000)}, made.host_memory, take_shared=made.shared_memory_of(layer))
    layer.cache = made.create_cache(layer, store, 4)
    return made


def published(monkeypatch, tmp_path, config):
    """What the worker publishes when it starts, and the ports it serves counters on."""
    made = made_worker(monkeypatch, config)
    ports = []
    monkeypatch.setattr(worker, "serve_counters", lambda counters, port: ports.append(port))
    monkeypatch.setattr(compat, "local_rank", lambda: 0)
    labels = {"model_name": "m", "engine": "0", "rank": "0"}
    monkeypatch.setattr(worker, "place_of", lambda _: (tmp_path / f"{id(made)}.counters", labels))
    publisher = made._publish(None, 0.0)
    return publisher.counters, ports


def slots(monkeypatch, tmp_path, config):
    return size_cache(config, SHAPES, 4096)[0]


def kv_cache(monkeypatch, tmp_path, config):
    monkeypatch.setattr(compat, "measures_memory", lambda: True)
    model, cache = SimpleNamespace(max_model_len=100), SimpleNamespace(kv_cache_memory_bytes=None)
    sizes = CacheSizes(SimpleNamespace(cache_config=cache, model_config=model), config)
    rows = torch.empty(8, 4096, dtype=torch.uint8)
    layer = SimpleNamespace(accelerator=rows.device, local_num_experts=8, top_k=2, unprocessed_row_bytes=())
    sizes.decide([layer] * 4, layer, {"w": rows})
    return sizes.grow(300_000, 0, 100_000, 10_000), sizes.slots


def policy(monkeypatch, tmp_path, config):
    return list(POLICIES)[made_worker(monkeypatch, config).caches.layers[0].words().policy]


def execution(monkeypatch, tmp_path, config):
    allowed = SimpleNamespace(speculated_layers=frozenset({1}))
    return describe_execution(config, allowed, LAYERS, "on")


def caches_of(config):
    caches = HostCaches(host_library(), LAYERS, None)
    for number in range(LAYERS):
        store = HostStore({"w13": torch.zeros(8, 16)}, HostMemoryOptions())
        caches.add(
            number, store, create_shared_rows(store.views, 4, 1, torch.device("cpu")).row_space(0), 4, TOP_K, "lru"
        )
    return caches


def prefetch(monkeypatch, tmp_path, config):
    return why_not(config, LAYERS, caches_of(config), breaks_graphs=False)


def predictor(monkeypatch, tmp_path, config):
    return choose_predictors(config, make_gates(), 1)[0][0].name


def over_fetch(monkeypatch, tmp_path, config):
    look_ahead = create_look_ahead(config, make_gates(), caches_of(config), 1e9, torch.device("cpu"))
    return look_ahead._num_guesses(1, 1, False)


def distance(monkeypatch, tmp_path, config):
    return depth_of(config, LAYERS, False)


def areas(monkeypatch, tmp_path, config):
    return areas_asked(config, on_gpu=True), size_cache(config, SHAPES, 4096, areas=areas_asked(config, on_gpu=True))


class Scheduler:
    max_num_scheduled_tokens = 512

    def __init__(self, config):
        self.vllm_config = VllmConfig()
        self.vllm_config.additional_config = {"expert_prefetch": config}


def decode_delay(monkeypatch, tmp_path, config):
    return bound_of(Scheduler({"max_decode_delay_ms": config.max_decode_delay_ms})) is None


def artifact(monkeypatch, tmp_path, config):
    try:
        return choose_predictors(config, make_gates(), 1)[1]
    except ArtifactError as error:
        return str(error)


def pinned(monkeypatch, tmp_path, config):
    locked = []
    monkeypatch.setattr(host_memory, "_lock", lambda memory, size: locked.append(size))
    return made_worker(monkeypatch, config)._is_pinned(), bool(locked)


def numa_node(monkeypatch, tmp_path, config):
    bound = []
    monkeypatch.setattr(host_memory, "_place_on_node", lambda address, size, node, mode: bound.append(node))
    made_worker(monkeypatch, config)
    return bound


def huge_pages(monkeypatch, tmp_path, config):
    advised = []
    monkeypatch.setattr(host_memory, "_advise_huge_pages", lambda *_: advised.append(True))
    HostMemory(4096, made_worker(monkeypatch, config).host_memory)
    return bool(advised)


def shared_store(monkeypatch, tmp_path, config):
    """Whether a second worker finds the records of the first, and what it says of itself."""
    monkeypatch.setattr(shared_module, "_PLACE", tmp_path)
    monkeypatch.setattr(worker, "checkpoint_of", lambda _: {"model": "m"})
    monkeypatch.setattr(worker, "part_of_rank", lambda _: "rank0of1")
    workers = [made_worker(monkeypatch, config) for _ in range(2)]
    found = [made._shared_store and made._shared_store.num_found for made in workers]
    counters = published(monkeypatch, tmp_path, config)[0]
    return found, read_counters(counters.path).info["store"], workers[1].describe()[0]


def test_workers_that_name_the_same_store_share_it(monkeypatch, tmp_path):
    found, label, line = shared_store(monkeypatch, tmp_path, ExpertPrefetchConfig(shared_store="name"))
    assert (found, label) == ([0, 1], "shared")
    assert line.endswith("pageable, in the shared store name: 1 layers found there, 0 added")
    found, label, line = shared_store(monkeypatch, tmp_path, ExpertPrefetchConfig())
    assert (found, label) == ([None, None], "private")
    assert line.endswith("pageable")


def link(monkeypatch, tmp_path, config):
    made = made_worker(monkeypatch, config)
    return made.caches.link, str(made._link())


def self_check(monkeypatch, tmp_path, config):
    """What is proved when the worker starts, and what is said of it."""
    made, proved = made_worker(monkeypatch, config), []
    monkeypatch.setattr(worker, "verify_rows", lambda *_: None)
    monkeypatch.setattr(worker, "prove", lambda layers, renew: proved.extend(layers))
    monkeypatch.setattr(worker, "create_look_ahead_of", lambda *_: (None, "off"))
    monkeypatch.setattr(worker, "measure_prompt_step", lambda *_: None)
    monkeypatch.setattr(made, "_publish", lambda *_: None)
    monkeypatch.setattr(worker, "create_switch", lambda *_: None)
    monkeypatch.setattr(made.layers[0], "expert_tensors", {}, raising=False)
    made.start(torch.nn.Module())
    return len(proved), made.describe()[2]


def planned(monkeypatch, tmp_path, config):
    return published(monkeypatch, tmp_path, config)[0].get("planned_hit_ratio")


def per_layer(monkeypatch, tmp_path, config):
    return published(monkeypatch, tmp_path, config)[0].layers


def port(monkeypatch, tmp_path, config):
    return published(monkeypatch, tmp_path, config)[1]


def recording(monkeypatch, tmp_path, config):
    """What is recorded when the worker has started, and the files that it keeps."""
    monkeypatch.setattr(compat, "captures_graphs", lambda _: False)
    monkeypatch.chdir(tmp_path)
    made = made_worker(monkeypatch, config)
    path = tmp_path / f"{id(made)}.counters"
    made.publisher = SimpleNamespace(counters=SimpleNamespace(path=path, get=lambda series: 0.0))
    parallel = SimpleNamespace(rank=0, tensor_parallel_size=1, enable_expert_parallel=False)
    served = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(model="m"))
    limits = []
    monkeypatch.setattr(switch, "TraceFolder", lambda path, limit: limits.append(limit) or TraceFolder(path, limit))
    status = create_switch(made, served).answer({"do": "status"})
    note = made.layers[0].recorder.note if status["recording"] is not None else lambda *_: None
    note(0, torch.zeros(1, 2, dtype=torch.int64), 1, torch.ones(1, 2))
    kept = made.layers[0].recorder._weights_of_step[0] if status["recording"] is not None else []
    return status["recording"] is not None, limits, len(kept)


def started(monkeypatch, made):
    """The same worker, which has started to serve."""
    for name in ("verify_rows", "prove", "create_switch", "measure_prompt_step"):
        monkeypatch.setattr(worker, name, lambda *_: None)
    monkeypatch.setattr(worker, "create_look_ahead_of", lambda *_: (None, "off"))
    monkeypatch.setattr(made, "_publish", lambda *_: None)
    monkeypatch.setattr(made.layers[0], "expert_tensors", {}, raising=False)
    made.start(torch.nn.Module())
    return made


def ghosts(monkeypatch, tmp_path, config):
    """The slots of the ghost caches of a worker that has started, whose cache has four."""
    mirror = started(monkeypatch, made_worker(monkeypatch, config)).caches.ghost_mirror
    return None if mirror is None else mirror[0, :, 1].tolist()


def test_ghost_caches_have_slots_in_proportion(monkeypatch, tmp_path):
    assert ghosts(monkeypatch, tmp_path, ExpertPrefetchConfig(ghost_caches=True)) == [6, 8]
    assert ghosts(monkeypatch, tmp_path, ExpertPrefetchConfig()) is None


def of_one_rank(made, **parallel):
    """Give the worker vLLM's settings that say which model and rank are its."""
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    parallel = {"rank": 0, "enable_expert_parallel": False, **sizes} | parallel
    made._vllm_config.model_config = SimpleNamespace(model="folder/m")
    made._vllm_config.parallel_config = SimpleNamespace(**parallel)
    return made


def profile(monkeypatch, tmp_path, config):
    """What is resident when the worker has started."""
    write_profile(tmp_path / "p.json", Profile("folder/m", {"0": [0, 9, 0, 7, 0, 8, 6, 0]}))
    monkeypatch.chdir(tmp_path)
    made = made_worker(monkeypatch, config)
    of_one_rank(made)
    return {expert for expert in tables_of(started(monkeypatch, made).caches.layers[0].state)[1][4] if expert >= 0}


def test_the_experts_that_a_profile_names_are_in_the_slots(monkeypatch, tmp_path):
    assert profile(monkeypatch, tmp_path, ExpertPrefetchConfig(profile="p.json")) == {1, 3, 5, 6}


def test_a_rank_whose_experts_are_others_has_a_file_of_its_own(monkeypatch, tmp_path):
    parts = {"p.json": [1, 0, 0, 0, 2, 3, 0, 4], "p.json.rank2": [0, 9, 0, 7, 0, 8, 6, 0]}
    for name, uses in parts.items():
        write_profile(tmp_path / name, Profile("m", {"0": uses}))
    warm, names = {}, {}
    for rank, is_divided in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        config = ExpertPrefetchConfig(profile=str(tmp_path / "p.json"), write_profile=str(tmp_path / "p.json"))
        made = of_one_rank(
            made_worker(monkeypatch, config), rank=rank, tensor_parallel_size=2, enable_expert_parallel=is_divided
        )
        served = started(monkeypatch, made).caches.layers[0]
        warm[rank, is_divided] = {expert for expert in tables_of(served.state)[1][4] if expert >= 0}
        names[rank, is_divided] = made.profile_writer and made.profile_writer._path.name
    first, third = {0, 4, 5, 7}, {1, 3, 5, 6}
    assert [*warm.values()] == [first, first, third, third, third, first]
    assert [*names.values()] == ["p.json", None, "p.json.rank2", None, "p.json.rank2", "p.json.rank3"]


def written(monkeypatch, tmp_path, config):
    """The experts of the profile that is there when a worker has served a step and ended; None without one."""
    monkeypatch.chdir(tmp_path)
    made = started(monkeypatch, of_one_rank(made_worker(monkeypatch, config)))
    made.caches.layers[0].serve(torch.tensor([[5, 2], [7, 5]]), 2)
    vllms = SimpleNamespace(shutdown=lambda: None)
    monkeypatch.setattr(steps, "find_worker", lambda _: made)
    steps.watch_end(vllms, None)
    vllms.shutdown()
    return [*tmp_path.iterdir()] and read_profile(tmp_path / "p.json", "m").hottest("0", 8, 3)


def test_the_profile_that_is_written_names_the_experts_that_have_a_slot(monkeypatch, tmp_path):
    assert written(monkeypatch, tmp_path, ExpertPrefetchConfig(write_profile="p.json")) == [5, 2, 7]


def draft_slots(monkeypatch, tmp_path, config):
    """Of a layer of eight experts of a draft; None where it is left to vLLM."""
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    target, draft = object(), object()
    given = SimpleNamespace(
        model_config=draft, additional_config={"expert_prefetch": {"draft_experts": config.draft_experts}}
    )
    given.speculative_config = SimpleNamespace(draft_model_config=draft, target_model_config=target)
    made = worker_of_draft(given, draft)
    layer = SimpleNamespace(accelerator=torch.device("cpu"), number=0, top_k=TOP_K, local_num_experts=8)
    layer.layer_name, layer.unprocessed_row_bytes = "draft.layers.0.mlp.experts", (4000,)
    if made is not None:
        made._layers.append(lambda: layer)
    return made and made.num_slots_of(layer, {"w13": torch.zeros(8, 1000)})


def test_a_draft_gets_the_share_of_slots_that_is_asked_for(monkeypatch, tmp_path):
    assert draft_slots(monkeypatch, tmp_path, ExpertPrefetchConfig(draft_experts=0.75)) == 6
    assert draft_slots(monkeypatch, tmp_path, ExpertPrefetchConfig()) is None
    with pytest.raises(ConfigError, match=r"draft_experts = 0\.2 gives the draft's .* 1 slots, and one token needs 2"):
        draft_slots(monkeypatch, tmp_path, ExpertPrefetchConfig(draft_experts=0.2))


LINKED = {"emulated_link_gbps": 5}
TABLE = {
    "cache_gb": (slots, {"cache_gb": 0.00013}, {"cache_gb": 0.0002}),
    "cache_fraction": (slots, {"cache_fraction": 0.25}, {"cache_fraction": 0.75}),
    "slots_per_layer": (slots, {"slots_per_layer": 3}, {"slots_per_layer": 5}),
    "kv_cache_tokens": (kv_cache, {}, {"kv_cache_tokens": 300}),
    "policy": (policy, {"policy": "lru"}, {"policy": "ewma"}),
    "execution": (execution, {}, {"execution": "speculative", "artifact": "folder"}),
    "prefetch": (prefetch, {"prefetch": "off"}, {"prefetch": "on"}),
    "predictor": (predictor, {"predictor": "router"}, {"predictor": "previous"}),
    "over_fetch": (over_fetch, {"over_fetch": 0}, {"over_fetch": 3}),
    "lookahead_layers": (distance, {"lookahead_layers": 1}, {"lookahead_layers": 2}),
    "areas": (areas, {"areas": 1, "cache_gb": 0.0002}, {"areas": 2, "cache_gb": 0.0002}),
    "max_decode_delay_ms": (decode_delay, {}, {"max_decode_delay_ms": 50}),
    "draft_experts": (draft_slots, {}, {"draft_experts": 0.5}),
    "artifact": (artifact, {}, {"artifact": "/nowhere"}),
    "pin_memory": (pinned, {"pin_memory": "off"}, {"pin_memory": "on"}),
    "numa_node": (numa_node, {}, {"numa_node": 0}),
    "huge_pages": (huge_pages, {}, {"huge_pages": "on"}),
    "shared_store": (shared_store, {"shared_store": "off"}, {"shared_store": "name"}),
    "emulated_link_gbps": (link, {"emulated_link_gbps": 5}, {"emulated_link_gbps": 7}),
    "emulated_link_latency_us": (link, LINKED, LINKED | {"emulated_link_latency_us": 9}),
    "self_check": (self_check, {}, {"self_check": "off"}),
    "planned_hit_rate": (planned, {}, {"planned_hit_rate": 0.9}),
    "metrics_per_layer": (per_layer, {}, {"metrics_per_layer": True}),
    "trace": (recording, {}, {"trace": "traces"}),
    "trace_mb": (recording, {"trace": "traces"}, {"trace": "traces", "trace_mb": 7}),
    "trace_weights": (recording, {"trace": "traces"}, {"trace": "traces", "trace_weights": True}),
    "profile": (profile, {}, {"profile": "p.json"}),
    "write_profile": (written, {}, {"write_profile": "p.json"}),
    "ghost_caches": (ghosts, {}, {"ghost_caches": True}),
    "metrics_port": (port, {}, {"metrics_port": 9400}),
}
"""Key -> what is looked at, and two settings that differ in the key alone."""


def test_every_key_stands_here():
    assert TABLE.keys() == {entry.name for entry in fields(ExpertPrefetchConfig)}


@pytest.mark.parametrize("key", TABLE)
def test_two_values_are_seen_to_differ(monkeypatch, tmp_path, key):
    look, *settings = TABLE[key]
    one, other = (look(monkeypatch, tmp_path, ExpertPrefetchConfig(**setting)) for setting in settings)
    assert one != other


def test_auto_sizes_by_half():
    assert size_cache(ExpertPrefetchConfig(), SHAPES, 4096) == [4] * 4
    with pytest.raises(ConfigError, match="slots_per_layer = 1 gives 1 slots per layer, and one token needs 2"):
        size_cache(ExpertPrefetchConfig(slots_per_layer=1), SHAPES, 4096)
