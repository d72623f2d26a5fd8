"""vLLM's own Triton MoE kernels give the same bits whichever rows experts are in, in every format that they read.

They run in Triton's interpreter, so that each dot product is numpy's: this shows which rows, scales and zero points a
kernel reads, not the bits of a GPU. The processes that compute are those of `triton_rows.py`.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_expert_prefetch.prediction.fused_router import is_available
from vllm_expert_prefetch.serving.refusals import KERNELS

pytestmark = [
    pytest.mark.skipif(not is_available(), reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU"),
]

TESTS = Path(__file__).resolve().parents[1]
GROUPS = {
    89: ("fp16", "fp8-channel", "fp8-dynamic", "int8"),
    90: ("fp8-block", "fp8-static", "int4-weights", "int4-weights-zeros", "int8-weights"),
}
"""By compute capability: on 9.0 vLLM's kernel swaps the operands of FP8 products."""
PROGRAM = (
    "import sys; from formats import fake_gpu; fake_gpu.pretend({}); "
    "from formats import triton_rows; triton_rows.main(sys.argv[1:])"
)
ERROR = 0.06
"""Relative, of inputs in 8 bits."""


@functools.cache
def results(capability):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", PROGRAM.format(capability), *GROUPS[capability]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("capability", "name"), [(gpu, name) for gpu, names in GROUPS.items() for name in names])
def test_experts_in_other_rows_give_the_same_bits(capability, name):
    found = results(capability)[name]
    if found is None:
        pytest.skip("this vLLM has no Triton kernel for it")
    assert found["kernel"] in KERNELS
    assert found["same"] == {"1": True, "3": True}
    assert found["unnoticed"] == []
    assert found["error"] < ERROR
