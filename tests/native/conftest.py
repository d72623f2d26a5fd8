"""The CUDA library, made once for every test that looks at it."""

import hashlib
import subprocess
import tempfile
from pathlib import Path

import pytest
import tvm_ffi
from native_tools import CSRC, ROOT, load_setup

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.native import library
from vllm_expert_prefetch.native.sources import source_digest


@pytest.fixture(scope="session")
def cuda_build() -> Path:
    """The CUDA library for every target: the package's own, or one compiled here and kept in build/."""
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if not (nvcc and setup.find_compiler()):
        pytest.skip("nvcc and g++ are needed to compile csrc/cuda/")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VEP_CUDA_ARCHS", raising=False)
        installed = library.FOLDER / "libvep_cuda.so"
        if installed.exists() and is_of_these_sources(installed, setup.cuda_archs(nvcc)):
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


def is_of_these_sources(file: Path, archs: list[str]) -> bool:
    """Whether `file` was compiled from csrc/ as it is now, for just these targets."""
    module = tvm_ffi.load_module(str(file))
    return module.source_digest() == source_digest(CSRC, "cuda") and module.architectures() == " ".join(archs)
