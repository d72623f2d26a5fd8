"""Which backend is chosen for a format, against what vLLM offers for it (0.26 and 0.33, its own tables)."""

from types import SimpleNamespace

import pytest
from formats.checkpoints import CONFIGS, ONLINE
from vllm.config.quantization import resolve_quantization_config

from vllm_expert_prefetch.cli import doctor
from vllm_expert_prefetch.serving import backends, compat
from vllm_expert_prefetch.serving.backends import backend_for, choose_backend

VLLM_NAMES = {
    "gptq": "auto_gptq",
    "awq": "auto_awq",
    "w4a16": "compressed-tensors",
    "fp8-channel": "compressed-tensors",
    "int8": "compressed-tensors",
    "fp8-static": "fp8",
    "fp8-dynamic": "fp8",
    "fp8-block": "fp8",
    "nvfp4": "modelopt_fp4",
    "mxfp4": "gpt_oss_mxfp4",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_format_gets_a_backend_that_reads_rows(name, capability):
    eight_bits = name.startswith("fp8")
    expected = "triton" if name == "int8" or (eight_bits and capability >= 89) else "marlin"
    assert backend_for(VLLM_NAMES[name], CONFIGS[name], capability) == expected


@pytest.mark.parametrize(
    ("quantization", "backend"),
    [
        (None, "triton"),
        ("moe_wna16", "triton"),
        ("experts_int8", "triton"),
        ("modelopt", "triton"),
        ("quark", "marlin"),
    ],
)
def test_formats_without_a_test_checkpoint(quantization, backend):
    assert backend_for(quantization, {}, 90) == backend


@pytest.mark.parametrize("name", ONLINE.values())
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("by_name", [True, False])
def test_what_vllm_makes_while_loading_gets_a_backend_that_reads_rows(monkeypatch, name, capability, by_name):
    """Asked for by its own name (`--quantization`), or for experts alone (`--quantization-config`)."""
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: True)
    monkeypatch.setattr(backends.compat, "compute_capability", lambda: capability)
    vllm_config = config("auto", name if by_name else "online")
    vllm_config.model_config.hf_config = SimpleNamespace()
    vllm_config.model_config.quantization_config = resolve_quantization_config(
        name if by_name else "online", None if by_name else {"moe": name}
    )
    eight_bits = name.startswith("fp8") and capability >= 89
    assert choose_backend(vllm_config) == ("triton" if eight_bits or name.startswith("int8") else "marlin")


def config(moe_backend, quantization="auto_gptq"):
    hf = SimpleNamespace(quantization_config=CONFIGS["gptq"])
    model = SimpleNamespace(quantization=quantization, hf_config=hf, hf_text_config=SimpleNamespace())
    return SimpleNamespace(model_config=model, kernel_config=SimpleNamespace(moe_backend=moe_backend))


@pytest.mark.parametrize(
    ("on_gpu", "asked", "chosen"), [(True, "auto", "marlin"), (True, "triton", None), (False, "auto", None)]
)
def test_only_what_nobody_asked_for_is_chosen(monkeypatch, on_gpu, asked, chosen):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: on_gpu)
    monkeypatch.setattr(backends.compat, "compute_capability", lambda: 90)
    vllm_config = config(asked)
    assert choose_backend(vllm_config) == chosen
    assert vllm_config.kernel_config.moe_backend == (chosen or asked)


@pytest.mark.parametrize(("capability", "fp8"), [(80, "marlin"), (89, "triton"), (100, "triton")])
def test_doctor_shows_what_is_chosen_for_the_formats(monkeypatch, capability, fp8):
    assert backends.served_formats(capability) == {
        "unquantised": "triton",
        "FP8": fp8,
        "INT8": "triton",
        "INT4": "marlin",
        "MXFP4": "marlin",
        "NVFP4": "marlin",
    }
    monkeypatch.setattr(compat, "on_cpu_platform", lambda: False)
    monkeypatch.setattr(compat, "compute_capability", lambda: capability)
    report = doctor.examine()
    assert report["formats"] == backends.served_formats(capability)
    assert f"experts served         unquantised (triton), FP8 ({fp8}), " in doctor._as_text(report)
