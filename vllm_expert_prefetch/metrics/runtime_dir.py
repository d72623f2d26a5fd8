"""A private directory shared by the processes of one server: made by the first, found by the others."""

import atexit
import multiprocessing
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_expert_prefetch.metrics.processes import process_is_alive

ENVIRONMENT_VARIABLE = "EXPERT_PREFETCH_RUNTIME_DIR"
"""Set for child processes only; its value changes with every run, so it must stay out of vLLM's configuration."""

_PREFIX = "expert-prefetch-"


def ensure_runtime_dir() -> Path:
    """The directory of this server (mode 0700), created and cleaned up at exit by the process that asks first.

    Raises OSError naming the place when it cannot be created.
    """
    known = Path(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    # vLLM starts its processes through multiprocessing. Any other child is a server, or a program, of its own.
    if (_is_mine(known) or multiprocessing.parent_process() is not None) and known.name and known.is_dir():
        return known
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    _remove_leftovers(base)
    try:
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    except OSError as error:
        raise OSError(
            f"expert_prefetch: no directory for the metrics can be made in {base} ({error.strerror}). Let "
            "XDG_RUNTIME_DIR, or TMPDIR without it, name a directory that this user may write to"
        ) from error
    os.environ[ENVIRONMENT_VARIABLE] = str(directory)
    atexit.register(remove_runtime_dir)
    return directory


def remove_runtime_dir() -> None:
    """Remove the directory if this process made it. A forked child inherits the exit handler, not the directory."""
    directory = Path(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    if _is_mine(directory):
        shutil.rmtree(directory, ignore_errors=True)


def _is_mine(directory: Path) -> bool:
    return directory.name.startswith(f"{_PREFIX}{os.getpid()}-")


def _remove_leftovers(base: Path) -> None:
    """Directories of servers that were killed."""
    for directory in base.glob(f"{_PREFIX}*-*"):
        owner = directory.name.removeprefix(_PREFIX).split("-")[0]
        with suppress(FileNotFoundError):  # another server, starting as well, was faster
            if owner.isdigit() and directory.lstat().st_uid == os.getuid() and not process_is_alive(int(owner)):
                shutil.rmtree(directory, ignore_errors=True)
