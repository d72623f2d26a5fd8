"""How much memory this process may have on its host: what there is, or less where its container has a limit."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError

GB = 10**9
_PROC = Path("/proc/self")
_UNLIMITED = 1 << 60
"""cgroup v1 writes a number this large for no limit."""


class HostLimit(NamedTuple):
    """Bytes, and where they are written."""

    num_bytes: int
    source: str


def host_limit() -> HostLimit:
    """The least of the host's memory and of the limits of this process's control groups (v1 and v2)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([HostLimit(total, "the memory of this host"), *_limits()])


def check_experts_fit(num_bytes: int) -> str | None:
    """Raise ConfigError, with both numbers, where `num_bytes` of experts are more than this process may have.

    Returns what there is to say where page-locked ones leave less than a tenth of it to everything else; else None.
    """
    limit = host_limit()
    numbers = (
        f"all experts take {num_bytes / GB:.3g} GB of host memory, and {limit.source} is {limit.num_bytes / GB:.3g} GB"
    )
    if num_bytes > limit.num_bytes:
        raise ConfigError(
            f"{CONFIG_KEY}: {numbers}: raise the container's limit, serve a checkpoint with fewer bits per weight, or "
            "serve on more hosts"
        )
    if num_bytes > 0.9 * limit.num_bytes:
        return (
            f"{numbers}: less than a tenth is left for everything else, which cannot take page-locked memory back. "
            "Raise the limit, or serve a checkpoint with fewer bits per weight"
        )
    return None


def _limits() -> Iterator[HostLimit]:
    for folder, name in _folders():
        for group in (folder, *folder.parents):
            try:
                text = (group / name).read_text().strip()
            except OSError:  # above the root of the hierarchy, or out of sight
                continue
            if text.isdigit() and int(text) < _UNLIMITED:
                yield HostLimit(int(text), str(group / name))


def _folders() -> Iterator[tuple[Path, str]]:
    """Of each memory controller: the folder of this process's group, and the name of the file with the limit.

    In a container the hierarchy is often mounted from the group itself, so that the path leads nowhere: its mount then.
    """
    mounts = dict(_mounts())
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        kind = "cgroup2" if not controllers else "memory" if "memory" in controllers.split(",") else ""
        if kind in mounts:
            name = "memory.max" if kind == "cgroup2" else "memory.limit_in_bytes"
            yield mounts[kind] / path.lstrip("/"), name


def _mounts() -> Iterator[tuple[str, Path]]:
    try:
        lines = (_PROC / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            yield kind, Path(before.split()[4])
        elif kind == "cgroup" and "memory" in options.split(","):
            yield "memory", Path(before.split()[4])
