"""Builds the native libraries; all metadata is in pyproject.toml, the settings are in docs/building.md.

The libraries go through apache-tvm-ffi, so they depend on no version of Python or torch: one wheel serves all.
"""

import functools
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PACKAGE = "vllm_expert_prefetch.native"
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
SHARED = ["-shared", "-O3", "-std=c++20"]
STATIC = ["-static-libstdc++", "-static-libgcc"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *STATIC]
NVCC_WHEELS = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-runtime", "cuda-cccl", "cuda-crt", "nvvm")]
"""NVIDIA's compiler and its headers from PyPI, 130 MB: a build requirement where a GPU has no toolkit beside it."""
OLDEST_GLIBC = 17  # manylinux_2_17 is the lowest tag that pip takes for every architecture


@functools.cache
def find_compiler() -> list[str]:
    """The C++20 compiler's command (CXX, else g++, else c++); empty when there is none."""
    for command in map(shlex.split, filter(None, (os.environ.get("CXX"), "g++", "c++"))):
        probe = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull]
        if shutil.which(command[0]) and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return command
        if os.environ.get("CXX"):
            break
    return []


@functools.cache
def find_nvcc() -> str | None:
    """CUDA's compiler: in CUDA_HOME, in PATH, while CUDA_HOME is unset in its usual place, or from wheels."""
    home, path = os.environ.get("CUDA_HOME"), os.environ.get("PATH", os.defpath)
    places = [f"{home}/bin", path] if home else [path, "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join([*places, *wheels_bin()]))


def wheels_bin() -> list[str]:
    """Where NVCC_WHEELS have put nvcc, if they are installed for this Python."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13" / "bin" for folder in (spec.submodule_search_locations or [])] if spec else []
    return [str(folder) for folder in folders if (folder / "nvcc").is_file()]


def build_requirements(compiler: list[str]) -> list[str]:
    """What pip must fetch to build: nvcc, where it is missing and the CUDA library is asked for, or there is a GPU."""
    setting = os.environ.get("VEP_BUILD_CUDA", "auto")
    is_wanted = setting == "1" or (setting == "auto" and Path("/proc/driver/nvidia/version").exists())
    return NVCC_WHEELS if compiler and is_wanted and not find_nvcc() else []


def wants_cuda(compiler: list[str], nvcc: str | None) -> bool:
    """VEP_BUILD_CUDA: auto (when it can be built), 1 (or fail), 0. Raises SystemExit with what is wrong."""
    setting = os.environ.get("VEP_BUILD_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"VEP_BUILD_CUDA={setting} is none of auto, 1, 0")
    missing = [name for name, found in (("nvcc", nvcc), ("a C++20 compiler", compiler)) if not found]
    if setting == "1" and missing:
        raise SystemExit(f"VEP_BUILD_CUDA=1 needs {' and '.join(missing)}, not found in PATH, CUDA_HOME or CXX")
    return setting != "0" and not missing


def cuda_archs(nvcc: str) -> list[str]:
    """Targets such as ["80", "90"]: VEP_CUDA_ARCHS, or those of CUDA_ARCHS that this nvcc knows."""
    chosen = re.split(r"[\s;,]+", os.environ.get("VEP_CUDA_ARCHS", "").strip())
    if chosen != [""]:
        wrong = [arch for arch in chosen if not re.fullmatch(r"\d{2,3}[af]?", arch)]
        if wrong:
            raise SystemExit(f"VEP_CUDA_ARCHS names {', '.join(wrong)}; give numbers such as VEP_CUDA_ARCHS='80 90'")
        return chosen
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if lacking := [arch for arch in CUDA_ARCHS if f"sm_{arch}" not in known]:
        print(f"{nvcc} is too old for the CUDA targets {', '.join(lacking)}: the library is built without them")
    return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]


def tvm_ffi_folder() -> Path:
    """Where apache-tvm-ffi is, found without importing it: that would import torch."""
    spec = importlib.util.find_spec("tvm_ffi")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the native libraries need the headers of apache-tvm-ffi>=0.1.10: pip install apache-tvm-ffi")
    return Path(next(iter(spec.submodule_search_locations)))


def common_flags(part: str, version: str) -> list[str]:
    """Include folders, and what the library tells about itself (csrc/version.h)."""
    digest = runpy.run_path(str(ROOT / "vllm_expert_prefetch/native/sources.py"))["source_digest"](CSRC, part)
    defines = {"VEP_VERSION": version, "VEP_SOURCE_DIGEST": digest}
    includes = ["-Icsrc", "-isystem", str(tvm_ffi_folder() / "include")]
    return [*includes, *(f'-D{name}="{value}"' for name, value in defines.items())]


def link_flags() -> list[str]:
    """Name libtvm_ffi.so without a path: the Python package has loaded it before. Keep only what the exports need."""
    tvm_ffi = [f"-L{tvm_ffi_folder() / 'lib'}", "-ltvm_ffi"]
    return [*tvm_ffi, "-Xlinker", "--version-script=csrc/exports.map", "-Xlinker", "--gc-sections", "-Xlinker", "-s"]


def path_map() -> str:
    """Keeps the build machine's folders out of the texts of errors."""
    return f"-ffile-prefix-map={tvm_ffi_folder()}=tvm_ffi"


def host_command(compiler: list[str], sources: list[str], output: Path, version: str) -> list[str]:
    """The command, to be run in ROOT, that makes the host library `output` of `sources`."""
    flags = [*common_flags("host", version), *SHARED, *HOST_FLAGS, path_map(), "-pthread"]
    return [*compiler, *flags, *sources, "-o", str(output), *link_flags()]


def cuda_command(nvcc: str, compiler: list[str], sources: list[str], output: Path, version: str) -> list[str]:
    """The command, to be run in ROOT, that makes the CUDA library `output` of `sources`, CUDA's runtime inside."""
    archs = cuda_archs(nvcc)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = [*common_flags("cuda", version), f'-DVEP_CUDA_ARCHS="{" ".join(archs)}"', *SHARED, *codes]
    flags += ["-Werror=all-warnings", "-Xcompiler", ",".join([*HOST_FLAGS, path_map()])]
    flags += ["--cudart=static", "--threads=0", "-Xfatbin=-compress-all", f"-L{Path(nvcc).parents[1] / 'lib'}"]
    host_compiler = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
    return [nvcc, *flags, *host_compiler, *sources, "-o", str(output), *link_flags()]


def glibc_tag(libraries: list[Path]) -> str:
    """The platform tag that promises the newest glibc symbol version that `libraries` name."""
    versions = [int(minor) for path in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())]
    family = f"manylinux_2_{max([OLDEST_GLIBC, *versions])}" if versions else "linux"
    return f"{family}_{platform.machine()}"


class BuildLibraries(build_ext):
    """Each extension is one shared library, made by one command. One that is not asked for is not left from before."""

    def run(self) -> None:
        root = ROOT if self.inplace else Path(self.build_lib)
        for leftover in root.joinpath(*PACKAGE.split(".")).glob("libvep_*.so"):
            leftover.unlink()
        super().run()

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        version = self.distribution.get_version()
        if ext.name.endswith("_cuda"):
            command = cuda_command(str(find_nvcc()), find_compiler(), ext.sources, output, version)
        else:
            command = host_command(find_compiler(), ext.sources, output, version)
        print(shlex.join(command), flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"{output.name} could not be compiled, see above (docs/building.md)")


class TaggedWheel(bdist_wheel):
    """Tags the wheel by what its libraries need: no version of Python, and some version of glibc."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.root_is_pure:
            return super().get_tag()
        built = list(Path(self.get_finalized_command("build_ext").build_lib).rglob("libvep_*.so"))
        return "py3", "none", glibc_tag(built)


def extension(part: str, pattern: str) -> Extension:
    """The library libvep_{part}.so and its sources, relative to this file as an sdist wants them."""
    sources = [str(path.relative_to(ROOT)) for path in sorted((CSRC / part).glob(pattern))]
    return Extension(f"{PACKAGE}.libvep_{part}", sources)


def main() -> None:
    """What setuptools runs: choose the libraries, then build whatever its command asks for."""
    compiler = find_compiler()
    extensions = [extension("host", "*.cc")] if compiler else []
    requirements = build_requirements(compiler)
    if not requirements and wants_cuda(compiler, find_nvcc()):
        extensions.append(extension("cuda", "*.c[cu]"))
    if not compiler:
        print("no C++20 compiler found: the package is built without native libraries, and can serve nothing")
    # With pip's build isolation, setuptools turns setup_requires into requirements of the build, and calls again.
    setup(
        setup_requires=requirements,
        ext_modules=extensions,
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": TaggedWheel},
    )


if __name__ == "__main__":
    main()
