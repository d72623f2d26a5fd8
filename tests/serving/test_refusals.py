"""What is refused, entry by entry: each applies where it should. tests/test_features.py: and is documented."""

from types import SimpleNamespace

import pytest
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.native import library
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.refusals import (
    LAYER_REFUSALS,
    REFUSALS,
    check_kernel,
    check_layer_refusals,
    check_libraries,
    check_refusals,
)


def parallel(**given):
    names = ("enable_expert_parallel", "enable_eplb", "enable_elastic_ep", "enable_dbo")
    sizes = ("data", "pipeline", "prefill_context", "decode_context")
    served = {name: False for name in names} | {"ubatch_size": 0} | {f"{name}_parallel_size": 1 for name in sizes}
    return SimpleNamespace(**(served | given))


def served(**given):
    """A configuration of vLLM, as far as refusals look, that is served."""
    model = SimpleNamespace(get_num_experts=lambda: 8, enable_sleep_mode=False, enforce_eager=False)
    offload = SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0), offload_backend="auto"
    )
    parts = {
        "model_config": model,
        "parallel_config": parallel(),
        "lora_config": None,
        "weight_transfer_config": None,
        "cache_config": SimpleNamespace(kv_cache_memory_bytes=None),
        "load_config": SimpleNamespace(load_format="auto"),
        "speculative_config": None,
        "offload_config": offload,
    }
    return SimpleNamespace(**(parts | given))


def offloaded(**given):
    plain = {"cpu_offload_gb": 0, "offload_group_size": 0, "offload_backend": "auto"} | given
    return SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=plain["cpu_offload_gb"]),
        prefetch=SimpleNamespace(offload_group_size=plain["offload_group_size"]),
        offload_backend=plain["offload_backend"],
    )


def model(**given):
    return SimpleNamespace(**({"get_num_experts": lambda: 8, "enable_sleep_mode": False} | given))


DATA_PARALLELISM = (
    "data parallelism, for which vLLM divides the experts among its engines and gathers their tokens within the "
    "kernel's call, past the cache"
)
CASES = {
    "a dense model": [{"model_config": model(get_num_experts=lambda: 0)}],
    "accelerators other than NVIDIA GPUs and the CPU platform": ["rocm"],
    "expert load balancing (EPLB) and redundant experts, which move experts between ranks while they serve": [
        {"parallel_config": parallel(enable_eplb=True)}
    ],
    "elastic expert parallelism": [{"parallel_config": parallel(enable_elastic_ep=True)}],
    "dual-batch overlap": [{"parallel_config": parallel(enable_dbo=True)}],
    "micro-batching": [{"parallel_config": parallel(ubatch_size=2)}],
    DATA_PARALLELISM: [{"parallel_config": parallel(data_parallel_size=2)}],
    "context parallelism in prefill": [{"parallel_config": parallel(prefill_context_parallel_size=2)}],
    "context parallelism in decode": [{"parallel_config": parallel(decode_context_parallel_size=2)}],
    "LoRA on routed experts": [
        {"lora_config": SimpleNamespace(target_modules=["q_proj", "experts"])},
        {"lora_config": SimpleNamespace(target_modules=["model.layers.0.mlp.experts.0.up_proj"])},
        {"lora_config": SimpleNamespace(target_modules=None, enable_mixed_moe_lora_format=True)},
        {"lora_config": SimpleNamespace(target_modules=None, enable_moe_shared_loras=True)},
    ],
    "sleep mode": [{"model_config": model(enable_sleep_mode=True)}],
    "weight transfer into a running engine": [{"weight_transfer_config": object()}],
    "weights that are not loaded and post-processed by vLLM's usual loader": [
        {"load_config": SimpleNamespace(load_format=name)} for name in ("ipc_cache", "tensorizer", "modelexpress")
    ],
    "vLLM's own weight offloading": [
        {"offload_config": offloaded(cpu_offload_gb=1)},
        {"offload_config": offloaded(offload_group_size=2)},
        {"offload_config": offloaded(offload_backend="uva")},
    ],
    "speculative execution": ["gpu", {"execution": "speculative", "artifact": "folder"}],
    "an artifact in a pipeline: it is known by the gates of the whole model, of which a stage has a part": [
        "cpu",
        {"artifact": "folder"},
        {"parallel_config": parallel(pipeline_parallel_size=2)},
    ],
    "a number of tokens for the KV cache on the CPU platform": ["cpu", {"kv_cache_tokens": 1000}],
    "a number of tokens for a KV cache whose bytes are given": [
        "gpu",
        {"kv_cache_tokens": 1000},
        {"cache_config": SimpleNamespace(kv_cache_memory_bytes=1)},
    ],
    "an emulated link on a GPU": ["gpu", {"emulated_link_gbps": 5}],
    "a host store that is not page-locked on a GPU, whose kernels read it": ["gpu", {"pin_memory": "off"}],
    "a recording of routing inside CUDA graphs": ["gpu", {"trace": "folder"}],
}
"""What is refused -> what of vLLM's configuration asks for it; or the platform, keys of the plugin, and both."""


def platform(monkeypatch, name):
    monkeypatch.setattr(compat, "on_cpu_platform", lambda: name == "cpu")
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: name == "gpu")


@pytest.mark.parametrize("name", ["auto", "safetensors", "dummy", "runai_streamer", "sharded_state", "unheard-of"])
def test_loaders_that_go_vllms_usual_way_are_served(monkeypatch, name):
    platform(monkeypatch, "cpu")
    check_refusals(served(load_config=SimpleNamespace(load_format=name)), ExpertPrefetchConfig())


def test_every_refusal_has_a_case_and_every_case_a_refusal():
    assert CASES.keys() == {refusal.what for refusal in REFUSALS}


@pytest.mark.parametrize("what", CASES)
def test_it_is_refused_with_its_flag_and_remedy_and_nothing_else_is(monkeypatch, what):
    first, *keys = CASES[what]
    on = first if isinstance(first, str) else "cpu"
    cases = keys[1:] or [{}] if isinstance(first, str) else CASES[what]
    config = ExpertPrefetchConfig(**(keys[0] if isinstance(first, str) and keys else {}))
    refusal = next(refusal for refusal in REFUSALS if refusal.what == what)
    for given in cases:
        platform(monkeypatch, on)
        with pytest.raises(ConfigError) as refused:
            check_refusals(served(**given), config)
        assert all(text in str(refused.value) for text in (what, refusal.flag, refusal.remedy))
    platform(monkeypatch, "cpu")
    check_refusals(served(), ExpertPrefetchConfig())


@pytest.mark.parametrize("refusal", [one for one in REFUSALS if one.platform], ids=lambda one: one.flag)
def test_what_one_platform_refuses_the_other_serves(monkeypatch, refusal):
    on, keys, *given = CASES[refusal.what]
    assert on == refusal.platform
    platform(monkeypatch, "cpu" if on == "gpu" else "gpu")
    check_refusals(served(**(given[0] if given else {})), ExpertPrefetchConfig(**keys))


@pytest.mark.parametrize("targets", [None, ["q_proj", "shared_experts", "model.layers.0.mlp.shared_experts.up_proj"]])
def test_adapters_of_other_layers_than_routed_experts_are_served(monkeypatch, targets):
    platform(monkeypatch, "cpu")
    check_refusals(served(lora_config=SimpleNamespace(target_modules=targets)), ExpertPrefetchConfig())


def test_routing_is_recorded_in_eager_steps_of_a_gpu(monkeypatch):
    platform(monkeypatch, "gpu")
    check_refusals(served(model_config=model(enforce_eager=True)), ExpertPrefetchConfig(trace="folder"))


class Method(UnquantizedFusedMoEMethod):
    def __init__(self, backend="TRITON", monolithic=False):
        self.unquantized_backend = SimpleNamespace(name=backend)
        self._monolithic = monolithic

    @property
    def is_monolithic(self):
        return self._monolithic


class MarlinExperts:
    """By its name one of those that are served."""


class HummingIndexedExperts:
    """By its name one of those that are not."""


def quantised(kernel):
    """A quantisation method of vLLM that has built `kernel`."""
    return SimpleNamespace(is_monolithic=False, moe_kernel=kernel and SimpleNamespace(fused_experts=kernel))


@pytest.mark.parametrize(
    ("method", "number"),
    [
        (Method(monolithic=True), 0),
        (SimpleNamespace(is_monolithic=True), 0),
        (Method("FLASHINFER_CUTLASS"), 1),
        (Method("BATCHED_TRITON"), 1),
    ],
)
def test_a_layer_is_refused_by_its_kernel(method, number):
    with pytest.raises(ConfigError) as refused:
        check_layer_refusals("layer.7", method)
    refusal = LAYER_REFUSALS[number]
    assert all(text in str(refused.value) for text in (refusal.what, refusal.flag, refusal.remedy, "layer.7"))


@pytest.mark.parametrize("backend", ["TRITON", "CPU"])
def test_a_layer_with_rows_of_its_own_is_served(backend):
    check_layer_refusals("layer.7", Method(backend))


def test_every_layer_refusal_has_a_case():
    assert len(LAYER_REFUSALS) == 2


@pytest.mark.parametrize("kernel", [HummingIndexedExperts(), None])
def test_quantised_experts_are_refused_by_the_kernel_that_was_built(kernel):
    with pytest.raises(
        ConfigError, match=r"SimpleNamespace with the kernel .* \(layer layer\.7\).*--moe-backend marlin"
    ):
        check_kernel("layer.7", quantised(kernel))


def test_quantised_experts_with_a_kernel_that_is_known_are_served():
    check_layer_refusals("layer.7", quantised(MarlinExperts()))
    check_kernel("layer.7", quantised(MarlinExperts()))


@pytest.mark.parametrize(("on_gpu", "missing"), [(False, "host"), (True, "host"), (True, "cuda")])
def test_a_library_that_was_not_built_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, on_gpu, missing):
    for part in {"host", "cuda"} - {missing}:
        (tmp_path / f"libvep_{part}.so").touch()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=f"expert_prefetch: not built: libvep_{missing}.so needs"):
        check_libraries(on_gpu)
    (tmp_path / f"libvep_{missing}.so").touch()
    check_libraries(on_gpu)


def test_the_cpu_platform_needs_no_cuda_library(monkeypatch, tmp_path):
    (tmp_path / "libvep_host.so").touch()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    check_libraries(on_gpu=False)
