"""The compilers and disassemblers that the tests of the native libraries use, found as setup.py finds them."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

from processes import run_python

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


def load_setup() -> ModuleType:
    """setup.py as a module of its own, with nothing found yet."""
    spec = importlib.util.spec_from_file_location("vep_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_cuda_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: beside nvcc, in PATH, or from the packages nvidia-cuda-* or triton of this environment."""
    nvcc = load_setup().find_nvcc()
    packages = Path(sysconfig.get_path("purelib"))
    places = [
        *([str(Path(nvcc).resolve().parent)] if nvcc else []),
        os.environ.get("PATH", os.defpath),
        *(str(folder) for folder in sorted(packages.glob("nvidia/*/bin"))),
        str(packages / "triton" / "backends" / "nvidia" / "bin"),
    ]
    return shutil.which(name, path=os.pathsep.join(places))


def load_and_fork(part: str, folder: Path) -> None:
    """Load libvep_{part}.so from `folder` in a new process, and use CUDA in a forked child where there is a GPU."""
    output = run_python(f"""
        import os
        from pathlib import Path
        from vllm_expert_prefetch.native import library
        library.FOLDER = Path({str(folder)!r})
        print(library.{part}_library() is not None, library.why_not_{part}(), flush=True)
        import torch
        assert not torch.cuda.is_initialized()
        assert "{part}" == "cuda" or "libcuda.so" not in open("/proc/self/maps").read()
        if os.fork() == 0:
            if torch.cuda.is_available():
                torch.zeros(1, device="cuda")
            os._exit(0)
        _, status = os.wait()
        assert status == 0, status
    """)
    assert output == "True None\n"
