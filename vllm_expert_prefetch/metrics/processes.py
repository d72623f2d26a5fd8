"""Telling living processes from dead ones, whose numbers must not be shown any more."""

import os
from pathlib import Path


def process_is_alive(pid: int, start: int | None = None) -> bool:
    """Whether a process of this id runs on this host; with `start` of `process_start`, whether it is the same one.

    One that was killed and not yet waited for by its parent counts as dead.
    """
    state = _state(pid)
    if state is not None:
        return state[0] != "Z" and start in (None, state[1])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def process_start(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where the system does not say."""
    state = _state(pid)
    return None if state is None else state[1]


def _state(pid: int) -> tuple[str, int] | None:
    """State letter and start of a process, from Linux' /proc (proc(5): fields 3 and 22)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return fields[0], int(fields[19])
