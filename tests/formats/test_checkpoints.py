"""The test checkpoints stand for the weights that they were made of, and the documentation lists them."""

import pytest
import torch
from doc_tables import documented, formats_table

from formats.checkpoints import CASES, CONFIGS, PUBLISHED, QUANTISE, dequantise, to_mxfp4


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


def test_every_format_is_tried_and_documented():
    assert {name for name, _ in CASES} == set(CONFIGS) == set(PUBLISHED)
    assert documented("formats") == formats_table(), "python tests/doc_tables.py brings it up to date"
