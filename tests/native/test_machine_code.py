"""What the compiler makes of the gather kernels: 16-byte loads, several before the first store, nothing spilled."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
KERNELS = ("gather_kernel", "prefetch_kernel")
LOADS_IN_FLIGHT = 4

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The cubin for sm_90, and what the assembler says about it."""
    cubin = tmp_path_factory.mktemp("cubin") / "gather.cubin"
    command = [NVCC, "-std=c++20", "-O3", "-arch=sm_90", "-Werror=all-warnings", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, "csrc/cuda/gather.cu", "-o", cubin], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def test_nothing_is_spilled(compiled):
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
    assert len(frames) == 3
    assert set(frames) == {("0", "0", "0")}


def test_records_are_read_16_bytes_at_a_time_several_before_the_first_is_written(compiled):
    nvdisasm = _nvdisasm()
    if nvdisasm is None:
        pytest.skip("needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    code = subprocess.run([nvdisasm, compiled[0]], capture_output=True, text=True, check=True).stdout
    for kernel in KERNELS:
        body = re.search(rf"\.text\.\w*{kernel}\w*:(.*?)(?:\.section|\Z)", code, re.DOTALL)[1]
        moves = re.findall(r"\b(LDG\.E\.NA\.128|STG\.E\.128)", body)
        assert [move[:3] for move in moves] == ["LDG"] * LOADS_IN_FLIGHT + ["STG"] * LOADS_IN_FLIGHT
        assert not re.search(r"\b(LDL|STL)\b", body)


def _nvdisasm():
    import site

    folders = [Path(folder, "nvidia/cu13/bin") for folder in site.getsitepackages()]
    found = shutil.which("nvdisasm"), *(shutil.which("nvdisasm", path=str(folder)) for folder in folders)
    return next(filter(None, found), None)
