"""What vLLM's CUDA builds offer for each format on each GPU, and what the plugin chooses: asked without a GPU.

`make formats` runs `python -m formats.offered all FOLDER`. It takes the wheels of VERSIONS apart in FOLDER (their
Python files; half a gigabyte to download), asks each behind `fake_gpu`, and writes `benchmarks/results/formats.json`.
`doc_tables.py` makes the table in docs/compatibility.md of it. `one CAPABILITY` asks the vLLM that is in PYTHONPATH.
The last line of what either prints is JSON.
"""

import contextlib
import json
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "formats.json"
VERSIONS = ("0.26.0", "0.33.0")
CAPABILITIES = (80, 86, 89, 90, 100, 120)
BESIDE = ("triton", "humming-kernels==0.1.19")
"""What the wheels import: needed as files, never run."""

# name -> (vLLM's name of the method, the quantization_config as far as the plugin looks)
_INPUTS_TOO = {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8}}
_INT8_TOO = {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"num_bits": 8}}
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8 in blocks of 128": ("fp8", {}),
    "FP8 per channel (compressed-tensors)": ("compressed-tensors", {"config_groups": {"0": _INPUTS_TOO}}),
    "FP8 per tensor, static inputs": ("fp8", {}),
    "FP8 per tensor, dynamic inputs": ("fp8", {}),
    "INT8 weights and inputs": ("compressed-tensors", {"config_groups": {"0": _INT8_TOO}}),
    "INT4 (compressed-tensors)": ("compressed-tensors", {"config_groups": {"0": {"weights": {"num_bits": 4}}}}),
    "INT4 (GPTQ)": ("auto_gptq", {}),
    "INT4 (AWQ)": ("auto_awq", {}),
    "INT8 weights (GPTQ)": ("auto_gptq", {}),
    "MXFP4 (gpt-oss)": ("gpt_oss_mxfp4", {}),
    "NVFP4, inputs too": ("modelopt_fp4", {}),
    "NVFP4, weights only": ("compressed-tensors", {"config_groups": {"0": {"weights": {"num_bits": 4}}}}),
}


def selectors() -> dict[str, tuple[Callable[[Any], Any], dict[str, Any]]]:
    """For each of NAMES: vLLM's own choice for a layer's configuration, and how that differs from the usual layer."""
    import vllm.model_executor.layers.quantization.utils.quant_utils as keys
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, mxfp4, nvfp4

    found: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
        "FP8 in blocks of 128": (
            lambda c: fp8.select_fp8_moe_backend(c, keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym),
            {},
        ),
        "FP8 per channel (compressed-tensors)": (
            lambda c: fp8.select_fp8_moe_backend(
                c, keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym, allow_vllm_cutlass=True
            ),
            {},
        ),
        "FP8 per tensor, static inputs": (
            lambda c: fp8.select_fp8_moe_backend(c, keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
            {},
        ),
        "FP8 per tensor, dynamic inputs": (
            lambda c: fp8.select_fp8_moe_backend(c, keys.kFp8StaticTensorSym, keys.kFp8DynamicTensorSym),
            {},
        ),
        "INT8 weights and inputs": (
            lambda c: int8.select_int8_moe_backend(c, keys.kInt8StaticChannelSym, keys.kInt8DynamicTokenSym),
            {},
        ),
        "MXFP4 (gpt-oss)": (mxfp4.select_mxfp4_moe_backend, gpt_oss()),
        "NVFP4, inputs too": (
            lambda c: nvfp4.select_nvfp4_moe_backend(c, keys.kNvfp4Static, keys.kNvfp4Dynamic),
            {},
        ),
        "NVFP4, weights only": (lambda c: nvfp4.select_nvfp4_moe_backend(c, keys.kNvfp4Static, None), {}),
    }
    for name, (kind, bits) in {
        "INT4 (compressed-tensors)": ("compressed-tensors", 4),
        "INT4 (GPTQ)": ("gptq", 4),
        "INT4 (AWQ)": ("awq", 4),
        "INT8 weights (GPTQ)": ("gptq", 8),
    }.items():
        found[name] = (_weights_only(kind, bits), {})
    return found


def _weights_only(kind: str, bits: int) -> Callable[[Any], Any]:
    import vllm
    import vllm.model_executor.layers.quantization.utils.quant_utils as keys
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16

    key = keys.kInt4Static if bits == 4 else keys.kInt8Static
    if vllm.__version__.startswith("0.26"):
        return lambda c: int_wna16.select_wna16_moe_backend(c, key)
    given: dict[str, Any] = {"bits": bits, "group_size": 128, "quant_method": kind}
    config: Any
    if kind == "awq":
        from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

        config = AutoAWQConfig.from_config({**given, "w_bit": 4, "q_group_size": 128, "zero_point": True})
        key = getattr(keys, "kInt4StaticAsym", key)
    elif kind == "gptq":
        from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

        config = AutoGPTQConfig.from_config({**given, "desc_act": False, "sym": True})
    else:
        from compressed_tensors.quantization import QuantizationArgs

        config = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=128)
    has_zeros, has_bias = kind == "awq", kind == "gptq"
    return lambda c: int_wna16.select_wna16_moe_backend(c, key, config, has_zeros, has_bias, allow_tile_padding=True)


def moe_config(**differs: Any) -> Any:
    """vLLM's configuration of an MoE layer: that of Qwen3-30B-A3B but for what `differs`."""
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    usual = {
        "num_experts": 128,
        "num_local_experts": 128,
        "num_logical_experts": 128,
        "experts_per_token": 8,
        "hidden_dim": 2048,
        "intermediate_size": 768,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.RenormalizeNaive,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": torch.bfloat16,
    }
    return FusedMoEConfig(**{**usual, **differs})


def gpt_oss() -> dict[str, Any]:
    """How a layer of gpt-oss-120b differs."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

    return {
        "experts_per_token": 4,
        "hidden_dim": 2880,
        "intermediate_size": 2880,
        "has_bias": True,
        "activation": MoEActivation.SWIGLUOAI,
        "routing_method": RoutingMethodType.Renormalize,
    }


def any_model() -> contextlib.AbstractContextManager[Any]:
    """Within: vLLM's configuration is that of a model, of which it says no more than its type."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config, given = VllmConfig(), types.SimpleNamespace(model_type="qwen3_moe")
    config.model_config = types.SimpleNamespace(hf_config=given, hf_text_config=given, quantization_config=None)
    return set_current_vllm_config(config)


def ask(capability: int) -> dict[str, dict[str, str]]:
    """Of the vLLM in PYTHONPATH: format -> its default kernel, what the plugin chooses, and the kernel of that."""
    from formats import fake_gpu

    fake_gpu.pretend(capability)
    from vllm_expert_prefetch.serving.backends import backend_for

    answers = {}
    with any_model():
        for name, (select, differs) in selectors().items():

            def kernel_of(backend: str, select: Any = select, differs: Any = differs) -> str:
                try:
                    kernel = select(moe_config(**differs, moe_backend=backend))[1]
                except (ValueError, NotImplementedError) as error:
                    return f"none: {str(error)[:80]}"
                return kernel.__name__ + (" (monolithic)" if kernel.is_monolithic() else "")

            chosen = backend_for(*NAMES[name], capability)
            answers[name] = {"default": kernel_of("auto"), "chosen": chosen, "kernel": kernel_of(chosen)}
    return answers


def ask_all(folder: Path, module: str, capabilities: Iterable[int]) -> dict[str, Any]:
    """What `python -m MODULE one CAPABILITY` prints, of every version and GPU: version -> capability -> answers."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "beside"
    if not beside.exists():
        _pip("install", "--target", str(beside), *BESIDE)
    found: dict[str, dict[str, Any]] = {}
    for version in VERSIONS:
        package = folder / version
        if not package.exists():
            _pip("download", "--dest", str(folder), f"vllm=={version}")
            (wheel,) = folder.glob(f"vllm-{version}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(package, [name for name in archive.namelist() if not name.endswith(".so")])
            wheel.unlink()
        found[version] = {}
        path = [str(package), str(beside), str(ROOT / "tests"), str(ROOT)]
        for capability in capabilities:
            print(f"vLLM {version}, compute capability {capability / 10}", flush=True)
            done = subprocess.run(
                [sys.executable, "-m", module, "one", str(capability)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            found[version][str(capability)] = json.loads(done.stdout.splitlines()[-1])
    return found


def store(key: str, found: dict[str, Any]) -> None:
    """Write one part of the results, and leave the others."""
    others = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**others, "date": date.today().isoformat(), key: found}, indent=1) + "\n")


def _pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "-q", "--no-deps", *arguments], check=True)


def main() -> None:
    """See the module."""
    if sys.argv[1] == "one":
        with contextlib.redirect_stdout(sys.stderr):
            answers = ask(int(sys.argv[2]))
        print(json.dumps(answers))
        return
    found = ask_all(Path(sys.argv[2]), "formats.offered", CAPABILITIES)
    store("versions", found)
    kernels = [answer["kernel"] for gpus in found.values() for formats in gpus.values() for answer in formats.values()]
    refused = sum(kernel.startswith("none") for kernel in kernels)
    print(json.dumps({"asked": len(kernels), "served": len(kernels) - refused, "refused": refused}))


if __name__ == "__main__":
    main()
