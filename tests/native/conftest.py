"""The CUDA library, compiled once for every test that looks at it."""

import hashlib
import subprocess
import tempfile
from pathlib import Path

import pytest
from native_tools import CSRC, ROOT, load_setup

from vllm_expert_prefetch import __version__


@pytest.fixture(scope="session")
def cuda_build() -> tuple[Path, str]:
    """The CUDA library for every target, and what ptxas said; kept in build/ while sources and command are the same."""
    setup = load_setup()
    if not (setup.find_nvcc() and setup.find_compiler()):
        pytest.skip("nvcc and g++ are needed to compile csrc/cuda/")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VEP_CUDA_ARCHS", raising=False)
        sources = [str(path.relative_to(ROOT)) for path in sorted((CSRC / "cuda").glob("*.c[cu]"))]

        def command(output: Path) -> list[str]:
            arguments = (str(setup.find_nvcc()), setup.find_compiler(), sources, output, __version__)
            return [*setup.cuda_command(*arguments), "-Xptxas=-v"]

        digest = hashlib.sha256(repr(command(Path("library"))).encode()).hexdigest()[:16]
        folder = ROOT / "build" / f"cuda-test-{digest}"
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                making = Path(scratch, "made")
                making.mkdir()
                done = subprocess.run(
                    command(making / "libvep_cuda.so"), cwd=ROOT, capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stdout + done.stderr
                (making / "ptxas.txt").write_text(done.stdout + done.stderr)
                making.rename(folder)
    return folder / "libvep_cuda.so", (folder / "ptxas.txt").read_text()
