"""Every byte of an expert is found again after the take-over: what `make formats` saw, and that it can see a fault."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from doc_tables import documented, formats_table
from torch import nn

from formats.layouts import CAPABILITIES, FORMATS, FOUND, NOT_BUILT, NUM_EXPERTS, REFUSED, counts, find_rows
from formats.offered import RESULT, ROOT, VERSIONS
from vllm_expert_prefetch.serving.backends import backend_for

LAYOUTS = json.loads(RESULT.read_text())["layouts"]
NUM_PROVED = 246
"""Combinations: fewer would be a loss of something that was served."""
NEVER = {"INT4 weights, FP8 inputs (compressed-tensors)", "MXFP8, made while loading", "MXFP4, made while loading"}
"""Formats for which vLLM has neither Marlin nor Triton, and what only a GPU's kernels make (see `test_engine.py`)."""
NOT_THERE = {
    "INT4 (GPTQ), moe_wna16": [("0.26.0", capability) for capability in CAPABILITIES],
    "INT4 (AWQ), moe_wna16": [("0.26.0", capability) for capability in CAPABILITIES],
    "MXFP4, inputs too (Quark)": [("0.26.0", capability) for capability in CAPABILITIES],
    "MXFP4 (compressed-tensors)": [(version, 100) for version in VERSIONS],
    "FP8 per channel, made while loading": [(version, 80) for version in VERSIONS],
}


def test_make_formats_saw_no_fault():
    found = counts(LAYOUTS)
    assert found["faults"] == 0
    assert found["proved"] >= NUM_PROVED
    assert list(LAYOUTS) == list(VERSIONS)
    for gpus in LAYOUTS.values():
        assert list(gpus) == [str(capability) for capability in CAPABILITIES], "run make formats"
        assert all(list(formats) == list(FORMATS) for formats in gpus.values()), "run make formats"
    assert documented("formats") == formats_table(), "python tests/doc_tables.py brings it up to date"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_rows_of_whatever_the_plugin_chooses_were_found(version, capability):
    for name in FORMATS:
        outcomes = LAYOUTS[version][str(capability)][name]
        chosen = outcomes.get(backend_for(*FORMATS[name], capability), outcomes.get("any", ""))
        is_out = name in NEVER or (version, capability) in NOT_THERE.get(name, [])
        assert chosen.startswith(FOUND) != is_out, f"{name}: {chosen}"


def test_other_backends_are_refused_by_name():
    others = [
        outcome
        for gpus in LAYOUTS.values()
        for formats in gpus.values()
        for backends in formats.values()
        for backend, outcome in backends.items()
        if backend not in ("marlin", "triton", "any")
    ]
    assert all(outcome.startswith((REFUSED, NOT_BUILT)) for outcome in others)
    kernels = {outcome.partition("with the kernel ")[2].partition(" ")[0] for outcome in others}
    assert kernels > {
        "HummingIndexedExperts",
        "TritonOrCutlassExperts",
        "CutlassExpertsFp4",
        "TritonOrDeepGemmExperts",
        "FlashInferExperts",
        "UnfusedOAITritonExperts",
    }
    assert f"{REFUSED}kernels that contain the router (monolithic) (--moe-backend) is not supported" in others


class Holder:
    """Stands for vLLM's quant method, or for an object of a library that the plugin does not know."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


class Layer(nn.Module):
    layer_name = "model.layers.0.mlp.experts"

    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.randn(NUM_EXPERTS, 6, 8), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.randn(NUM_EXPERTS, 8, 3), requires_grad=False)
        self.quant_method: Any = Holder(weights=(self.w13_weight, self.w2_weight), common_scale=torch.tensor(0.5))


def test_the_rows_of_a_layer_are_found():
    assert find_rows(Layer()) == f"{FOUND}: w13_weight, w2_weight"


@pytest.mark.parametrize(
    "hide",
    [
        lambda scale: Holder(scale=scale),
        lambda scale: [lambda: scale],
        lambda scale: Holder(scale=scale.T),
        lambda scale: Holder(scale=scale.view(1, -1)),
    ],
    ids=["in an object", "in a function", "experts last", "experts in a row"],
)
def test_a_tensor_that_discovery_does_not_see_is_a_fault(hide):
    layer = Layer()
    layer.quant_method.held = hide(torch.rand(NUM_EXPERTS, 3))
    assert find_rows(layer).startswith("fault: ")


def test_rows_that_are_equal_show_nothing():
    layer = Layer()
    layer.w2_weight.data[5] = layer.w2_weight.data[9]
    assert find_rows(layer) == "fault: w2_weight has equal rows, which show nothing"


@pytest.mark.slow
def test_the_installed_vllm_too():
    names = ["INT8 weights and inputs", "INT4 (AWQ)"]
    done = subprocess.run(
        [sys.executable, "-m", "formats.layouts", "one", "90", *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    int8, awq = json.loads(done.stdout.splitlines()[-1]).values()
    assert int8["triton"] == f"{FOUND}: w13_weight, w2_weight, w13_weight_scale, w2_weight_scale"
    assert awq["marlin"] == f"{FOUND}: w13_qweight, w2_qweight, w13_scales, w2_scales, w13_qzeros, w2_qzeros"
    assert awq["emulation"].startswith(REFUSED)
