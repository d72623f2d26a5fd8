"""Peak memory of loading a model, sampled from outside the process: anonymous and shared pages, each once. Files do not
count."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc gives freed tensors back: the holes it otherwise keeps between them are no copy of anything."""


def peak_bytes(model: str, config: dict[str, Any] | None) -> int:
    """Load `model` in a process of its own and return the most memory seen, in bytes."""
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
        peak = max(peak, _bytes_of(process.pid))
        time.sleep(0.03)  # looking costs the process itself time: its page tables are walked
    assert process.returncode == 0, process.stderr.read()[-3000:] if process.stderr else ""
    return peak


def _bytes_of(pid: int) -> int:
    """A page that several mappings of a process share is one page here: shared pages are counted by Pss, not by Rss."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _load(model: str, config: dict[str, Any] | None) -> None:
    import conftest  # noqa: F401  the engine's environment
    from engines import open_engine

    options = {"skip_tokenizer_init": True, "max_model_len": 128, "kv_cache_memory_bytes": 1 << 24}
    with open_engine(model, config, **options):
        pass


if __name__ == "__main__":
    _load(sys.argv[1], json.loads(sys.argv[2]))
