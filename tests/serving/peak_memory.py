"""Peak anonymous memory of loading a model, sampled from outside the process (file pages do not count)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc gives freed tensors back: the holes it otherwise keeps between them are no copy of anything."""


def peak_anonymous_bytes(model: str, config: dict[str, Any] | None) -> int:
    """Load `model` in a process of its own and return the largest RssAnon seen, in bytes."""
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[1])])
    process = subprocess.Popen(
        [sys.executable, str(here), model, json.dumps(config)],
        env={**os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **_RETURN_AT_ONCE},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read()[-3000:] if process.stderr else ""
    return peak


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def _load(model: str, config: dict[str, Any] | None) -> None:
    import conftest  # noqa: F401  the engine's environment
    from engines import open_engine

    options = {"skip_tokenizer_init": True, "max_model_len": 128, "kv_cache_memory_bytes": 1 << 24}
    with open_engine(model, config, **options):
        pass


if __name__ == "__main__":
    _load(sys.argv[1], json.loads(sys.argv[2]))
