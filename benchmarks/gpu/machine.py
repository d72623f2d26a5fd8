"""The machine under test, from what is installed: nothing here imports torch or starts CUDA."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed
GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "pcie.link.gen.max", "pcie.link.width.max")
PACKAGES = ("torch", "triton", "vllm", "apache-tvm-ffi", "vllm-expert-prefetch", "pytest")


def describe() -> dict[str, Any]:
    """Commit, processor, memory, GPUs, compilers and package versions; None for what is not there."""
    return {
        "commit": os.environ.get("GPU_CHECK_COMMIT") or _output("git", "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "gpus": gpus(),
        "nvcc": (_output(nvcc() or "nvcc", "--version") or "").splitlines()[-1:],
        "compute_sanitizer": shutil.which("compute-sanitizer"),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def gpus() -> list[dict[str, str]]:
    """One entry per GPU, in nvidia-smi's words; empty without a driver."""
    lines = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    return [dict(zip(GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in (lines or "").splitlines()]


def short_name() -> str:
    """The GPU's name as a folder name: h200. "gpu" without one."""
    found = gpus()
    return found[0]["name"].removeprefix("NVIDIA ").lower().replace(" ", "-") if found else "gpu"


def nvcc() -> str | None:
    """CUDA's compiler, in PATH or in its usual place."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
