"""Prove what a release promises about its files: `make release-check` calls it, from this repository's environment.

The sdist is built from the repository, every wheel from that sdist alone, and each wheel is installed by one
`pip install` into a new environment. torch and vLLM are several GB: the new environment sees those of the environment
that runs this script, behind its own packages, so pip finds them installed and downloads only tvm-ffi.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 20_000_000
OLDEST_TVM_FFI = "0.1.10"
COMPILERS = ("g++", "c++")

IMPORTS = """
import importlib.metadata, json, sys
# This environment's vLLM may need a later tvm-ffi than the one under test: doctor must report without it.
sys.modules["vllm"] = None
from vllm_expert_prefetch.cli import doctor
native = doctor.examine()["native"]
print(json.dumps({"tvm_ffi": importlib.metadata.version("apache-tvm-ffi"), **native}))
"""
PLAN = """
import numpy
from vllm_expert_prefetch.planning.planner import Planner
planner = Planner(8, 4, 2, "lru")
misses = [planner.plan(numpy.array(ids, dtype=numpy.int32)) for ids in ([5, 3], [3, 6])]
assert misses == [2, 1], misses
"""
INSTALLED = """
import sys, vllm_expert_prefetch
assert vllm_expert_prefetch.__file__.startswith(sys.prefix), vllm_expert_prefetch.__file__
"""


class CheckError(Exception):
    """Something that a release promises does not hold; the message says what."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise CheckError(message)


def call(*command: object, env: dict[str, str] | None = None) -> str:
    """The command's stdout; CheckError with the end of all its output when it fails.

    It runs at the file system's root: Python would import this repository from its current folder.
    """
    words = [str(word) for word in command]
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(words, cwd="/", env=env or inherited, capture_output=True, text=True, check=False)
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
    require(done.returncode == 0, f"failed: {' '.join(words)}\n{tail}")
    return done.stdout


def environment_without(folder: Path, *programs: str) -> dict[str, str]:
    """This process's environment, in which none of `programs` can be found, and everything else can.

    Folders of PATH that hold one of them are replaced by folders of links to all the others.
    """
    places = []
    for number, place in enumerate(os.environ.get("PATH", os.defpath).split(os.pathsep)):
        if place and any((Path(place) / program).exists() for program in programs):
            links = folder / f"path-{number}"
            links.mkdir(parents=True)
            for entry in Path(place).iterdir():
                if entry.name not in programs:
                    (links / entry.name).symlink_to(entry)
            places.append(str(links))
        else:
            places.append(place)
    hidden = {name: value for name, value in os.environ.items() if name not in ("CXX", "VEP_BUILD_CUDA", "PYTHONPATH")}
    return {**hidden, "PATH": os.pathsep.join(places), "CUDA_HOME": str(folder / "no-cuda")}


class Release:
    """The files under test, in a folder that is thrown away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.have_nvcc = bool(shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"))
        self.tools = self._make_venv("tools")
        call(self.tools, "-m", "pip", "install", "--quiet", "build", "auditwheel")

    def _make_venv(self, name: str) -> Path:
        """A new environment's interpreter."""
        call(sys.executable, "-m", "venv", self.folder / name)
        return self.folder / name / "bin" / "python"

    def build(self) -> tuple[Path, Path]:
        """The sdist of the repository, and the wheel that is built from that sdist alone."""
        out = self.folder / "dist"
        call(self.tools, "-m", "build", "--outdir", out, ROOT)
        (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
        return sdist, wheel

    def build_without(self, sdist: Path, *programs: str) -> Path:
        """The wheel of `sdist` on a machine that lacks `programs`."""
        out = self.folder / f"without-{programs[-1]}"
        source = out / "source"
        shutil.unpack_archive(sdist, source)
        (tree,) = source.iterdir()
        env = environment_without(out / "bin", *programs)
        call(self.tools, "-m", "build", "--wheel", "--outdir", out / "dist", tree, env=env)
        (wheel,) = (out / "dist").glob("*.whl")
        return wheel

    def check_wheel(self, wheel: Path, libraries: set[str]) -> None:
        """Size, tag and content."""
        with zipfile.ZipFile(wheel) as archive:
            held = {Path(name).name for name in archive.namelist() if name.endswith(".so")}
        require(held == libraries, f"{wheel.name} holds {sorted(held)}, not {sorted(libraries)}")
        size = wheel.stat().st_size
        require(size <= MAX_WHEEL_BYTES, f"{wheel.name} has {size} bytes, more than {MAX_WHEEL_BYTES}")
        tag = wheel.stem.split("-", 2)[2]
        if not libraries:
            require(tag == "py3-none-any", f"{wheel.name} holds no library and is tagged {tag}")
            return
        audit = json.loads(call(self.tools, "-m", "auditwheel", "show", "--json", wheel))
        promised = f"py3-none-{audit['sym_tag']}"
        require(tag == promised, f"auditwheel derives {promised} from the symbols of {wheel.name}")
        external = set(audit["external_libs"])
        require(external == {"libtvm_ffi.so"}, f"{wheel.name} needs {sorted(external)}, not libtvm_ffi.so alone")

    def check_install(self, wheel: Path, newest_tvm_ffi: bool) -> dict[str, Any]:
        """Install into a new environment and ask `doctor`; a wheel with a host library must plan with it."""
        python = self._make_venv(f"install-{len(list(self.folder.glob('install-*')))}")
        site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "zz-heavy-packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        requirement = "apache-tvm-ffi" if newest_tvm_ffi else f"apache-tvm-ffi=={OLDEST_TVM_FFI}"
        call(python, "-m", "pip", "install", "--quiet", "--upgrade", wheel, requirement)
        call(python, "-c", INSTALLED)
        report = json.loads(call(python, "-c", IMPORTS).splitlines()[-1])
        if report["host"]["usable"]:
            call(python, "-c", PLAN)
        if newest_tvm_ffi:
            call(python.with_name("vllm-expert-prefetch"), "doctor")
        call(python, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm-expert-prefetch")
        require(not list(site.glob("vllm_expert_prefetch*")), f"{wheel.name} leaves files behind when uninstalled")
        return report


def check(folder: Path) -> None:
    release = Release(folder)
    sdist, wheel = step("sdist, and a wheel from it", release.build)
    libraries = {"libvep_host.so", *(["libvep_cuda.so"] if release.have_nvcc else [])}
    step(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", lambda: release.check_wheel(wheel, libraries))
    for newest in (False, True):
        install = partial(release.check_install, wheel, newest)
        report = step(f"one pip install, {'newest' if newest else 'oldest'} tvm-ffi", install)
        print(f"  apache-tvm-ffi {report['tvm_ffi']}")
        require(newest or report["tvm_ffi"] == OLDEST_TVM_FFI, f"that is not {OLDEST_TVM_FFI}")
        require(report["host"]["usable"], f"the host library is not usable: {report['host']['reason']}")
        require(
            report["cuda"]["usable"] == release.have_nvcc,
            f"the CUDA library is not usable: {report['cuda']['reason']}",
        )
    plain = step("the sdist where there is no nvcc", lambda: release.build_without(sdist, "nvcc"))
    release.check_wheel(plain, {"libvep_host.so"})
    pure = step("the sdist where there is no compiler", lambda: release.build_without(sdist, "nvcc", *COMPILERS))
    release.check_wheel(pure, set())
    report = step(f"one pip install, {pure.name}", partial(release.check_install, pure, True))
    reason = report["host"]["reason"]
    require(reason.startswith("not built: libvep_host.so needs a C++20 compiler"), f"doctor says: {reason}")


def step(title: str, run: Callable[[], Result]) -> Result:
    """What `run` returns; prints what is done and how long it took."""
    print(f"{title} ...", end=" ", flush=True)
    start = time.monotonic()
    result = run()
    print(f"{time.monotonic() - start:.1f} s", flush=True)
    return result


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="release-check-") as folder:
        try:
            check(Path(folder))
        except CheckError as error:
            print(f"\nrelease-check: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
