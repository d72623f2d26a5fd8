"""The plugin's GPU path inside vLLM's engine, its kernels on host threads (`shim.py`): bit-equal to plain vLLM."""

import pytest
import torch
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts
from families import FAMILIES, write_checkpoint

from device import shim
from vllm_expert_prefetch.cache.device import DeviceCache

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not shim.load_setup().find_compiler(), reason="no C++20 compiler (g++) is installed"),
]
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 256}
MOE_FAMILIES = [name for name in FAMILIES if FAMILIES[name].num_experts]


@pytest.fixture(autouse=True)
def _on_the_shim(request):
    request.getfixturevalue("monkeypatch")


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
        worker.publisher.step_ended()
        return outputs, counters(llm), [cache.words() for cache in found]


@pytest.mark.parametrize("prefetch", ["off", "on"])
@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_a_family_is_bit_equal_on_the_device_path(monkeypatch, tmp_path, name, prefetch):
    model, family = write_checkpoint(name, tmp_path / name), FAMILIES[name]

    def generate(llm):
        return [greedy(llm, family.prompts, 12), greedy(llm, family.prompts[:1], 12)]

    with open_engine(model, None, **OPTIONS) as llm:
        expected = generate(llm)
    config = {"cache_fraction": 0.5, "prefetch": prefetch}
    outputs, found, words = served(monkeypatch, model, config, generate, **OPTIONS)
    assert outputs == expected
    assert all(min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0 for layer in words)
    assert (found["transfer_bytes_total/prefetch"] > 0) == (prefetch == "on")
