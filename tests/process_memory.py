"""What Linux says about this process's memory."""

import ctypes
import os
import platform
import resource
from pathlib import Path

PAGE = resource.getpagesize()
_CAP_IPC_LOCK = 14
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}


def status_bytes(key: str) -> int:
    """A line of /proc/self/status that is given in kB, such as VmSize or VmLck, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def mapping_at(address: int) -> dict[str, str] | None:
    """The fields of /proc/self/smaps of the mapping that holds `address`, None when it is not mapped."""
    found: dict[str, str] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, end = (int(text, 16) for text in first.split("-"))
            found = {} if start <= address < end else None if found is None else found
            if found and not start <= address < end:
                return found
        elif found is not None:
            found[first.removesuffix(":")] = rest.strip()
    return found


def numa_policy_at(address: int) -> str | None:
    """The NUMA policy of the mapping that holds `address`, such as "bind:0"; None where Linux does not tell."""
    try:
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
    except OSError:
        return None
    starts = [line for line in lines if int(line.split()[0], 16) <= address]
    return starts[-1].split()[1] if starts else None


def has_numa_calls() -> bool:
    """Whether this kernel, or the container around it, lets a process ask for a memory policy."""
    number = _SYS_GET_MEMPOLICY.get(platform.machine())
    return number is not None and ctypes.CDLL(None).syscall(number, None, None, 0, None, 0) == 0


def obey_memlock_limit(num_bytes: int) -> None:
    """Lower RLIMIT_MEMLOCK for good, and give up the capability that ignores it."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (num_bytes, num_bytes))
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same for numbers above 31
    _check(libc.capget(header, sets))
    for index in range(3):
        sets[index] &= ~(1 << _CAP_IPC_LOCK)
    _check(libc.capset(header, sets))


def _check(status: int) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
