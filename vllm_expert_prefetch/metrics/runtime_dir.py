"""A private directory shared by the processes of one server: made by the first, found by the others."""

import atexit
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_expert_prefetch.locks import hold_lock, is_locked

ENVIRONMENT_VARIABLE = "EXPERT_PREFETCH_RUNTIME_DIR"
"""Set for child processes only; its value changes with every run, so it must stay out of vLLM's configuration."""

_PREFIX = "expert-prefetch-"
_NEEDED_BYTES = 1 << 18
"""Free space that a place must have: what the counters of a few ranks take."""
_logger = logging.getLogger("vllm.expert_prefetch")  # below vLLM's own, whose handlers then apply
_RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def ensure_runtime_dir() -> Path:
    """The directory of this server (mode 0700), created and cleaned up at exit by the process that asks first.

    Raises OSError naming the place when it cannot be created.
    """
    known = Path(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    # vLLM starts its processes through multiprocessing, or as actors. Any other child is a program of its own.
    started_by_vllm = multiprocessing.parent_process() is not None or _is_ray_actor()
    if (_is_mine(known) or started_by_vllm) and known.name and known.is_dir():
        return known
    directory = _make()
    os.environ[ENVIRONMENT_VARIABLE] = str(directory)
    atexit.register(remove_runtime_dir)
    return directory


def _make() -> Path:
    """A new folder, locked, in the first place that takes one."""
    problems = []
    for place in (lambda: os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir):
        try:
            base = Path(place() or tempfile.gettempdir())
            _remove_leftovers(base)
            # Under a name that no other start cleans up, until it is locked.
            unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}{os.getpid()}-", dir=base))
        except OSError as error:
            problems.append(str(error))
            continue
        if problem := _lacks_space(unlocked):
            problems.append(problem)
            unlocked.rmdir()
            continue
        hold_lock(unlocked)
        if problems:
            _logger.warning("expert_prefetch: the metrics are in %s: %s", base, problems[0])
        return unlocked.rename(base / unlocked.name.removeprefix("."))
    raise OSError(
        f"expert_prefetch: no folder for the metrics can be made: {'; '.join(problems)}. Let XDG_RUNTIME_DIR or TMPDIR "
        "name a folder that this user may write to, with space left"
    )


def _lacks_space(directory: Path) -> str | None:
    """What came of trying to take it."""
    file = directory / "space"
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _NEEDED_BYTES)
        finally:
            os.close(descriptor)
            file.unlink()
    except OSError as error:
        return f"{directory.parent}: {error.strerror}"
    return None


def remove_runtime_dir() -> None:
    """Remove the directory if this process made it. A forked child inherits the exit handler, not the directory."""
    directory = Path(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    if _is_mine(directory):
        shutil.rmtree(directory, ignore_errors=True)


def folders() -> list[Path]:
    """Of every server of this user on this host, as far as this process sees them."""
    bases = {Path(place) for place in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()) if place}
    found = [path for base in sorted(bases) for path in sorted(base.glob(f"{_PREFIX}*-*"))]
    return [path for path in found if path.is_dir() and path.stat().st_uid == os.getuid()]


def carry_to_ray_workers() -> None:
    """Let vLLM's Ray executor copy the directory's name to its workers: those on this host find it then."""
    names = [name for name in os.environ.get(_RAY_COPIES, "").split(",") if name]
    if ENVIRONMENT_VARIABLE not in names:
        os.environ[_RAY_COPIES] = ",".join([*names, ENVIRONMENT_VARIABLE])


def _is_ray_actor() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def _is_mine(directory: Path) -> bool:
    return directory.name.startswith(f"{_PREFIX}{os.getpid()}-")


def _remove_leftovers(base: Path) -> None:
    """Directories of servers that were killed."""
    for directory in base.glob(f"{_PREFIX}*-*"):
        owner = directory.name.removeprefix(_PREFIX).split("-")[0]
        with suppress(FileNotFoundError):  # another server, starting as well, was faster
            if owner.isdigit() and directory.lstat().st_uid == os.getuid() and not is_locked(directory):
                shutil.rmtree(directory, ignore_errors=True)
