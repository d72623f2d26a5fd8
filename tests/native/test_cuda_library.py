"""The CUDA library without a GPU: its machine code, its bindings' checks, and how it is loaded.

All in one file: it takes minutes to compile. `make release-check` compiles it for all targets.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import tvm_ffi
from native_tools import CSRC, ROOT, find_cuda_tool, load_and_fork, load_setup

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.native import library as package
from vllm_expert_prefetch.native.sources import source_digest

ARCHS = ("80", "90", "120")
"""The oldest target, the newest, and the one with the most users."""
READS_IN_FLIGHT = 4
COPYING = ("gather_kernel", "prefetch_kernel")
TOOLS = {name: find_cuda_tool(name) for name in ("cuobjdump", "nvdisasm")}
needs_disassembler = pytest.mark.skipif(
    not all(TOOLS.values()),
    reason="needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)
GOOD = [4096, 256, 8192, 128]
NUM_WORDS = len(Words._fields)


@pytest.fixture(scope="module")
def cuda_build() -> Path:
    """The CUDA library for ARCHS: the package's own, or one compiled here and kept in build/."""
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if not (nvcc and setup.find_compiler()):
        pytest.skip("nvcc and g++ are needed to compile csrc/cuda/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VEP_CUDA_ARCHS", " ".join(ARCHS))
        installed = package.FOLDER / "libvep_cuda.so"
        if installed.exists() and is_of_these_sources(installed):
            return installed
        sources = [str(path.relative_to(ROOT)) for path in sorted((CSRC / "cuda").glob("*.c[cu]"))]

        def command(output: Path) -> list[str]:
            return setup.cuda_command(str(nvcc), setup.find_compiler(), sources, output, __version__)

        folder = ROOT / "build" / f"cuda-test-{hashlib.sha256(repr(command(Path())).encode()).hexdigest()[:16]}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                making = Path(scratch, "made")
                making.mkdir()
                done = subprocess.run(
                    command(making / installed.name), cwd=ROOT, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stdout + done.stderr
                making.rename(folder)
    return folder / installed.name


def is_of_these_sources(file: Path) -> bool:
    """Whether `file` was compiled from csrc/ as it is now, for ARCHS at least."""
    module = tvm_ffi.load_module(str(file))
    return module.source_digest() == source_digest(CSRC, "cuda") and {*module.architectures().split()} >= {*ARCHS}


@pytest.fixture(scope="module")
def library(cuda_build):
    return tvm_ffi.load_module(str(cuda_build))


def table(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def test_the_words_have_the_names_that_python_knows(library):
    assert tuple(library.word_names().split()) == Words._fields


def test_a_record_is_all_its_rows(library):
    assert library.check_layout(table(GOOD, [65536, 256, 4096, 48]), 4) == 176


@pytest.mark.parametrize("row_bytes", [1, 4, 18, 33])
def test_rows_of_scales_may_have_any_length(library, row_bytes):
    whole_vectors = -(-row_bytes // 16) * 16
    assert library.check_layout(table(GOOD, [65536, 256, 4096, row_bytes]), 4) == 128 + whole_vectors


@pytest.mark.parametrize("column", range(3))
def test_what_is_no_multiple_of_16_is_refused_with_segment_and_number(library, column):
    bad = list(GOOD)
    bad[column] += 8
    with pytest.raises(ValueError, match=rf"segment 1: .* is {bad[column]}, must be a positive multiple of 16"):
        library.check_layout(table(GOOD, bad), 4)


@pytest.mark.parametrize("column", [0, 2, 3])
def test_a_null_address_and_an_empty_row_are_refused(library, column):
    bad = list(GOOD)
    bad[column] = 0
    with pytest.raises(ValueError, match=r"segment 0: .* is 0, must be"):
        library.check_layout(table(bad), 4)


def test_too_many_segments_are_refused(library):
    with pytest.raises(ValueError, match="number of segments is 17, must be 1 to 16"):
        library.check_layout(table(*[GOOD] * 17), 4)


def gather(library, num_blocks=16):
    orders = [ints(4, 2), ints(1), ints(4), ints(1)]
    library.gather_records(
        table(GOOD), 4, *orders, ints(library.board_ints(4)), ints(library.lane_ints()), num_blocks, 0
    )


def test_lists_on_the_cpu_are_refused(library):
    with pytest.raises(ValueError, match="loads must lie on a GPU"):
        gather(library)


@pytest.mark.parametrize("num_blocks", [0, 1025])
def test_grids_out_of_range_are_refused(library, num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}, must be 1 to 1024"):
        gather(library, num_blocks)


def plan(library, state_words=NUM_WORDS + 22, ids=(1, 3), num_real=1, budget=4096):
    """A prefetch of a layer of 4 experts and 2 slots; every tensor on the CPU."""
    state, real = torch.zeros(state_words, dtype=torch.int64), torch.zeros(num_real, dtype=torch.int64)
    lane = ints(library.lane_ints())
    board, orders = ints(library.board_ints(4)), (ints(4), ints(1), ints(2))
    library.plan_prefetch(state, board, lane, ints(*ids), real, budget, False, False, *orders, 0)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"state_words": NUM_WORDS + 20}, "not a layer of at most 1024 experts"),
        ({"state_words": NUM_WORDS + 25}, "not a layer of at most 1024 experts"),
        ({}, "must lie on a GPU"),
    ],
)
def test_plans_with_bad_input_are_refused(library, bad, text):
    with pytest.raises(ValueError, match=text):
        plan(library, **bad)


def test_a_range_of_no_memory_is_refused(library):
    with pytest.raises(ValueError, match="a range needs a size"):
        library.row_space_reserve(0, 0)


def test_memory_is_refused_where_there_is_no_driver(library):
    if library.driver_version():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError):
        library.row_space_granularity(0)
    assert library.row_space_bytes() == 0


@needs_disassembler
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_spill_no_register_and_copy_16_bytes_at_a_time(cuda_build, arch):
    """A kernel that spills registers, or keeps anything else in local memory, has instructions for that memory."""
    kernels = disassemble(cuda_build, f"sm_{arch}")
    assert [name for name, code in kernels.items() if re.search(r"\b(STL|LDL)\b", code)] == []
    for copying in COPYING:
        # A mangled name has its length in front: plan_prefetch_kernel is another one.
        codes = [code for name, code in kernels.items() if f"{len(copying)}{copying}" in name]
        assert codes, f"{copying} is not in {sorted(kernels)}"
        for code in codes:
            moves = re.findall(r"\b(LD|ST)G?\.E(?:\.\w+)*\.128\b", code)
            # Every read of a round is on its way before the first write waits for one.
            assert moves == ["LD"] * READS_IN_FLIGHT + ["ST"] * READS_IN_FLIGHT


def disassemble(library: Path, target: str) -> dict[str, str]:
    """The machine code of each kernel in `library` for `target`, by mangled name."""
    cuobjdump, nvdisasm = TOOLS["cuobjdump"], TOOLS["nvdisasm"]
    assert cuobjdump is not None
    assert nvdisasm is not None
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", os.defpath)])
    command = [cuobjdump, "-sass", "-arch", target, str(library)]
    listing = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    parts = re.split(r"Function : (\w+)", listing.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_loading_the_library_leaves_cuda_to_forked_children(cuda_build):
    load_and_fork("cuda", cuda_build.parent)
