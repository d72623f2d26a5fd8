"""Telling the files of living processes from those of dead ones: who made a file holds a lock on it.

The kernel drops the lock when the process ends, however it ends, and keeps it apart from process numbers, which another
container counts anew and which are given out again.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_held: set[int] = set()


def hold_lock(path: Path) -> int:
    """Lock a file or folder that this process has made, until the number returned is given to `release_lock`.

    A forked child does not hold it. Where the file system knows no locks, everything counts as locked.
    """
    descriptor = os.open(path, os.O_RDONLY)
    _held.add(descriptor)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def release_lock(descriptor: int) -> None:
    """Give a lock up."""
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether the process that made `path` and locked it still lives. Raises FileNotFoundError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _close_all() -> None:
    for descriptor in [*_held]:
        release_lock(descriptor)


os.register_at_fork(after_in_child=_close_all)
