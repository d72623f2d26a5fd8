"""Stand-ins in torch for the CUDA operators around vLLM's Marlin and Triton MoE kernels, so that its own quantisation
methods, weight layouts and expert classes run on the CPU platform. What each replaces is in its docstring.

They show layouts, take-over and wiring, not the bits of a GPU. `marlin_gemm` adds K in the slices of the CUDA kernel's
schedule (csrc/moe/marlin_moe_wna16/marlin_template.h), so that the order of blocks matters as it does there.
"""

import types
from typing import Any

import torch
import vllm._custom_ops as ops
from vllm.model_executor.layers.quantization.utils.marlin_utils import get_scale_perms
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights
from vllm.scalar_type import scalar_types

NUM_BLOCKS = 82  # SMs of an RTX 3090, one thread block on each
FP8_MAX = 448.0
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def install(patch: Any) -> None:
    """Have vLLM's Marlin and Triton experts compute with what is here; `patch` is a pytest.MonkeyPatch."""
    import vllm.model_executor.layers.fused_moe.experts.marlin_moe as marlin_moe
    import vllm.model_executor.layers.fused_moe.experts.triton_moe as triton_moe
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_fp4, marlin_utils_fp8

    install_operators(patch)
    for module in (marlin_moe, marlin_utils, marlin_utils_fp4, marlin_utils_fp8):
        for name in ("get_marlin_workspace", "marlin_make_workspace_new", "marlin_make_workspace"):
            if hasattr(module, name):
                patch.setattr(module, name, lambda *args, **kwargs: torch.zeros(1024, dtype=torch.int32))
    for experts in (marlin_moe.MarlinExpertsBase, marlin_moe.MarlinExperts, triton_moe.TritonExperts):
        patch.setattr(experts, "_supports_current_device", staticmethod(lambda: True))
    patch.setattr(triton_moe.TritonExperts, "_supports_quant_scheme", staticmethod(lambda weight, activation: True))
    patch.setattr(triton_moe, "invoke_fused_moe_triton_kernel", triton_gemm)
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    patch.setattr(triton_moe, "tl", types.SimpleNamespace(**names), raising=False)


def install_operators(patch: Any) -> None:
    """The operators alone: Triton's own kernels stay, for Triton's interpreter."""
    import vllm.model_executor.layers.fused_moe.utils as moe_utils

    operators = {
        "moe_align_block_size": align_blocks,
        "moe_sum": sum_over_topk,
        "gptq_marlin_repack": repack_gptq,
        "gptq_marlin_moe_repack": repack_gptq_experts,
        "awq_marlin_moe_repack": repack_awq_experts,
        "moe_wna16_marlin_gemm": marlin_gemm,
        "scaled_fp8_quant": scaled_fp8_quant,
        "silu_and_mul_per_block_quant": silu_and_mul_per_block_quant,
    }
    for name, operator in operators.items():
        patch.setattr(ops, name, operator, raising=False)
    patch.setattr(moe_utils, "_fp8_quantize", quantise_fp8)
    patch.setattr(moe_utils, "_int8_quantize", quantise_int8)
    _define("silu_and_mul(Tensor(a!) out, Tensor x) -> ()", silu_and_mul)
    _define("swigluoai_and_mul(Tensor(a!) out, Tensor x, float alpha=1.702, float limit=7.0) -> ()", swigluoai_and_mul)


_library = torch.library.Library("_C", "FRAGMENT")


def _define(schema: str, function: Any) -> None:
    name = schema.split("(")[0]
    if not hasattr(torch.ops._C, name):
        _library.define(schema)
        _library.impl(name, function, "CPU")


def align_blocks(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *rest: Any,
) -> None:
    """_C.moe_align_block_size: blocks in the order of (mapped) expert ids, tokens in order within an expert."""
    flat = topk_ids.flatten().tolist()
    table = list(range(num_experts)) if expert_map is None else expert_map.tolist()
    tokens, blocks = [], []
    for place in range(num_experts):
        own = [i for i, expert in enumerate(flat) if 0 <= expert < num_experts and table[expert] == place]
        num_blocks = -(-len(own) // block_size)
        tokens += own + [len(flat)] * (num_blocks * block_size - len(own))
        blocks += [place] * num_blocks
    sorted_ids.fill_(len(flat))
    expert_ids.fill_(-1)
    sorted_ids[: len(tokens)] = torch.tensor(tokens, dtype=sorted_ids.dtype)
    expert_ids[: len(blocks)] = torch.tensor(blocks, dtype=expert_ids.dtype)
    num_tokens[0] = len(tokens)


def sum_over_topk(
    parts: torch.Tensor,
    out: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """_C.moe_sum, which leaves out what the map leads nowhere: nothing was written there."""
    if topk_ids is not None and expert_map is not None:
        parts = parts.masked_fill((expert_map[topk_ids.long()] < 0).unsqueeze(-1), 0)
    out.copy_(parts.float().sum(dim=1))


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """_C.silu_and_mul."""
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate).to(x.dtype).float() * up)


def swigluoai_and_mul(out: torch.Tensor, x: torch.Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    """_C.swigluoai_and_mul: gates and values take turns."""
    gate, up = x.float()[..., ::2].clamp(max=limit), x.float()[..., 1::2].clamp(-limit, limit)
    out.copy_((up + 1) * gate * torch.sigmoid(alpha * gate))


def quantise_fp8(x: torch.Tensor, scale: Any, per_token: bool, block_shape: Any = None) -> tuple[Any, Any]:
    """vLLM's _fp8_quantize, whose three kernels need a GPU."""
    if block_shape is not None:
        groups = x.float().unflatten(-1, (-1, block_shape[1]))
        scales = groups.abs().amax(-1).clamp(min=1e-10) / FP8_MAX
        return _to_fp8(groups / scales.unsqueeze(-1)).flatten(-2), scales
    if scale is None:
        largest = x.float().abs().amax(-1, keepdim=True) if per_token else x.float().abs().max().reshape(1)
        scale = (largest / FP8_MAX).clamp(min=1 / (FP8_MAX * 512))
    return _to_fp8(x.float() / scale.float()), scale


def scaled_fp8_quant(x: torch.Tensor, scale: Any = None, *args: Any, **named: Any) -> tuple[Any, Any]:
    """_C.static_scaled_fp8_quant and its dynamic forms: of activations, and of weights whose scale changes."""
    quantised, scale = quantise_fp8(x, scale, named.get("use_per_token_if_dynamic", False))
    if named.get("output") is not None:
        quantised = named["output"].copy_(quantised)
    return quantised, scale


def silu_and_mul_per_block_quant(x: torch.Tensor, group_size: int, *args: Any, **named: Any) -> tuple[Any, Any]:
    """_C.silu_and_mul_per_block_quant."""
    activated = x.new_empty(len(x), x.size(1) // 2)
    silu_and_mul(activated, x)
    return quantise_fp8(activated, None, False, (1, group_size))


def _to_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantise_int8(x: torch.Tensor, scale: Any, per_token: bool, block_shape: Any = None) -> tuple[Any, Any]:
    """vLLM's _int8_quantize, per token."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def repack_gptq(*tensors_and_sizes: Any, **named: Any) -> torch.Tensor:
    """_C.gptq_marlin_repack, without act-order: (K * bits / 32, N) int32 to Marlin's layout."""
    weight, size_k, size_n, bits = _repacked(tensors_and_sizes, named)
    return _to_marlin(unpack(weight, bits, 0), size_k, size_n, bits)


def repack_gptq_experts(*tensors_and_sizes: Any, **named: Any) -> torch.Tensor:
    """The same for every expert."""
    weights, *sizes = _repacked(tensors_and_sizes, named)
    return torch.stack([repack_gptq(weight, *sizes) for weight in weights])


def repack_awq_experts(*tensors_and_sizes: Any, **named: Any) -> torch.Tensor:
    """_C.awq_marlin_moe_repack: (E, K, N * bits / 32) int32 in AWQ's order to Marlin's layout."""
    weights, size_k, size_n, bits = _repacked(tensors_and_sizes, named)
    return torch.stack([_to_marlin(unpack_awq(weight), size_k, size_n, bits) for weight in weights])


def _repacked(given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, int, int, int]:
    """The weight, K, N and bits, which vLLM gives by place or by name; between them may stand a permutation."""
    weight = named["b_q_weight"] if "b_q_weight" in named else given[0]
    sizes = [named[name] for name in ("size_k", "size_n", "num_bits") if name in named]
    size_k, size_n, bits = sizes or given[-3:]
    return weight, size_k, size_n, bits


def unpack_awq(weight: torch.Tensor) -> torch.Tensor:
    """(K, N / 8) int32 to (K, N) codes: AWQ packs the columns 0 2 4 6 1 3 5 7."""
    return unpack(weight, 4, 1).unflatten(1, (-1, 8))[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes of `bits` each, the lowest first, along `dim` of an int32 matrix."""
    shifts = torch.arange(0, 32, bits)
    codes = (packed.long().unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (1 - dim))) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1).to(torch.int32)


def _to_marlin(codes: torch.Tensor, size_k: int, size_n: int, bits: int) -> torch.Tensor:
    return marlin_weights(codes, size_k, size_n, bits, get_weight_perm(bits))


def from_marlin(packed: torch.Tensor, bits: int, size_k: int, size_n: int) -> torch.Tensor:
    """(K, N) codes of a weight in Marlin's layout."""
    perm = torch.as_tensor(get_weight_perm(bits))
    flat = unpack(packed, bits, 1).reshape(-1, len(perm)).long()
    plain = torch.empty_like(flat)
    plain[:, perm] = flat
    return plain.reshape(size_k // 16, size_n // 16, 16, 16).permute(0, 2, 1, 3).reshape(size_k, size_n)


def _unpermute(scales: torch.Tensor, is_grouped: bool) -> torch.Tensor:
    perm = torch.tensor(get_scale_perms()[0 if is_grouped else 1])
    flat = scales.reshape(-1, len(perm))
    plain = torch.empty_like(flat)
    plain[:, perm] = flat
    return plain.reshape(scales.shape)


def _zero_points(packed: torch.Tensor, size_n: int) -> torch.Tensor:
    codes = unpack(packed, 4, 1).reshape(-1, 8)
    plain = torch.empty_like(codes)
    plain[:, [0, 2, 4, 6, 1, 3, 5, 7]] = codes
    return _unpermute(plain.reshape(packed.shape[0], size_n), True)


def marlin_weight(
    packed: torch.Tensor, scales: torch.Tensor, zeros: Any, alpha: Any, kind: Any, size_k: int, size_n: int
) -> torch.Tensor:
    """float32 (K, N): one expert's weight out of Marlin's layout of codes, scales and zero points."""
    is_8bit = kind in (scalar_types.uint8b128, scalar_types.float8_e4m3fn)
    codes = from_marlin(packed, 8 if is_8bit else 4, size_k, size_n)
    is_grouped = len(scales) > 1
    if scales.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):  # MXFP4, NVFP4: four columns in another order
        plain = scales.view(torch.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(scales.shape)
        if scales.dtype == torch.float8_e8m0fnu:
            scale = _unpermute(plain, is_grouped).view(torch.float8_e8m0fnu).float()
        else:  # no sign, five bits of exponent, three of mantissa
            scale = _unpermute((plain.to(torch.int16) << 7).view(torch.float16).float() / 2**7, True)
    else:
        scale = _unpermute(scales, is_grouped).float()
    group = size_k // len(scales)
    if kind == scalar_types.float4_e2m1f:
        weight = FP4_VALUES[codes] * (1 if alpha is None else alpha / 2.0**119)
    elif kind == scalar_types.float8_e4m3fn:
        weight = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        scale = scale if scales.dtype == torch.float8_e8m0fnu else scale / 2.0**120
    elif kind == scalar_types.uint4:
        weight = codes.float() - _zero_points(zeros, size_n).repeat_interleave(group, 0)
    else:
        weight = codes.float() - (128 if is_8bit else 8)
    return weight * scale.repeat_interleave(group, 0)


def slices_of_k(tile: int, num_tiles: int, k_tiles: int) -> list[tuple[int, int]]:
    """(first, last) K tiles of one output tile, in the order in which thread blocks add them: the bottom first."""
    late, rounds = num_tiles, 0
    if num_tiles > NUM_BLOCKS:
        late = num_tiles % NUM_BLOCKS
        late += NUM_BLOCKS if late * 3 <= NUM_BLOCKS else 0
        rounds = (num_tiles - late) // NUM_BLOCKS
    if tile < rounds * NUM_BLOCKS:
        return [(0, k_tiles)]
    start = (tile - rounds * NUM_BLOCKS) * k_tiles
    each = -(-k_tiles * late // NUM_BLOCKS)
    cuts = [cut - start for cut in range(0, late * k_tiles + each, each) if start < cut < start + k_tiles]
    return list(zip([0, *cuts], [*cuts, k_tiles], strict=True))[::-1]


def marlin_gemm(
    x: torch.Tensor,
    out: torch.Tensor | None,
    weights: torch.Tensor,
    biases: torch.Tensor | None,
    scales: torch.Tensor,
    x_scales: Any,
    alphas: torch.Tensor | None,
    zeros: torch.Tensor | None,
    workspace: torch.Tensor,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    topk_weights: torch.Tensor,
    moe_block_size: int,
    top_k: int,
    mul_topk_weights: bool,
    b_q_type: Any,
    size_m: int,
    size_n: int,
    size_k: int,
    **kw: Any,
) -> torch.Tensor:
    """_moe_C.moe_wna16_marlin_gemm: rows of `x` times the weight of each block's expert, read in Marlin's layout."""
    if out is None:
        out = torch.empty(size_m * top_k, size_n, dtype=x.dtype)
    thread_k, thread_n = (128, 128) if moe_block_size <= 16 else (64, 256)
    if size_k % thread_k or size_n % thread_n:
        thread_k, thread_n = (64, 128) if size_n % 128 == 0 else (128, 64)
    num_blocks, n_tiles = int(num_tokens[0]) // moe_block_size, size_n // thread_n
    for block in range(num_blocks):
        expert = int(expert_ids[block])
        rows = sorted_ids[block * moe_block_size : (block + 1) * moe_block_size].long()
        rows = rows[rows < size_m * top_k]
        zero, alpha = (None if each is None else each[expert] for each in (zeros, alphas))
        weight = marlin_weight(weights[expert], scales[expert], zero, alpha, b_q_type, size_k, size_n)
        weight, inputs = weight.to(x.dtype).float(), x[rows // top_k].float()
        result = torch.empty(len(rows), size_n)
        for tile in range(n_tiles):
            columns = slice(tile * thread_n, (tile + 1) * thread_n)
            total: Any = 0
            for first, last in slices_of_k(block * n_tiles + tile, num_blocks * n_tiles, size_k // thread_k):
                part = torch.zeros(len(rows), thread_n)
                for k in range(first * thread_k, last * thread_k, 16):  # one step of the tensor cores
                    part = part + inputs[:, k : k + 16] @ weight[k : k + 16, columns]
                total = total + part
            result[:, columns] = total
        if biases is not None:
            result = result + _unpermute(biases[expert].float().reshape(1, -1), False)
        if mul_topk_weights:
            result = result * topk_weights.reshape(-1)[rows].unsqueeze(1)
        out.view(-1, size_n)[rows] = result.to(out.dtype)
    return out


def triton_gemm(
    x: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    x_scale: Any,
    scales: torch.Tensor,
    topk_weights: torch.Tensor,
    sorted_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    mul_routed_weight: bool,
    top_k: int,
    config: dict[str, int],
    compute_type: Any,
    *types_of_weights: Any,
    block_shape: list[int] | None = None,
    B_bias: torch.Tensor | None = None,
    **kw: Any,
) -> None:
    """vLLM's fused_moe_kernel in Triton for FP8 and INT8: one row at a time, scales of blocks applied step by step."""
    per_channel = kw.get("per_channel_quant", types_of_weights[-1] if types_of_weights else False)
    flat, num_rows, size = out.view(-1, weights.size(1)), len(x) * top_k, config["BLOCK_SIZE_M"]
    for block, expert in enumerate(expert_ids.tolist()):
        if sorted_ids is None:
            rows = torch.tensor([block])
        elif block * size >= int(num_tokens[0]):
            break
        else:
            rows = sorted_ids[block * size : (block + 1) * size].long()
            rows = rows[rows < num_rows]
        inputs, weight = x[rows // top_k].float(), weights[expert].float()
        if block_shape is not None:
            size_n, size_k = block_shape
            result = torch.zeros(len(rows), len(weight))
            for k in range(0, inputs.size(1), size_k):
                part = torch.stack([row @ weight[:, k : k + size_k].T for row in inputs[:, k : k + size_k]])
                scale = scales[expert].float()[:, k // size_k].repeat_interleave(size_n)[: len(weight)]
                result = result + part * x_scale[rows // top_k][:, k // size_k, None] * scale
        else:
            if x_scale is None:  # weights alone are quantised
                of_rows = torch.ones(1, 1)
            elif per_channel:
                of_rows = x_scale[rows // top_k].float().reshape(-1, 1)
            else:
                of_rows = x_scale.float().reshape(1, 1)
            result = torch.stack([row @ weight.T for row in inputs]) * of_rows * scales[expert].float().reshape(1, -1)
        if B_bias is not None:
            result = result + B_bias[expert].float()
        if mul_routed_weight:
            result = result * topk_weights.reshape(-1)[rows].unsqueeze(1)
        flat[rows] = result.to(out.dtype)
