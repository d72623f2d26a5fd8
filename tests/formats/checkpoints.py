"""Tiny checkpoints whose experts are quantised, each in the layout in which its format is published.

`write_quantised(format, directory)` writes one of the families of `families.py` with the experts' weights rounded to
the format; attention, router and embeddings stay in bfloat16. `dequantise` gives back a weight in float32.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family, write_checkpoint
from safetensors.torch import load_file, save_file

from formats.standins import FP4_VALUES, unpack, unpack_awq

GROUP = 64
MARLIN: tuple[str, ...] = ("gptq", "awq", "w4a16", "fp8-channel", "fp8-block", "nvfp4", "mxfp4")
TRITON: tuple[str, ...] = ("fp8-block", "fp8-channel", "fp8-static", "fp8-dynamic", "int8")
ONLINE = {
    "online-fp8": "fp8_per_tensor",
    "online-fp8-block": "fp8_per_block",
    "online-fp8-channel": "fp8_per_channel",
    "online-int8": "int8_per_channel_weight_only",
    "online-mxfp8": "mxfp8",
    "online-mxfp4": "mxfp4",
}
"""Those that vLLM makes of an unquantised checkpoint while it loads it, by its own names."""
MARLIN += ("online-fp8", "online-mxfp8", "online-mxfp4")
TRITON += ("online-fp8", "online-fp8-block", "online-fp8-channel", "online-int8")
CASES = [(name, "marlin") for name in MARLIN] + [(name, "triton") for name in TRITON]
"""(format, --moe-backend): what `test_engine.py` shows, and docs/compatibility.md says."""
Tensors = dict[str, torch.Tensor]
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.qkv_proj")
_UNQUANTISED = [f"model.layers.{i}.{part}" for i in range(4) for part in (*_PARTS, "mlp.gate")] + ["lm_head"]


def _compressed_tensors(layout: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
        "config_groups": {"group_0": group},
    }


_SYMMETRIC = {"symmetric": True}
_PER_CHANNEL = {**_SYMMETRIC, "strategy": "channel"}
_PER_TOKEN = {**_SYMMETRIC, "strategy": "token", "dynamic": True}
_INT4 = {**_SYMMETRIC, "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {"-:.*self_attn.*": {}, "-:.*mlp.gate$": {}},
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"],
    },
    "w4a16": _compressed_tensors("pack-quantized", _INT4),
    "fp8-channel": _compressed_tensors(
        "float-quantized",
        {**_PER_CHANNEL, "num_bits": 8, "type": "float"},
        {**_PER_TOKEN, "num_bits": 8, "type": "float"},
    ),
    "int8": _compressed_tensors(
        "int-quantized", {**_PER_CHANNEL, "num_bits": 8, "type": "int"}, {**_PER_TOKEN, "num_bits": 8, "type": "int"}
    ),
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": _UNQUANTISED},
    "fp8-dynamic": {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": _UNQUANTISED},
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": _UNQUANTISED,
    },
    "nvfp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "ignore": ["lm_head", "*self_attn*", "*mlp.gate*"],
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
# vLLM takes w13's scales for those of one group where the intermediate size is no more than the group's.
_SIZES: dict[str, dict[str, int]] = {
    **{name: {"moe_intermediate_size": 128} for name in ("fp8-block", "gptq", "awq", "w4a16")},
    **{name: {"hidden_size": 256, "moe_intermediate_size": 128} for name in ONLINE},
    "mxfp4": {"hidden_size": 256, "intermediate_size": 128},
}


def family_of(name: str) -> Family:
    """The family that the checkpoint of format `name` belongs to."""
    return FAMILIES["gpt-oss" if name == "mxfp4" else "qwen3-moe"]


def write_quantised(name: str, directory: Path) -> Path:
    """Write the checkpoint of format `name` into `directory`, and return it. Unquantised where vLLM quantises it."""
    write_checkpoint("gpt-oss" if name == "mxfp4" else "qwen3-moe", directory, **_SIZES.get(name, {}))
    if name in ONLINE:
        return directory
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[name]}))
    tensors: Tensors = {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        if name == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = to_mxfp4(tensor.transpose(1, 2))
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        elif ".experts." in key and key.endswith("_proj.weight"):
            parts = QUANTISE[name](tensor.float())
            tensors |= {key.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        else:
            tensors[key] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def pack(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """4-bit codes to int32, eight of them along `dim`, the first one lowest."""
    groups = codes.long().unflatten(dim, (-1, 8))
    shape = [8 if i == dim + 1 else 1 for i in range(groups.dim())]
    return (groups << (4 * torch.arange(8)).view(shape)).sum(dim + 1).to(torch.int32)


def to_fp4(values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest value of E2M1."""
    nearest = (values.abs().unsqueeze(-1) - FP4_VALUES[:8]).abs().argmin(-1)
    return (nearest + 8 * (values < 0)).to(torch.uint8)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes in a byte, the first one lower."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, N, K) to blocks (E, N, K / 32, 16) of bytes, and the exponents of their scales (E, N, K / 32)."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = torch.log2(groups.abs().amax(-1).clamp(min=2**-60)).floor() - 2
    return nibbles(to_fp4(groups / torch.exp2(exponent).unsqueeze(-1))), (exponent + 127).to(torch.uint8)


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
    return (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1) + 8, scales


def _gptq(weight: torch.Tensor) -> Tensors:
    codes, scales = _int4(weight)
    size_n, size_k = weight.shape
    return {
        "qweight": pack(codes.T, 0),
        "scales": scales.T,
        "qzeros": pack(torch.full((size_k // GROUP, size_n), 7), 1),
        "g_idx": (torch.arange(size_k) // GROUP).to(torch.int32),
    }


def _awq(weight: torch.Tensor) -> Tensors:
    groups = weight.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).to(torch.bfloat16)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((groups / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, 15).flatten(1)

    def packed(columns: torch.Tensor) -> torch.Tensor:
        return pack(columns.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 1)

    return {"qweight": packed(codes.T), "scales": scales.T, "qzeros": packed(zeros.T)}


def _w4a16(weight: torch.Tensor) -> Tensors:
    codes, scales = _int4(weight)
    return {"weight_packed": pack(codes, 1), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).to(torch.float8_e4m3fn)


def _fp8_channel(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": _fp8(weight, scale), "weight_scale": scale.to(torch.bfloat16)}


def _fp8_dynamic(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    return {"weight": _fp8(weight, scale), "weight_scale": scale}


def _fp8_static(weight: torch.Tensor) -> Tensors:
    differs_by_expert = 0.06 + 0.01 * float(weight.abs().mean() * 1e3 % 1)
    return {**_fp8_dynamic(weight), "input_scale": torch.tensor(differs_by_expert)}


def _fp8_block(weight: torch.Tensor) -> Tensors:
    blocks = weight.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    return {"weight": _fp8(blocks, scales[:, None, :, None]).flatten(0, 1).flatten(1), "weight_scale_inv": scales}


def _int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.to(torch.bfloat16)}


def _nvfp4(weight: torch.Tensor) -> Tensors:
    alpha = weight.abs().max() / (448 * 6)
    groups = weight.unflatten(-1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 / alpha).to(torch.float8_e4m3fn)
    codes = to_fp4(groups / (scales.float() * alpha).clamp(min=1e-9).unsqueeze(-1)).flatten(1)
    one = torch.tensor(1.0)
    return {"weight": nibbles(codes), "weight_scale": scales, "weight_scale_2": alpha, "input_scale": one}


QUANTISE: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "gptq": _gptq,
    "awq": _awq,
    "w4a16": _w4a16,
    "fp8-channel": _fp8_channel,
    "fp8-static": _fp8_static,
    "fp8-dynamic": _fp8_dynamic,
    "fp8-block": _fp8_block,
    "int8": _int8,
    "nvfp4": _nvfp4,
}
"""Of one weight (N, K) float32: the tensors that stand for it, by the end of their names."""


def dequantise(name: str, parts: Tensors) -> torch.Tensor:
    """float32 (N, K): the weight that `QUANTISE[name]` or `to_mxfp4` gave `parts` for, by the end of their names."""
    if name in ONLINE:
        return parts["weight"].float()
    if name == "gptq":
        codes, scales = unpack(parts["qweight"], 4, 0).float() - 8, parts["scales"].float()
        return (codes * scales.repeat_interleave(GROUP, 0)).T
    if name == "awq":
        zeros = unpack_awq(parts["qzeros"]).repeat_interleave(GROUP, 0)
        return ((unpack_awq(parts["qweight"]) - zeros).float() * parts["scales"].float().repeat_interleave(GROUP, 0)).T
    if name == "w4a16":
        scales = parts["weight_scale"].float()
        return (unpack(parts["weight_packed"], 4, 1).float() - 8) * scales.repeat_interleave(GROUP, 1)
    if name == "fp8-block":
        scales = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return parts["weight"].float() * scales
    if name == "nvfp4":
        scales = parts["weight_scale"].float() * parts["weight_scale_2"]
        return _from_nibbles(parts["weight"]) * scales.repeat_interleave(16, 1)
    if name == "mxfp4":
        scales = torch.exp2(parts["scales"].float() - 127)
        return (_from_nibbles(parts["blocks"]) * scales.unsqueeze(-1)).flatten(-2)
    return parts["weight"].float() * parts["weight_scale"].float()


def _from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return FP4_VALUES[codes.long()]
