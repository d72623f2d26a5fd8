"""LoRA adapters beside the cache: those of attention as in vLLM, those of routed experts refused by name."""

from types import SimpleNamespace

import pytest
from engines import TINY_MODEL, counters, greedy, layers, open_engine, prompts
from lora_adapters import RANK, write_adapter
from vllm.lora import model_manager
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_expert_prefetch.serving import adapters, compat
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.serving.sources import find_sources

LORA = {"enable_lora": True, "max_lora_rank": RANK}


def generate(llm, adapter):
    """Half of the prompts with the adapter and half without, in one batch; then one alone with it."""
    given, request = prompts(4), LoRARequest("attention", 1, str(adapter))
    return [greedy(llm, given, adapters=[request, None] * 2), greedy(llm, given[:1], adapters=[request])]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "attention")


@pytest.fixture(scope="module")
def stock(adapter):
    """Plain vLLM, told to choose the experts' kernel as without adapters, and to leave them alone.

    By itself it takes a Triton kernel, which its CPU build cannot run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedMoEConfig, "is_lora_enabled", property(lambda config: False, lambda config, value: None))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        with open_engine(TINY_MODEL, None, lora_target_modules=targets, **LORA) as llm:
            return [*generate(llm, adapter), greedy(llm, prompts(4))]


@pytest.mark.proves(
    "LoRA adapters of all layers but routed experts", says="proven, against plain vLLM told to choose its usual kernel"
)
@pytest.mark.engine
def test_adapters_of_attention_are_exact_and_those_of_experts_are_refused_by_name(stock, adapter, tmp_path):
    experts = write_adapter(tmp_path / "experts", ("self_attn.q_proj", "mlp.experts.3.up_proj"))
    config = {"cache_fraction": 0.5, "emulated_link_gbps": 0.5, "prefetch": "on"}
    with open_engine(TINY_MODEL, config, **LORA) as llm:
        assert generate(llm, adapter) == stock[:2]
        with pytest.raises(ValueError, match=r"LoRA adapter 'mine' .*layers\.0\.mlp\.experts\.3\.up_proj, 8 modules"):
            llm.llm_engine.add_lora(LoRARequest("mine", 2, str(experts)))
        assert [*generate(llm, adapter), greedy(llm, prompts(4))] == stock
        counted, served = counters(llm), layers(llm)
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        gates = [source.gate.weight for source in find_sources(model)]
    assert min(counted[f"lookups_total/{outcome}"] for outcome in ("hit", "miss")) > 0
    assert counted["predictions_total/used"] > 0
    assert {type(module) for name, module in model.named_modules() if name.endswith("mlp.experts")} == {MoERunner}
    assert type(model.get_submodule("model.layers.0.mlp.gate")).__name__.endswith("WithLoRA")
    assert [gate.shape for gate in gates] == [(16, 128)] * len(served), "the router inside the adapter's wrapper"
    assert stock[0][0].tokens != stock[2][0].tokens, "the adapter changes what is generated"


EXPERTS = "layers.0.mlp.experts"


class Model:
    """One MoE layer."""

    def __init__(self):
        self.experts = object()

    def get_submodule(self, name):
        assert name == EXPERTS
        return self.experts


def loaded(monkeypatch, load=lambda model: None):
    """A runner that has loaded a model and `load`ed LoRA with it, and which modules vLLM found to support LoRA."""
    monkeypatch.setattr(compat, "moe_runners_of", lambda model: {EXPERTS: model.experts})
    monkeypatch.setattr(model_manager, "get_supported_lora_modules", lambda model: ["q_proj", "experts"])
    found = []

    def load_lora_model(model):
        found.extend(model_manager.get_supported_lora_modules(model))
        load(model)
        return model

    manager = SimpleNamespace(
        _load_adapter=lambda request: SimpleNamespace(loras=dict.fromkeys(request.modules)),
        _adapter_manager=SimpleNamespace(supported_lora_modules=found),
    )
    runner = SimpleNamespace(load_lora_model=load_lora_model, lora_manager=manager)
    adapters.watch_adapters(runner)
    runner.load_lora_model(Model())
    return runner, found


def test_vllm_wraps_no_experts_and_reads_adapters_of_them(monkeypatch):
    seen = []
    _, supported = loaded(monkeypatch, lambda model: seen.extend(model_manager.get_supported_lora_modules(model)))
    assert seen == ["q_proj"]
    assert supported == ["q_proj", "experts"], "to refuse them by name"
    assert model_manager.get_supported_lora_modules(None) == ["q_proj", "experts"]


def test_experts_that_vllm_has_wrapped_all_the_same_are_an_error(monkeypatch):
    with pytest.raises(TakeoverError, match=r"wrapped layers\.0\.mlp\.experts for LoRA: drop --enable-lora"):
        loaded(monkeypatch, lambda model: setattr(model, "experts", object()))


@pytest.mark.parametrize("module", [EXPERTS, f"{EXPERTS}.base_layer", f"{EXPERTS}.3.up_proj"])
def test_an_adapter_of_experts_is_refused_however_it_is_laid_out(monkeypatch, module):
    runner, _ = loaded(monkeypatch)
    request = SimpleNamespace(modules=["layers.0.q_proj", module], lora_name="mine", lora_path="folder")
    with pytest.raises(ValueError, match=r"LoRA adapter 'mine' \(folder\) changes routed experts"):
        runner.lora_manager._load_adapter(request)


def test_an_adapter_of_what_is_beside_the_experts_is_loaded(monkeypatch):
    runner, _ = loaded(monkeypatch)
    modules = ["layers.0.q_proj", "layers.0.mlp.experts_norm", "layers.0.mlp.shared_experts.up_proj"]
    assert list(runner.lora_manager._load_adapter(SimpleNamespace(modules=modules)).loras) == modules


def test_the_experts_kernel_is_chosen_as_without_adapters():
    config = object.__new__(FusedMoEConfig)
    config.is_lora_enabled = True
    adapters.choose_kernel_as_without_adapters(("name", config))
    assert config.is_lora_enabled is False
