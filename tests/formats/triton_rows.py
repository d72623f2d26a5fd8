"""One MoE layer through vLLM's own Triton kernels on a CPU: its experts in their own rows, and in other ones.

Needs `fake_gpu.pretend` before it is imported, and TRITON_INTERPRET=1. The operators around the kernels are stand-ins
(`standins.py`); the kernels, the expert classes and the choice of tiles are vLLM's. What is not quantised is in fp16:
for bfloat16 the interpreter's tl.dot multiplies bit patterns.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.experts.triton_moe as triton_moe
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import config as configs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.v1.worker.workspace import init_workspace_manager

from formats import offered, standins
from formats.checkpoints import GROUP, QUANTISE, Tensors, dequantise, nibbles

E, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 256, 128
NARROW, WIDE = 1, 3
"""Tokens of a step. For so few as 1, TritonExperts makes a block of each of their experts; others are sorted first."""


@dataclass(frozen=True)
class Format:
    """How the weights of a format of `checkpoints.py`, "" for none, are laid out for a kernel, and what it is told."""

    published: str
    layout: Callable[[Tensors], Tensors]
    """Of the published parts of a weight (N, K): the weight "", its "_scale" and its zero points "_zp"."""
    config: Callable[..., Any]
    kernel: str = "TritonExperts"
    dtype: torch.dtype = torch.bfloat16


def _weight_and_scale(parts: Tensors) -> Tensors:
    return {"": parts["weight"], "_scale": parts["weight_scale"].float()}


def _fp8_block(parts: Tensors) -> Tensors:
    return {"": parts["weight"], "_scale": parts["weight_scale_inv"]}


def _int4(parts: Tensors) -> Tensors:
    return {"": parts["weight_packed"].view(torch.uint8), "_scale": parts["weight_scale"].half()}


def _int4_with_zeros(parts: Tensors) -> Tensors:
    codes, zeros = (standins.unpack_awq(parts[name]).to(torch.uint8) for name in ("qweight", "qzeros"))
    return {"": nibbles(codes.T), "_scale": parts["scales"].T.half(), "_zp": nibbles(zeros).T}


def _int8_weights(parts: Tensors) -> Tensors:
    codes = (parts["weight"].short() + 128).to(torch.uint8)
    return {"": codes, "_scale": parts["weight_scale"].half().repeat(1, codes.size(1) // GROUP)}


_fp8 = configs.fp8_w8a8_moe_quant_config
_input_scale = torch.tensor(0.07)
_weights_only: dict[str, Any] = {"kernel": "TritonWNA16Experts", "dtype": torch.float16}
_int4_config = partial(configs.int4_w4a16_moe_quant_config, block_shape=[0, GROUP])
FORMATS = {
    "fp16": Format("", lambda parts: parts, lambda: configs.FUSED_MOE_UNQUANTIZED_CONFIG, dtype=torch.float16),
    "fp8-block": Format("fp8-block", _fp8_block, partial(_fp8, block_shape=[128, 128])),
    "fp8-channel": Format(
        "fp8-channel", _weight_and_scale, partial(_fp8, per_act_token_quant=True, per_out_ch_quant=True)
    ),
    "fp8-static": Format("fp8-static", _weight_and_scale, partial(_fp8, a1_scale=_input_scale, a2_scale=_input_scale)),
    "fp8-dynamic": Format("fp8-dynamic", _weight_and_scale, _fp8),
    "int8": Format(
        "int8",
        _weight_and_scale,
        partial(configs.int8_w8a8_moe_quant_config, a1_scale=None, a2_scale=None, per_act_token_quant=True),
    ),
    "int4-weights": Format("w4a16", _int4, _int4_config, **_weights_only),
    "int4-weights-zeros": Format("awq", _int4_with_zeros, _int4_config, **_weights_only),
    "int8-weights": Format(
        "int8", _int8_weights, partial(configs.int8_w8a16_moe_quant_config, block_shape=[0, GROUP]), **_weights_only
    ),
}


def _experts(form: Format, generator: torch.Generator) -> tuple[Tensors, list[torch.Tensor]]:
    """Random experts: the tensors of E rows that the kernel reads, and w1 and w2 in float32 as these have them."""
    rows: Tensors = {}
    weights = []
    for name, shape in (("w1", (2 * INTERMEDIATE, HIDDEN)), ("w2", (HIDDEN, INTERMEDIATE))):
        of_experts, plain = [], []
        for _ in range(E):
            weight = 0.05 * torch.randn(shape, generator=generator)
            parts = QUANTISE[form.published](weight) if form.published else {"": weight.half()}
            of_experts.append(form.layout(parts))
            plain.append(dequantise(form.published, parts) if form.published else parts[""].float())
        rows |= {name + part: torch.stack([each[part] for each in of_experts]) for part in of_experts[0]}
        weights.append(torch.stack(plain))
    return rows, weights


def _compute(form: Format, rows: Tensors, x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> Any:
    sizes = {"num_experts": E, "num_local_experts": E, "num_logical_experts": E, "experts_per_token": TOP_K}
    sizes |= {"hidden_dim": HIDDEN, "intermediate_size": INTERMEDIATE}
    moe_config = offered.moe_config(**sizes, in_dtype=form.dtype)
    scales = {name: tensor for name, tensor in rows.items() if name not in ("w1", "w2")}
    quant_config = form.config(**scales)
    kernel = FusedMoEKernel(
        maybe_make_prepare_finalize(moe_config, quant_config, None, allow_new_interface=True, use_monolithic=False),
        getattr(triton_moe, form.kernel)(moe_config, quant_config),
    )
    return kernel.apply(
        x.clone(),
        rows["w1"],
        rows["w2"],
        topk_weights,
        ids.to(torch.int32),
        activation=MoEActivation.SILU,
        global_num_experts=E,
        expert_map=None,
        apply_router_weight_on_input=False,
    ).clone()


def try_rows(form: Format) -> dict[str, Any]:
    """What becomes of the output when the experts are in other rows.

    "same": whether it has the same bits, by the number of tokens. "unnoticed": which of the ids, scales and zero points
    could be left as they were without a change. "error": of the output, relative to float32, the largest.
    """
    generator = torch.Generator().manual_seed(0)
    rows, (w1, w2) = _experts(form, generator)
    row_of = torch.randperm(E, generator=generator)
    moved = {name: tensor[row_of.argsort()] for name, tensor in rows.items()}
    same, unnoticed, errors = {}, [], []
    for num_tokens in (NARROW, WIDE):
        x = torch.randn((num_tokens, HIDDEN), generator=generator).to(form.dtype)
        ids = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in x])
        topk_weights = torch.rand(ids.shape, generator=generator)
        expected = _compute(form, rows, x, topk_weights, ids)
        same[num_tokens] = torch.equal(_compute(form, moved, x, topk_weights, row_of[ids]), expected)
        if num_tokens == NARROW:
            wrong = {"ids": _compute(form, moved, x, topk_weights, ids)}
            for name in rows.keys() - {"w1", "w2"}:
                wrong[name] = _compute(form, {**moved, name: rows[name]}, x, topk_weights, row_of[ids])
            unnoticed = [name for name, found in wrong.items() if torch.equal(found, expected)]
        gate, up = torch.einsum("tknh,th->tkn", w1[ids], x.float()).chunk(2, -1)
        parts = torch.einsum("tkhi,tki->tkh", w2[ids], torch.nn.functional.silu(gate) * up)
        exact = (parts * topk_weights.unsqueeze(-1)).sum(1)
        errors.append(float((expected.float() - exact).norm() / exact.norm()))
    return {"kernel": form.kernel, "same": same, "unnoticed": unnoticed, "error": max(errors)}


def main(names: list[str]) -> None:
    """Print JSON: names of FORMATS, and what `try_rows` says of each, None where vLLM has no such kernel."""
    standins.install_operators(pytest.MonkeyPatch())
    init_workspace_manager(torch.device("cpu"))
    with set_current_vllm_config(VllmConfig()):
        found = {n: try_rows(FORMATS[n]) if hasattr(triton_moe, FORMATS[n].kernel) else None for n in names}
    print(json.dumps(found))
