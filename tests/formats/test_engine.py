"""Quantised experts through the real engine: vLLM's own loaders, layouts and expert classes, plain against the plugin.

The CUDA operators are stand-ins (`standins.py`), the rest is vLLM's. That the stand-ins are right is shown where plain
vLLM computes with them: an MoE layer's output against what the checkpoint's own numbers give in float32.
"""

from typing import Any

import pytest
import torch
from engines import caches, counters, greedy, layers, open_engine
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.online import mxfp4 as online_mxfp4

import vllm_expert_prefetch.serving.layer as layer_module
import vllm_expert_prefetch.serving.takeover as takeover
from formats import standins
from formats.checkpoints import CASES, ONLINE, dequantise, family_of, to_mxfp4, write_quantised
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError

pytestmark = pytest.mark.engine

WEIGHT_ONLY_ERROR, QUANTISED_INPUT_ERROR = 0.02, 0.08
"""Relative, of a layer's output: bfloat16 between the two products, and inputs of 8 bits where Triton multiplies."""


@pytest.fixture
def cuda_operators(monkeypatch):
    standins.install(monkeypatch)
    monkeypatch.setattr(online_mxfp4, "mxfp4_quantize", quantise_mxfp4)


def quantise_mxfp4(weight):
    """vLLM's mxfp4_quantize, a Triton kernel: (N, K) to bytes (N, K / 2) and exponents of scales (N, K / 32)."""
    blocks, exponents = to_mxfp4(weight)
    return blocks.flatten(-2), exponents


def options(backend, name=""):
    online = {"quantization": "online", "quantization_config": {"moe": ONLINE[name]}} if name in ONLINE else {}
    return online | {
        "skip_tokenizer_init": True,
        "moe_backend": backend,
        "dtype": "bfloat16",
        "max_num_batched_tokens": 256,
        "max_model_len": 256,
    }


@pytest.mark.proves("quantised experts, [each format](#quantised-experts)", "shim")
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_format_is_bit_equal_with_a_part_of_its_experts(name, backend, cuda_operators, tmp_path):
    model, prompts = write_quantised(name, tmp_path / name), family_of(name).prompts[:3]

    def generate(llm):
        return [greedy(llm, prompts, 8), greedy(llm, prompts[:1], 8)]

    with open_engine(model, None, **options(backend, name)) as llm:
        expected = generate(llm)
        layer = layers(llm)[0]
        assert type(layer.quant_method.moe_kernel.fused_experts).__name__ == f"{backend.capitalize()}Experts"
        error = error_of(layer, Checkpoint(name, load_file(model / "model.safetensors")))
        if name in ONLINE:  # against the unquantised checkpoint
            assert 0.001 < error < (0.25 if name == "online-mxfp4" else QUANTISED_INPUT_ERROR)
        else:
            assert error < (WEIGHT_ONLY_ERROR if backend == "marlin" else QUANTISED_INPUT_ERROR)
    share = 0.25 if backend == "marlin" else 0.5
    config = {"cache_fraction": share, "prefetch": "on", "emulated_link_gbps": 0.05}
    with open_engine(model, config, **options(backend, name)) as llm:
        assert generate(llm) == expected
        counted, words = counters(llm), [cache.words() for cache in caches(llm)]
    assert all(min(layer.hits, layer.misses, layer.wide_steps, layer.overflow) > 0 for layer in words)
    assert counted["transfer_bytes_total/prefetch"] > 0


def test_a_scale_that_was_not_found_fails_the_proof_at_start(cuda_operators, monkeypatch, tmp_path):
    find = layer_module.find_expert_tensors
    no_scales = lambda *of: {name: tensor for name, tensor in find(*of).items() if "scale" not in name}  # noqa: E731
    for module in (layer_module, takeover):  # found neither then nor when the rows are verified
        monkeypatch.setattr(module, "find_expert_tensors", no_scales)
    model = write_quantised("int8", tmp_path / "int8")
    with pytest.raises(TakeoverError, match=r"layers\.0\.mlp\.experts with TritonExperts .*not give the same bits"):
        open_engine(model, {"cache_fraction": 0.5}, **options("triton")).__enter__()


def test_scales_that_are_missing_for_one_expert_are_named(cuda_operators, tmp_path):
    model = write_quantised("w4a16", tmp_path / "w4a16")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.down_proj.weight_scale"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TakeoverError, match=r"layers\.1\.mlp\.experts, w2_weight_scale \(w2\).*\{5: 'missing'\}"):
        open_engine(model, True, **options("marlin")).__enter__()


class Checkpoint:
    """The experts of the first MoE layer, dequantised."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        self._name, self._tensors = name, tensors
        self.is_gpt_oss = name == "mxfp4"

    def gate_and_up(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """(2 I): of gpt-oss in turns, with biases."""
        if self.is_gpt_oss:
            return self._gpt_oss("gate_up_proj", expert, x)
        return torch.cat([self._weight(f"{expert}.{part}_proj") @ x for part in ("gate", "up")])

    def down(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return self._gpt_oss("down_proj", expert, x) if self.is_gpt_oss else self._weight(f"{expert}.down_proj") @ x

    def _weight(self, path: str) -> torch.Tensor:
        prefix = f"model.layers.0.mlp.experts.{path}."
        parts = {key.removeprefix(prefix): value for key, value in self._tensors.items() if key.startswith(prefix)}
        return dequantise(self._name, parts)

    def _gpt_oss(self, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.0.mlp.experts.{part}_"
        blocks, scales, bias = (self._tensors[prefix + name][expert] for name in ("blocks", "scales", "bias"))
        return dequantise(self._name, {"blocks": blocks, "scales": scales}) @ x + bias.float()


def error_of(layer: Any, checkpoint: Checkpoint) -> float:
    """Of a plain layer's output for three random tokens, relative to that of the checkpoint in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((3, layer.hidden_size), generator=generator).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(layer.local_num_experts, generator=generator)[: layer.top_k] for _ in x])
    weights = torch.rand(ids.shape, generator=generator)
    quant_method = layer.quant_method
    inputs = {"x": x.clone(), "topk_weights": weights, "topk_ids": ids.to(torch.int32)}
    got = quant_method.apply(layer=layer, shared_experts=None, shared_experts_input=None, **inputs).float()
    expected = torch.zeros_like(got)
    for token, experts in enumerate(ids.tolist()):
        for place, expert in enumerate(experts):
            hidden = checkpoint.gate_and_up(expert, x[token].float())
            activated = torch.empty(len(hidden) // 2)
            if checkpoint.is_gpt_oss:
                standins.swigluoai_and_mul(activated, hidden)
            else:
                gate, up = hidden.chunk(2)
                activated = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, place] * checkpoint.down(expert, activated)
    return float((got - expected).norm() / expected.norm())
