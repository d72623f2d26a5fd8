"""Bytes of one expert in each format that the plugin serves, as the kernels read it on a GPU.

Tensors as vLLM's methods create and post-process them; Qwen3-30B-A3B's records were read from vLLM's own code
(tests/planning/test_formats.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.planning.architecture import Architecture, text_config

FORMATS = {
    "bf16": "16 bits, not quantised",
    "fp8": "FP8 in blocks of 128 x 128",
    "fp8-channel": "FP8, a scale per row",
    "int8": "INT8, a scale per row",
    "int4": "INT4 of compressed-tensors, groups of 128",
    "int4-g32": "INT4 of compressed-tensors, groups of 32",
    "gptq-int4": "INT4 of GPTQ or AWQ, groups of 128, zero points",
    "mxfp4": "FP4, a scale per 32",
    "nvfp4": "FP4, a scale per 16 and one per tensor",
}
"""Names -> what they mean."""
_FP8_CAPABILITY = 89
"""Below it FP8 goes through Marlin, whose scales are expanded along the rows (serving/backends.py)."""
_BLOCK = 128
_MARLIN_HIDDEN, _MARLIN_INTERMEDIATE = 256, 128
"""What MXFP4 is padded to for Marlin."""


@dataclass(frozen=True)
class Matrix:
    """`rows` x `columns` numbers; products run over the columns."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Numbers."""
        return self.rows * self.columns


def row_bytes(name: str, model: Architecture, num_shards: int = 1, capability: int = 90) -> tuple[int, ...]:
    """Bytes of one expert in each of its tensors. `num_shards`: tensor-parallel ranks, by which it can be divided."""
    hidden, intermediate = model.expert_hidden, model.expert_intermediate
    intermediate //= num_shards
    if name == "mxfp4":
        hidden = -(-hidden // _MARLIN_HIDDEN) * _MARLIN_HIDDEN
        intermediate = -(-intermediate // _MARLIN_INTERMEDIATE) * _MARLIN_INTERMEDIATE
    first = Matrix(intermediate * (2 if model.is_gated else 1), hidden)
    second = Matrix(hidden, intermediate)
    of_first, of_second = _tensors(name, first, capability), _tensors(name, second, capability)
    biases = (2 * first.rows, 2 * second.rows) if model.has_bias else ()
    return (*of_first, *of_second, *biases)


def _tensors(name: str, matrix: Matrix, capability: int) -> tuple[int, ...]:
    """Weights and what scales them."""
    size, rows, columns = matrix.size, matrix.rows, matrix.columns
    if name == "bf16":
        return (2 * size,)
    if name == "fp8" and capability < _FP8_CAPABILITY:
        return size, 2 * rows * -(-columns // _BLOCK)
    if name == "fp8":
        return size, 4 * -(-rows // _BLOCK) * -(-columns // _BLOCK)
    if name in ("fp8-channel", "int8"):
        return size, 4 * rows
    group = {"int4-g32": 32, "mxfp4": 32, "nvfp4": 16}.get(name, 128)
    groups = rows * -(-columns // group)
    if name == "mxfp4":
        return size // 2, groups
    if name == "nvfp4":
        return size // 2, groups, 4
    zero_points = (groups // 2,) if name == "gptq-int4" else ()
    return (size // 2, 2 * groups, *zero_points)


def format_of(config: Mapping[str, Any]) -> str:
    """Of a checkpoint, from its config.json. Raises ConfigError for one that is not known."""
    text = text_config(config)
    if text.get("expert_dtype") == "fp4":
        return "mxfp4"
    given = text.get("quantization_config") or config.get("quantization_config")
    if not given:
        return "bf16"
    name = _named(given)
    if name is None:
        raise ConfigError(
            f"quantization_config of {given.get('quant_method', 'no method')} is not known to plan: say how its "
            f"experts are stored, --quantization {' | '.join(FORMATS)}"
        )
    return name


def _named(given: Mapping[str, Any]) -> str | None:
    method = str(given.get("quant_method", "")).lower()
    if method == "fp8":
        return "fp8" if given.get("weight_block_size") else "fp8-channel"
    if method in ("gptq", "awq", "auto-round"):
        return "gptq-int4" if given.get("bits", given.get("w_bit")) == 4 else None
    if method == "mxfp4":
        return "mxfp4"
    if method == "modelopt":
        algorithm = str(given.get("quant_algo") or given.get("quantization", {}).get("quant_algo"))
        return {"NVFP4": "nvfp4", "FP8": "fp8-channel", "MIXED_PRECISION": "nvfp4"}.get(algorithm)
    if method != "compressed-tensors":
        return None
    groups = list((given.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if groups else {}
    if "mxfp4" in str(groups and groups[0].get("format")):
        return "mxfp4"
    kind, bits, group = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    if (kind, bits) == ("int", 4):
        return {32: "int4-g32", 128: "int4"}.get(group or 128)
    named = {("float", 8): "fp8-channel", ("int", 8): "int8", ("float", 4): "nvfp4"}
    return ("fp8" if weights.get("strategy") == "block" else None) or named.get((str(kind), bits or 0))


def other_bytes_per_parameter(name: str) -> int:
    """Of attention and dense layers: FP8 and INT8 checkpoints quantise these too, 4-bit ones mostly do not."""
    return 1 if name in ("fp8", "fp8-channel", "int8") else 2
