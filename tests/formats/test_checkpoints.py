"""The test checkpoints stand for the weights that they were made of, and the documentation lists them."""

import json

import pytest
import torch
from doc_tables import backends_table, documented, formats_table

from formats.checkpoints import CASES, CONFIGS, ONLINE, QUANTISE, dequantise, to_mxfp4
from formats.layouts import TRIED
from formats.offered import CAPABILITIES, NAMES, RESULT, VERSIONS
from vllm_expert_prefetch.serving.backends import backend_for
from vllm_expert_prefetch.serving.refusals import KERNELS


@pytest.mark.parametrize(("name", "error"), [(name, 0.05 if "8" in name else 0.13) for name in CONFIGS])
def test_a_weight_comes_back_as_well_as_its_bits_allow(name, error):
    weight = torch.rand((256, 128), generator=torch.Generator().manual_seed(0)) - 0.4
    if name == "mxfp4":
        parts = dict(zip(("blocks", "scales"), to_mxfp4(weight), strict=True))
    else:
        parts = QUANTISE[name](weight)
    restored = dequantise(name, parts)
    assert restored.shape == weight.shape
    assert (restored - weight).norm() / weight.norm() < error


def test_every_choice_is_offered_by_vllm_and_served():
    """As `make formats` found them, on every GPU and version: kernels that read rows, whatever vLLM's default is."""
    answers = [
        (version, capability, name, answer)
        for version, gpus in json.loads(RESULT.read_text())["versions"].items()
        for capability, formats in gpus.items()
        for name, answer in formats.items()
    ]
    assert len(answers) == len(VERSIONS) * len(CAPABILITIES) * len(NAMES)
    for version, capability, name, answer in answers:
        where = f"{name}, vLLM {version}, {capability}: run make formats"
        assert answer["chosen"] == backend_for(*NAMES[name], int(capability)), where
        assert answer["kernel"] in KERNELS, where
    assert documented("backends") == backends_table(), "python tests/doc_tables.py brings it up to date"


def test_every_format_is_tried_and_documented():
    assert (
        {name for name, _ in CASES}
        == set(CONFIGS) | set(ONLINE)
        == {checkpoint for checkpoint, _ in TRIED.values()} - {""}
    )
    assert documented("formats") == formats_table(), "python tests/doc_tables.py brings it up to date"
