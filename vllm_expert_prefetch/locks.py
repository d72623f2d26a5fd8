"""Telling the files of living processes from those of dead ones: who made a file holds a lock on it.

The kernel drops the lock when the process ends, however it ends, and keeps it apart from process numbers, which another
container counts anew and which are given out again.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for whoever else is in here with the file `path`, which is made (mode 0600) where it is missing.

    Raises FileNotFoundError where its folder is missing, or somebody removed it meanwhile.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(path)
        yield
    finally:
        release_lock(descriptor)


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
