"""The plugin's GPU path inside vLLM's engine, its kernels on host threads (`shim.py`): bit-equal to plain vLLM."""

import gc
import weakref

import pytest
import torch
from engines import TINY_MODEL, caches, counters, draft_layers, greedy, layers, open_engine, prompts
from families import FAMILIES, OTHER_FAMILIES, write_checkpoint
from test_families import MORE_OPTIONS, PROMPTS
from test_growth import KV_BYTES, Measured

from device import shim
from vllm_expert_prefetch.cache.device import DeviceCache
from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.lookahead import create
from vllm_expert_prefetch.metrics import publish
from vllm_expert_prefetch.planning.replay import Setting
from vllm_expert_prefetch.planning.simulate import as_recorded, simulate_all
from vllm_expert_prefetch.prediction import Prediction, Predictor
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.tracing.trace import read_trace

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not shim.load_setup().find_compiler(), reason="no C++20 compiler (g++) is installed"),
]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 256}
MOE_FAMILIES = [name for name in FAMILIES if FAMILIES[name].num_experts]


def served(monkeypatch, model, config, generate, **options):
    """What `generate` gives through the device path, the counters, and the words of its layers."""
    shim.install(monkeypatch)
    with open_engine(model, config, **options) as llm:
        shim.library().shim_launches()
        outputs = generate(llm)
        found = caches(llm)
        assert found
        assert all(isinstance(cache, DeviceCache) for cache in found)
        worker = layers(llm)[0].worker
        assert worker.caches.num_errors() == 0
        worker.publisher.publish()
        return outputs, counters(llm), [cache.words() for cache in found]


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_a_family_is_bit_equal_on_the_device_path(monkeypatch, tmp_path, name):
    model, family = write_checkpoint(name, tmp_path / name), FAMILIES[name]

    def generate(llm):
        return [greedy(llm, family.prompts, 12), greedy(llm, family.prompts[:1], 12)]

    with open_engine(model, None, **OPTIONS) as llm:
        expected = generate(llm)
    outputs, found, words = served(monkeypatch, model, {"cache_fraction": 0.5, "prefetch": "on"}, generate, **OPTIONS)
    assert outputs == expected
    assert all(min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0 for layer in words)
    assert found["transfer_bytes_total/prefetch"] > 0


@pytest.mark.parametrize("name", [name for name in OTHER_FAMILIES if name != "longcat"])
def test_another_family_is_bit_equal_on_the_device_path(monkeypatch, tmp_path, name, torchvision):
    model, options = write_checkpoint(name, tmp_path / name), OPTIONS | MORE_OPTIONS.get(name, {})
    with open_engine(model, None, **options) as llm:
        expected = greedy(llm, PROMPTS, 6)
    config = {"cache_fraction": 0.5, "prefetch": "on"}
    outputs, found, words = served(monkeypatch, model, config, lambda llm: greedy(llm, PROMPTS, 6), **options)
    assert outputs == expected
    assert min(sum(layer.hits for layer in words), sum(layer.misses for layer in words)) > 0
    assert found["transfer_bytes_total/prefetch"] > 0


@pytest.mark.proves("recording of routing (`trace`)", "shim")
def test_a_recording_counts_what_the_device_path_counted(monkeypatch, tmp_path):
    config = {"cache_fraction": 0.5, "prefetch": "off", "trace": str(tmp_path), "ghost_caches": True}
    _, counted, words = served(monkeypatch, TINY_MODEL, config, lambda llm: greedy(llm, prompts(3), 8))
    trace = read_trace(tmp_path)
    assert len(trace) == 8
    hits, misses = (sum(getattr(layer, name) for layer in words) for name in ("hits", "misses"))
    found = as_recorded(trace)
    assert (found["hits"], found["misses"]) == ((hits, hits), (misses, misses))
    for scale, slots in (("1.5", 12), ("2", 16)):
        simulated = simulate_all(trace, Setting((slots,) * 8, "ewma"))
        assert counted[f"ghost_hits_total/{scale}"] == simulated.hits > hits
        assert counted[f"ghost_lookups_total/{scale}"] == simulated.lookups == hits + misses


@pytest.mark.proves("speculative decoding: a draft's experts in a cache of their own (`draft_experts`)", "shim")
def test_a_draft_with_a_cache_of_its_own_is_right_as_often(monkeypatch):
    """It is the model itself, so that a wrong expert of the draft's costs an accepted token."""
    draft = {"model": str(TINY_MODEL), "method": "draft_model", "num_speculative_tokens": 2}
    options = {"speculative_config": draft, "max_num_seqs": 2, "disable_log_stats": False}

    def generate(llm):
        outputs = greedy(llm, prompts(4), 24)
        found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        return outputs, [found[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")]

    def generate_and_look(llm):
        found = [layer.cache for layer in draft_layers(llm)]
        assert all(isinstance(cache, DeviceCache) for cache in found)
        generated = generate(llm)
        return generated, [cache.words().misses for cache in found]

    with open_engine(TINY_MODEL, None, **options) as llm:
        expected = generate(llm)
    config = {"cache_fraction": 0.5, "draft_experts": 0.5}
    (outputs, misses), _, words = served(monkeypatch, TINY_MODEL, config, generate_and_look, **options)
    assert outputs == expected
    assert outputs[1][1] > 0
    assert min(*misses, *(layer.misses for layer in words)) > 0


@pytest.fixture(scope="module")
def expected():
    """Of the trained model: a batch, and a sequence alone."""
    with open_engine(TINY_MODEL, None) as llm:
        return generate(llm)


def generate(llm):
    return [greedy(llm, prompts(6), 24), greedy(llm, prompts(1), 48)]


@pytest.mark.proves("eager mode, a quarter to 95 % of the experts resident", "shim")
@pytest.mark.proves("looking ahead", "shim")
@pytest.mark.parametrize(
    "config", [{"prefetch": "off"}, {"prefetch": "auto", "policy": "lfru"}, {"slots_per_layer": 2}]
)
def test_the_trained_model_is_bit_equal_and_look_ahead_does_what_it_is_told(monkeypatch, expected, config):
    outputs, found, words = served(monkeypatch, TINY_MODEL, {"slots_per_layer": 8} | config, generate)
    assert outputs == expected
    assert min(sum(layer.hits for layer in words), sum(layer.misses for layer in words)) > 0
    looks_ahead = found["transfer_bytes_total/prefetch"] > 0
    assert looks_ahead == (config.get("prefetch") != "off")
    assert not looks_ahead or recall(found) > 0.6


def recall(found):
    return found["recall_found_total/top_k"] / found["recall_routed_total"]


class Garbage(Predictor):
    """Other experts in every step, some of them none at all."""

    name = "garbage"

    def predict(self, source, signals, count):
        ids = torch.randint(-1, 16, (len(signals.topk_ids), count))
        return Prediction(ids, torch.ones(ids.shape))


def test_guesses_that_are_garbage_change_no_token(monkeypatch, expected):
    def garbage(config, gates, depth):
        return [Garbage(len(gates), distance) for distance in range(1, depth + 1)], None

    monkeypatch.setattr(create, "choose_predictors", garbage)
    outputs, found, words = served(monkeypatch, TINY_MODEL, {"slots_per_layer": 4, "prefetch": "on"}, generate)
    assert outputs == expected
    assert found["transfer_bytes_total/prefetch"] > 0
    assert min(sum(layer.unused for layer in words), sum(layer.used for layer in words)) > 0
    assert recall(found) < 0.3


@pytest.mark.proves("CUDA graphs", "shim")
@pytest.mark.parametrize("kernel", ["gather_records", "plan_step"])
def test_a_kernel_that_a_graph_freezes_is_found_by_the_proof_at_start(monkeypatch, kernel):
    """Every replay would then have the rows, or the records, of the captured step."""
    shim.install(monkeypatch)
    launches = shim.Launches.__getattr__

    def freeze(self, name):
        launch = launches(self, name)
        is_frozen = name == kernel
        return lambda *given: None if is_frozen and shim.Graph.current is not None else launch(*given)

    monkeypatch.setattr(shim.Launches, "__getattr__", freeze)
    with (
        pytest.raises(TakeoverError, match=r"layers\.0.*in a replayed CUDA graph of 1 tokens, row \d+ of w13_weight"),
        open_engine(TINY_MODEL, {"slots_per_layer": 4}),
    ):
        pass


def test_an_engine_that_has_ended_leaves_nothing_to_the_offloader_that_vllm_keeps(monkeypatch):
    from vllm.model_executor.offloader.base import get_offloader, set_offloader

    install = compat.install_offloader
    shim.install(monkeypatch)
    monkeypatch.setattr(compat, "install_offloader", install)
    try:
        with open_engine(TINY_MODEL, {"cache_fraction": 0.5}) as llm:
            greedy(llm, prompts(1), 2)
            offloader = get_offloader()
            offloader.sync_prev_onload()
            held = [weakref.ref(layers(llm)[0].worker.caches), weakref.ref(layers(llm)[0].cache.store)]
            assert [joined() for joined in offloader.joined] == [held[0]()]
        del llm
        gc.collect()
        assert get_offloader() is offloader
        assert [reference() for reference in held] == [None, None]
        offloader.sync_prev_onload()
    finally:
        set_offloader(None)


def test_what_a_kernel_refuses_ends_the_engine(monkeypatch):
    shim.install(monkeypatch)
    monkeypatch.setattr(publish, "_PERIOD_SECONDS", 3600)  # its thread does not look
    with open_engine(TINY_MODEL, {"slots_per_layer": 4}) as llm:
        layer = layers(llm)[3]
        layer.cache.board[-1] += 2
        greedy(llm, prompts(1), 4)
        layer.worker.publisher.publish()
        with pytest.raises(RuntimeError, match="layer 3: 2 copies were refused"):
            greedy(llm, prompts(1), 4)


def test_a_model_without_attention_is_refused_where_padding_is_told_by_it(monkeypatch):
    shim.install(monkeypatch)
    monkeypatch.setattr(compat, "tells_padding", lambda vllm_config: False)
    with pytest.raises(ConfigError, match="no attention layer with a KV cache"), open_engine(TINY_MODEL, {}):
        pass


@pytest.mark.proves("a cache that grows into free memory", "shim")
def test_a_cache_that_grows_does_so_under_its_layers(monkeypatch, expected):
    """In pages, as on a GPU: vLLM's profile leaves room for six more slots of each layer."""
    measured = Measured(monkeypatch, records=7 * 6.5)
    config = {"prefetch": "on"}
    outputs, _, words = served(monkeypatch, TINY_MODEL, config, generate, kv_cache_memory_bytes=KV_BYTES)
    assert outputs == expected
    assert measured.slots == [2] * 8
    assert [layer.num_slots for layer in words] == [8] * 8
