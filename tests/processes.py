"""Python in a process of its own."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from vllm_expert_prefetch.metrics.runtime_dir import ENVIRONMENT_VARIABLE


def start_python(code: str, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """Run `code` in a new interpreter, its streams piped; `env` is added to the environment of the tests.

    The modules beside this one can be imported there.
    """
    inherited = {key: value for key, value in os.environ.items() if key != ENVIRONMENT_VARIABLE}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, **(env or {})},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_python(code: str, env: Mapping[str, str] | None = None) -> str:
    """What `code` prints; AssertionError with its stderr when it fails."""
    process = start_python(code, env)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def is_running(pid: int) -> bool:
    """Whether there is a process of this number that has not ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
