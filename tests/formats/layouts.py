"""Where every byte of an expert is after vLLM's post-processing, and after the plugin's take-over: without a GPU.

For each quantised format and each of vLLM's MoE backends, behind `fake_gpu`: vLLM's own layer makes its tensors, random
bytes fill them, and vLLM's own post-processing gives them the layout that the kernel reads. Then the plugin takes the
layer over, experts are laid into other rows, and every tensor that can be reached must show each expert, byte for byte,
in the row that was given to it. What can be reached is found in another way than the plugin's: by the garbage
collector.

`make formats` runs `python -m formats.layouts all FOLDER` on what `offered.py` has put there, and adds what came out to
`benchmarks/results/formats.json`. `one CAPABILITY` asks the vLLM that is in PYTHONPATH, about all formats or those that
are named behind it. The last line of what either prints is JSON.
"""

import contextlib
import gc
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from formats.offered import any_model, ask_all, gpt_oss, moe_config, store
from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.row_space import SharedRows
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError, check_weights_are_among, find_expert_tensors
from vllm_expert_prefetch.serving.refusals import check_kernel, check_layer_refusals
from vllm_expert_prefetch.serving.takeover import replace_rows, verify_rows

CAPABILITIES = (80, 90, 100)
FOUND, REFUSED, NOT_BUILT = "rows found", "refused: ", "vLLM: "
"""How an outcome begins: anything else is a fault."""
NUM_EXPERTS, _NUM_SLOTS = 13, 4
"""No other size of a layer is a multiple of 13: a dimension that is one has experts in it."""
_NOT_ON_CUDA = "aiter"
"""A backend that only a format's method takes that does not look at the backend."""
_LAYER = "model.layers.0.mlp.experts"


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _bits(num_bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "dynamic": False, "strategy": strategy, **more}


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "group_size": 16,
        "kv_cache_quant_algo": None,
        "ignore": ["lm_head"],
    }


def _quark(dtype: str, scheme: dict[str, Any]) -> dict[str, Any]:
    tensor = {"dtype": dtype, "symmetric": None, "ch_axis": -1, "scale_type": "float", **scheme}
    layer = {"weight": tensor, "input_tensors": {**tensor, "is_dynamic": "group_size" in scheme}}
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
        "global_quant_config": {**layer, "output_tensors": None, "bias": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
    }


def _gptq(bits: int) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 128, "desc_act": False, "sym": True}


_FP8_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_NVFP4 = _bits(4, "float", "tensor_group", group_size=16)
_MX = {"group_size": 32, "scale_dtype": "torch.uint8"}
_PER_TOKEN = {"dynamic": True}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8 in blocks of 128": ("fp8", _FP8_BLOCK),
    "FP8 in blocks of 128 (compressed-tensors)": (
        "compressed-tensors",
        _compressed(
            "float-quantized",
            _bits(8, "float", "block", block_structure=[128, 128]),
            _bits(8, "float", "group", group_size=128) | _PER_TOKEN,
        ),
    ),
    "FP8 per channel (compressed-tensors)": (
        "compressed-tensors",
        _compressed("float-quantized", _bits(8, "float", "channel"), _bits(8, "float", "token") | _PER_TOKEN),
    ),
    "FP8 per tensor (compressed-tensors)": (
        "compressed-tensors",
        _compressed("float-quantized", _bits(8, "float", "tensor"), _bits(8, "float", "tensor")),
    ),
    "FP8 per tensor, static inputs": ("fp8", {"quant_method": "fp8", "activation_scheme": "static"}),
    "FP8 per tensor, dynamic inputs": ("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "FP8 per tensor (ModelOpt)": ("modelopt", _modelopt("FP8")),
    "MXFP8 (ModelOpt)": ("modelopt_mxfp8", _modelopt("MXFP8")),
    "MXFP8 (compressed-tensors)": (
        "compressed-tensors",
        _compressed("mxfp8-quantized", _bits(8, "float", "group", **_MX), _bits(8, "float", "group", **_MX)),
    ),
    "INT8 weights and inputs": (
        "compressed-tensors",
        _compressed("int-quantized", _bits(8, "int", "channel"), _bits(8, "int", "token") | _PER_TOKEN),
    ),
    "INT8 weights (compressed-tensors)": (
        "compressed-tensors",
        _compressed("pack-quantized", _bits(8, "int", "group", group_size=128)),
    ),
    "INT8 weights (GPTQ)": ("auto_gptq", _gptq(8)),
    "INT4 (compressed-tensors)": (
        "compressed-tensors",
        _compressed("pack-quantized", _bits(4, "int", "group", group_size=128)),
    ),
    "INT4 with zero points (compressed-tensors)": (
        "compressed-tensors",
        _compressed("pack-quantized", _bits(4, "int", "group", group_size=128) | {"symmetric": False}),
    ),
    "INT4 weights, FP8 inputs (compressed-tensors)": (
        "compressed-tensors",
        _compressed(
            "pack-quantized", _bits(4, "int", "group", group_size=128), _bits(8, "float", "token") | _PER_TOKEN
        ),
    ),
    "INT4 (GPTQ)": ("auto_gptq", _gptq(4)),
    "INT4 (AWQ)": ("auto_awq", _AWQ),
    "INT4 (AutoRound)": (
        "inc",
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "data_type": "int",
            "packing_format": "auto_round:auto_gptq",
        },
    ),
    "INT4 (GPTQ), moe_wna16": ("moe_wna16", _gptq(4)),
    "INT4 (AWQ), moe_wna16": ("moe_wna16", _AWQ),
    "MXFP4 (gpt-oss)": ("gpt_oss_mxfp4", {"quant_method": "mxfp4"}),
    "MXFP4": ("mxfp4", {"quant_method": "mxfp4"}),
    "MXFP4 (DeepSeek-V4)": ("deepseek_v4_fp8", _FP8_BLOCK),
    "MXFP4 (fp8 with `store_dtype`)": ("fp8", {**_FP8_BLOCK, "store_dtype": "mxfp4"}),
    "MXFP4 (compressed-tensors)": (
        "compressed-tensors",
        _compressed("mxfp4-pack-quantized", _bits(4, "float", "group", **_MX)),
    ),
    "NVFP4, inputs too": ("modelopt_fp4", _modelopt("NVFP4")),
    "NVFP4, inputs too (compressed-tensors)": (
        "compressed-tensors",
        _compressed("nvfp4-pack-quantized", _NVFP4, _NVFP4 | {"dynamic": "local"}),
    ),
    "NVFP4, weights only": ("compressed-tensors", _compressed("nvfp4-pack-quantized", _NVFP4)),
    "NVFP4, weights only (ModelOpt)": ("modelopt_fp4", _modelopt("W4A16_NVFP4")),
    "FP8 per tensor (Quark)": ("quark", _quark("fp8_e4m3", {"qscheme": "per_tensor", "is_dynamic": False})),
    "MXFP4, inputs too (Quark)": (
        "quark",
        _quark("fp4", {"qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}),
    ),
    "INT8, quantised while loading": ("experts_int8", {"quant_method": "experts_int8"}),
    "FP8 per tensor, made while loading": ("fp8_per_tensor", {}),
    "FP8 in blocks of 128, made while loading": ("fp8_per_block", {}),
    "FP8 per channel, made while loading": ("fp8_per_channel", {}),
    "INT8 weights, made while loading": ("int8_per_channel_weight_only", {}),
    "MXFP8, made while loading": ("mxfp8", {}),
    "MXFP4, made while loading": ("mxfp4", {}),
}
"""name -> (vLLM's name of the method, the checkpoint's quantization_config: none where vLLM quantises)."""

TRIED = {
    "FP8 in blocks of 128": ("fp8-block", "fp8-block"),
    "FP8 per channel (compressed-tensors)": ("fp8-channel", "fp8-channel"),
    "FP8 per tensor, static inputs": ("fp8-static", "fp8-static"),
    "FP8 per tensor, dynamic inputs": ("fp8-dynamic", "fp8-dynamic"),
    "INT8 weights and inputs": ("int8", "int8"),
    "INT8 weights (compressed-tensors)": ("", "int8-weights"),
    "INT4 (compressed-tensors)": ("w4a16", "int4-weights"),
    "INT4 with zero points (compressed-tensors)": ("", "int4-weights-zeros"),
    "INT4 (GPTQ)": ("gptq", ""),
    "INT4 (AWQ)": ("awq", ""),
    "MXFP4 (gpt-oss)": ("mxfp4", ""),
    "NVFP4, inputs too": ("nvfp4", ""),
    "FP8 per tensor, made while loading": ("online-fp8", ""),
    "FP8 in blocks of 128, made while loading": ("online-fp8-block", ""),
    "FP8 per channel, made while loading": ("online-fp8-channel", ""),
    "INT8 weights, made while loading": ("online-int8", ""),
    "MXFP8, made while loading": ("online-mxfp8", ""),
    "MXFP4, made while loading": ("online-mxfp4", ""),
}
"""name -> its checkpoint (`checkpoints.py`), which the engine serves; and its kernel in Triton (`triton_rows.py`)."""


def ask(capability: int, names: list[str]) -> dict[str, dict[str, str]]:
    """Of the vLLM in PYTHONPATH: format -> backend -> outcome, of the backends that vLLM offers for the format."""
    from formats import fake_gpu

    fake_gpu.pretend(capability)
    _run_without_cuda()
    from vllm.config.kernel import MoEBackend

    backends = [name for name in get_args(MoEBackend) if name != "auto"]  # which is one of the others
    torch.manual_seed(0)
    found: dict[str, dict[str, str]] = {}
    with any_model():
        for name in names or FORMATS:
            found[name] = {}
            for backend in backends:
                try:
                    layer = make_layer(name, backend)
                except (ValueError, NotImplementedError):
                    continue
                except Exception as error:
                    found[name][backend] = NOT_BUILT + _said(error)
                else:
                    found[name][backend] = outcome_of(layer)
                print(f"{name}, {backend}: {found[name][backend]}", flush=True)
            if _NOT_ON_CUDA in found[name]:
                found[name] = {"any": found[name][_NOT_ON_CUDA]}
    return found


def _run_without_cuda() -> None:
    """What stands between vLLM's post-processing and a machine without CUDA, and moves no byte of a weight."""
    import pytest
    import vllm.distributed.parallel_state as parallel

    from formats import standins

    standins.install_operators(pytest.MonkeyPatch())
    parallel._TP = types.SimpleNamespace(world_size=1, rank_in_group=0)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def make_layer(name: str, backend: str) -> Any:
    """vLLM's layer of routed experts of format `name`. Raises what vLLM does where it does not offer the backend."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization import get_quantization_config

    quantization, given = FORMATS[name]
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "num_logical_experts"), NUM_EXPERTS)
    sizes |= {"hidden_dim": 512, "intermediate_size": 256, "experts_per_token": 2}
    differs = {**(gpt_oss() if quantization == "gpt_oss_mxfp4" else {}), **sizes}
    experts = types.SimpleNamespace(
        local_num_experts=NUM_EXPERTS,
        placement_strategy="linear",
        expert_map=None,
        expert_mask=None,
        routing_tables=None,
    )
    quant_config = get_quantization_config(quantization).from_config(given) if given else _online(quantization)
    config = moe_config(**differs, moe_backend=backend)
    return RoutedExperts(_LAYER, torch.bfloat16, config, quant_config, expert_map_manager=experts)


def _online(name: str) -> Any:
    from vllm.config.quantization import _ONLINE_SHORTHANDS
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    if name not in _ONLINE_SHORTHANDS:
        raise ValueError(f"this release of vLLM does not make {name} while it loads")
    return OnlineQuantizationConfig(_ONLINE_SHORTHANDS[name])


def outcome_of(layer: Any) -> str:
    """What becomes of a new layer: see FOUND, REFUSED and NOT_BUILT."""
    method = layer.quant_method
    try:
        check_layer_refusals(_LAYER, method)
        _fill(layer)
        try:
            method.process_weights_after_loading(layer)
        except Exception as error:  # whatever is said by a library that is not there
            print(f"not post-processed here: {_said(error)}")
            method.moe_kernel = types.SimpleNamespace(fused_experts=object.__new__(method.experts_cls))
            check_kernel(_LAYER, method)
            return NOT_BUILT + _said(error)
        check_kernel(_LAYER, method)
        return find_rows(layer)
    except (ConfigError, TakeoverError) as error:
        return REFUSED + re.split(r": | \(layer ", str(error).removeprefix(f"{CONFIG_KEY}: "))[0]


def _fill(layer: torch.nn.Module) -> None:
    """With random bytes; scales with positive numbers, in floating point of another magnitude for each expert.

    So no two rows are equal, whatever vLLM makes of them.
    """
    for name, parameter in list(layer.named_parameters()):
        if parameter.is_meta:  # vLLM has them made when all of a layer's weights are read
            parameter = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            layer.register_parameter(name, parameter)
        if name.endswith("weight_shape"):
            parameter.data.fill_(512)
        elif parameter.is_floating_point() and parameter.element_size() > 1:
            magnitude = (1.5 ** -torch.arange(NUM_EXPERTS)).to(parameter.dtype)
            parameter.data.uniform_(1, 1.2).mul_(magnitude.view(-1, *[1] * (parameter.dim() - 1)))
        else:
            low, high = (100, 126) if "scale" in name else (0, 256)
            as_bytes = torch.randint(low, high, (parameter.nbytes,), dtype=torch.uint8)
            parameter.data.copy_(as_bytes.view(parameter.dtype).view(parameter.shape))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:150]}".splitlines()[0]


def find_rows(layer: Any) -> str:
    """Take a post-processed layer over as `CachedRoutedExperts` does, lay every expert into another row, and look.

    The outcome: FOUND and the names of its expert tensors, or what is wrong. Raises TakeoverError.
    """
    found = find_expert_tensors(layer, NUM_EXPERTS)
    check_weights_are_among(layer, found)
    before = {id(tensor): tensor.clone() for _, tensor in reached(layer)}
    host = HostStore({name: tensor.rows for name, tensor in found.items()}, HostMemoryOptions())
    rows = SharedRows(host.views, _NUM_SLOTS).row_space(0)
    replace_rows(layer, found, rows)
    verify_rows(layer, found, NUM_EXPERTS)
    row_of = [(expert + 3) % NUM_EXPERTS for expert in range(NUM_EXPERTS)]
    for name, view in host.views.items():
        for expert, row in enumerate(row_of):
            rows[name][row].copy_(view[expert])
    wrong = []
    for path, tensor in reached(layer):
        what = _wrong(before.get(id(tensor)), tensor, row_of)
        if what:
            wrong.append(f"{path} {what}")
    for name, view in host.views.items():
        if len({_bytes(row) for row in view}) < NUM_EXPERTS:
            wrong.append(f"{name} has equal rows, which show nothing")
    return f"fault: {', '.join(wrong)}" if wrong else f"{FOUND}: {', '.join(found)}"


def reached(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that Python can reach from `layer`, through objects of any kind but classes, modules and globals."""
    pending: list[tuple[str, Any]] = [("layer", layer)]
    seen: set[int] = set()
    while pending:
        path, value = pending.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.numel():
            yield path, value
        if isinstance(value, types.FunctionType):
            pending += [(path, value.__closure__), (path, value.__defaults__), (path, value.__dict__)]
        elif isinstance(value, dict):
            pending += [(f"{path}.{key}", item) for key, item in value.items()]
        else:
            pending += [(path, item) for item in gc.get_referents(value)]


def _wrong(before: torch.Tensor | None, now: torch.Tensor, row_of: list[int]) -> str:
    """What is wrong with a tensor that was `before` when each expert was in its own row; "" for nothing."""
    if before is None:
        return "is new"
    if now.dim() and len(now) == len(row_of):
        is_moved = all(_bytes(now[row]) == _bytes(before[expert]) for expert, row in enumerate(row_of))
        return "" if is_moved else "does not show each expert in its row"
    if any(size % len(row_of) == 0 for size in now.shape):
        return f"{tuple(now.shape)} has experts in it, and not a row for each"
    return "" if _bytes(now) == _bytes(before) else "has changed"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def main() -> None:
    """See the module."""
    if sys.argv[1] == "one":
        with contextlib.redirect_stdout(sys.stderr):
            answers = ask(int(sys.argv[2]), sys.argv[3:])
        print(json.dumps(answers))
        return
    found = ask_all(Path(sys.argv[2]), "formats.layouts", CAPABILITIES)
    store("layouts", found)
    print(json.dumps(counts(found)))


def counts(found: dict[str, Any]) -> dict[str, int]:
    """How many combinations came out how, and in how many tensors the rows of the proved ones were found."""
    outcomes = [
        outcome
        for gpus in found.values()
        for formats in gpus.values()
        for backends in formats.values()
        for outcome in backends.values()
    ]
    proved, refused, not_built = (
        [outcome for outcome in outcomes if outcome.startswith(kind)] for kind in (FOUND, REFUSED, NOT_BUILT)
    )
    return {
        "asked": len(outcomes),
        "proved": len(proved),
        "tensors": sum(outcome.count(",") + 1 for outcome in proved),
        "refused": len(refused),
        "not built": len(not_built),
        "faults": len(outcomes) - len(proved) - len(refused) - len(not_built),
    }


if __name__ == "__main__":
    main()
