"""Gates and norms are found by structure, and a model that does not tell enough is refused with the reason."""

import types

import pytest
import torch
from engines import open_engine
from families import FAMILIES, write_checkpoint
from torch import nn

from vllm_expert_prefetch.prediction.defaults import DefaultSums
from vllm_expert_prefetch.serving.sources import NotFound, find_sources
from vllm_expert_prefetch.studies.recording import RecordingEngine

HIDDEN, EXPERTS = 8, 4


class RMSNorm(nn.Module):
    def __init__(self, size=HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.variance_epsilon = 1e-6


class GemmaRMSNorm(RMSNorm):
    pass


class Runner(nn.Module):
    def __init__(self, **router):
        super().__init__()
        self.routed_experts = nn.Module()
        self.router = types.SimpleNamespace(**{"global_num_experts": EXPERTS, "top_k": 2, **router})
        self.moe_config = types.SimpleNamespace(hidden_dim=HIDDEN, hidden_dim_unpadded=HIDDEN, in_dtype=torch.bfloat16)
        self.gate = None


class Block(nn.Module):
    def __init__(self, **router):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Runner(**router)


class Layer(nn.Module):
    def __init__(self, norms=("input_layernorm", "post_attention_layernorm"), norm=RMSNorm, **router):
        super().__init__()
        self.mlp = Block(**router)
        for name in norms:
            setattr(self, name, norm())


def model(*layers):
    return nn.Sequential(*layers)


def test_a_gate_beside_the_experts_and_the_norm_in_front_are_found():
    layers = [Layer(), Layer()]
    sources = find_sources(model(*layers))
    assert [source.gate.name for source in sources] == ["0.mlp.experts", "1.mlp.experts"]
    assert torch.equal(sources[1].gate.weight, layers[1].mlp.gate.weight)
    assert torch.equal(sources[1].gate.bias, layers[1].mlp.gate.bias)
    assert sources[1].norm is layers[1].post_attention_layernorm


def test_weights_that_the_platform_has_packed_are_read_off_the_answers():
    class Packed(nn.Module):
        """As vLLM's linear layers on the CPU platform: the weight itself is gone."""

        def __init__(self):
            super().__init__()
            self.input_size, self.output_size = HIDDEN, EXPERTS
            self.packed = torch.randn(EXPERTS, HIDDEN).bfloat16() * 0.02
            self.bias = nn.Parameter(torch.randn(EXPERTS).bfloat16())
            self.weight = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.packed, self.bias), None

    layers = [Layer(), Layer()]
    for layer in layers:
        layer.mlp.gate = Packed()
    gate = find_sources(model(*layers))[0].gate
    assert torch.equal(gate.weight, layers[0].mlp.gate.packed.float())
    assert torch.equal(gate.bias, layers[0].mlp.gate.bias.float())


def test_the_norm_in_front_of_the_feed_forward_block_wins_over_the_one_behind_attention():
    sandwich = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
    layers = [Layer(sandwich), Layer(sandwich)]
    assert find_sources(model(*layers))[0].norm is layers[0].pre_feedforward_layernorm


def test_gains_that_are_stored_as_an_offset_from_one_are_added_to_one():
    gate = find_sources(model(Layer(norm=GemmaRMSNorm), Layer(norm=GemmaRMSNorm)))[0].gate
    torch.testing.assert_close(gate.norm.gain, 1 + torch.linspace(0.5, 1.5, HIDDEN))


def test_a_layer_norm_keeps_its_shift():
    gate = find_sources(model(*(Layer(norm=lambda: nn.LayerNorm(HIDDEN)) for _ in range(2))))[0].gate
    assert gate.norm.centered
    assert gate.norm.shift.tolist() == [0.0] * HIDDEN


class NormingRouter(nn.Module):
    """As Gemma-4's: it norms the residual itself, and not as the norm in front of the experts does."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.proj = norm, nn.Linear(HIDDEN, EXPERTS, bias=False).bfloat16()
        self.scale = nn.Parameter(torch.linspace(2.0, 0.5, HIDDEN).bfloat16())

    def forward(self, residual):
        return self.proj(self.norm(residual) * self.scale)


def with_a_router_of_its_own(layer, norm=nn.RMSNorm):
    del layer.mlp.gate
    layer.mlp.router = NormingRouter(norm(HIDDEN, eps=1e-6).bfloat16())


def test_a_router_that_norms_the_residual_itself_is_read_as_a_gate_of_what_the_experts_read():
    layers = [Layer(), Layer()]
    for layer in layers:
        with_a_router_of_its_own(layer)
    gate = find_sources(model(*layers))[1].gate
    residual = 3 * torch.randn(5, HIDDEN)
    expected = layers[1].mlp.router(residual.bfloat16()).float()
    torch.testing.assert_close(gate.logits(gate.norm.apply(residual)), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_bias_that_the_router_of_the_cpu_platform_does_not_read_is_left_out(is_grouped):
    class CPURouter(types.SimpleNamespace):
        """vLLM's, by name."""

    layers = [Layer(), Layer()]
    for layer in layers:
        layer.mlp.experts.router = CPURouter(
            **vars(layer.mlp.experts.router),
            use_grouped_topk=is_grouped,
            num_expert_group=2,
            topk_group=1,
            e_score_correction_bias=torch.ones(EXPERTS),
        )
    bias = find_sources(model(*layers))[0].gate.routing.correction_bias
    assert (bias is not None) == is_grouped


def damaged(change):
    layers = [Layer(), Layer()]
    change(layers[1])
    return model(*layers)


def second_gate(layer):
    layer.mlp.other = nn.Linear(HIDDEN, EXPERTS)


def no_norm(layer):
    del layer.input_layernorm, layer.post_attention_layernorm


def unknown_norms(layer):
    no_norm(layer)
    layer.before, layer.between = RMSNorm(), RMSNorm()


def not_finite(layer):
    layer.mlp.gate.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: delattr(layer.mlp, "gate"), "no gate from 8 hidden values to 4 experts in 1.mlp"),
        (second_gate, "2 modules that could be the gate"),
        (no_norm, "no norm of size 8 around it"),
        (unknown_norms, "which of before, between in 1 feeds the experts is not known"),
        (not_finite, "not finite"),
        (lambda layer: with_a_router_of_its_own(layer, nn.LayerNorm), "what NormingRouter makes of its input"),
        (lambda layer: setattr(layer.mlp.experts, "routed_input_transform", nn.Identity()), "latent experts"),
        (lambda layer: setattr(layer.mlp.experts.router, "_hash_indices_table", torch.zeros(1)), "by token id"),
        (lambda layer: setattr(layer.mlp.experts.router, "scoring_func", "tanh"), "tanh"),
    ],
)
def test_a_model_that_does_not_tell_enough_is_refused_with_the_reason(change, message):
    with pytest.raises(NotFound, match=message):
        find_sources(damaged(change))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["qwen2-moe", "mixtral", "deepseek-v2", "deepseek-v3", "gpt-oss"])
def test_the_routing_of_every_family_is_understood(name, tmp_path):
    """What was found, applied to what the router read, must give vLLM's own experts and weights."""
    family = FAMILIES[name]
    with open_engine(write_checkpoint(name, tmp_path), None, skip_tokenizer_init=True, max_model_len=128) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        engine = RecordingEngine(llm, find_sources(worker.model_runner.get_model()), 90)
        gates, tokens = engine.gates, family.prompts[-1]["prompt_token_ids"]
        sums = DefaultSums(len(gates), family.num_experts, gates[0].weight.shape[1])
        signals = engine.record(tokens, sums)
        assert all(
            torch.equal(own.hidden, again.hidden) for own, again in zip(signals, engine.record(tokens), strict=True)
        )
    assert [gate.name for gate in gates] == family.moe_layers
    assert sums.counts.sum(-1).tolist() == [len(tokens) * family.top_k] * len(gates)
    for gate, own in zip(gates, signals, strict=True):
        assert own.hidden.shape == (len(tokens), gate.weight.shape[1])
        guess = gate.routing.choose(gate.logits(own.hidden), family.top_k)
        true_ids, order = own.topk_ids.long().sort(-1)
        ids, own_order = guess.ids.sort(-1)
        same = (ids == true_ids).all(-1)
        assert same.float().mean() > 0.95  # vLLM rounds logits to bfloat16: near ties fall the other way
        weights = guess.weights.gather(1, own_order)[same]
        torch.testing.assert_close(weights, own.topk_weights.gather(1, order)[same], rtol=0.05, atol=0.02)
