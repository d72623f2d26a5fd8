"""Host stores that several processes of one host map: every record once, for all engines that serve one checkpoint.

The memory of a layer is a memfd, sealed once it is filled: nobody can write to it any more, and the kernel frees it
with the last process that has it, however that ends. A folder of the store's name lets its members find each other's
memfds. In it each member has a locked folder of its own, with a link into /proc for each layer.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.locks import exclusive, hold_lock, is_locked, release_lock
from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions

_PLACE = Path("/dev/shm")
"""The same for every process, whatever its TMPDIR is; a few bytes go there."""
_MEMBER, _CHECKPOINT, _LOCK = "member-", "checkpoint.json", "lock"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SharedStore:
    """This process's membership in the store of a name."""

    def __init__(self, name: str, checkpoint: Mapping[str, str], rank: str) -> None:
        """`checkpoint`: what tells it from others, in words. `rank`: which part of its experts this process has.

        Raises ConfigError where living processes keep another checkpoint under this name.
        """
        self.name = name
        self._rank = rank
        self._folder = _folder_of(name)
        self.num_found = self.num_made = 0
        """Layers whose records another process had, and those that this one has put there."""
        self._place, lock = _join(name, checkpoint)
        weakref.finalize(self, _leave, self._folder, self._place, lock, os.getpid())

    def take(
        self,
        layer: str,
        layout: str,
        num_bytes: int,
        options: HostMemoryOptions,
        fill: Callable[[HostMemory], None],
        difference: Callable[[HostMemory], str | None],
    ) -> HostMemory:
        """The memory of a `layer` whose records have this `layout`, read-only: another member's, or new and filled.

        Waits while another process fills memory of the same rank. `difference` names what is not equal in memory that
        was found: ConfigError then, or where `options` cannot be honoured. Where it lies is decided by who fills it.
        """
        node = options.numa_node if options.must_bind else None
        key = hashlib.sha256(json.dumps([self._rank, layer, layout, node]).encode()).hexdigest()[:32]
        notes: list[str] = []
        with exclusive(self._folder / f"{self._rank}.{_LOCK}"):
            file = self._find(key, num_bytes)
            is_found = file is not None
            if file is None:
                file, notes = _create(key, num_bytes, options, fill)
            link = self._place / key
            link.symlink_to(f"/proc/{os.getpid()}/fd/{file}")
        memory = HostMemory(num_bytes, replace(options, huge_pages=False, numa_node=None), file, read_only=True)
        memory.notes[:0] = notes
        weakref.finalize(memory, _withdraw, link, file, os.getpid())
        if is_found and (what := difference(memory)):
            raise ConfigError(
                f"{CONFIG_KEY}: the shared_store {self.name} holds other weights than this checkpoint: {what} "
                f"of {layer} differs. Give every checkpoint a name of its own, or set shared_store to off"
            )
        self.num_found += is_found
        self.num_made += not is_found
        return memory

    def _find(self, key: str, num_bytes: int) -> int | None:
        for link in self._folder.glob(f"{_MEMBER}*/{key}"):
            with suppress(OSError):  # its process has ended, or is in another container
                if not os.readlink(os.readlink(link)).startswith(_memfd_name(key)):
                    continue  # another process has got its number
                file = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS == _SEALS and os.fstat(file).st_size == num_bytes:
                    return file
                os.close(file)
        return None


def check_store(name: str, checkpoint: Mapping[str, str]) -> None:
    """Raise ConfigError where a living process keeps another checkpoint under this name, or no store can be there."""
    folder = _folder_of(name)
    if os.path.lexists(folder):
        _check_is_own(folder)
    elif not os.access(_PLACE, os.W_OK):
        raise ConfigError(f"{CONFIG_KEY}: shared_store {name}: {_PLACE} cannot be written to. Set shared_store to off")
    _check_checkpoint(name, checkpoint, _living(folder))


def remove_dead_stores() -> None:
    """Remove the folders of this user's stores none of whose members lives: a SIGKILL leaves them, and no memory."""
    for folder in _PLACE.glob(_folder_of("*").name):
        with suppress(OSError, ConfigError):
            _check_is_own(folder)
            with exclusive(folder / _LOCK):
                _tidy(folder)


def _tidy(folder: Path) -> None:
    """Of a locked folder, or the folder itself."""
    _remove_dead(folder)
    if not any(folder.glob(f"{_MEMBER}*")):
        shutil.rmtree(folder, ignore_errors=True)


def _folder_of(name: str) -> Path:
    return _PLACE / f"expert-prefetch-store-{os.getuid()}-{name}"


def _join(name: str, checkpoint: Mapping[str, str]) -> tuple[Path, int]:
    """The folder of a new member, and the lock that it holds."""
    folder = _folder_of(name)
    while True:
        check_store(name, checkpoint)
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError), exclusive(folder / _LOCK):  # the last member may just have removed it
            _remove_dead(folder)
            _check_checkpoint(name, checkpoint, _living(folder))
            unlocked = Path(tempfile.mkdtemp(prefix=f".{_MEMBER}", dir=folder))  # nobody looks at it by this name
            (unlocked / _CHECKPOINT).write_text(json.dumps(dict(checkpoint)))
            lock = hold_lock(unlocked)
            return unlocked.rename(folder / unlocked.name.removeprefix(".")), lock


def _check_is_own(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{CONFIG_KEY}: shared_store: {folder} is not a folder that this user alone may enter. Remove it, or "
            "choose another name"
        )


def _living(folder: Path) -> Iterator[Path]:
    for place in folder.glob(f"{_MEMBER}*"):
        with suppress(FileNotFoundError):
            if is_locked(place):
                yield place


def _remove_dead(folder: Path) -> None:
    """Of a locked folder: what killed members have left there, which is no memory."""
    living = set(_living(folder))
    for place in [*folder.glob(f"{_MEMBER}*"), *folder.glob(f".{_MEMBER}*")]:
        if place not in living:
            shutil.rmtree(place, ignore_errors=True)


def _check_checkpoint(name: str, own: Mapping[str, str], places: Iterator[Path]) -> None:
    for place in places:
        with suppress(FileNotFoundError):
            there = json.loads((place / _CHECKPOINT).read_text())
            if there != own:
                raise ConfigError(
                    f"{CONFIG_KEY}: the shared_store {name} holds the experts of {_in_words(there)}, and this server's "
                    f"are those of {_in_words(own)}. Give every checkpoint a name of its own"
                )


def _in_words(checkpoint: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in checkpoint.items())


def _leave(folder: Path, place: Path, lock: int, process: int) -> None:
    if os.getpid() != process:  # a forked child has this handler, not the place
        return
    with suppress(OSError), exclusive(folder / _LOCK):
        shutil.rmtree(place, ignore_errors=True)
        release_lock(lock)
        _tidy(folder)


def _withdraw(link: Path, file: int, process: int) -> None:
    if os.getpid() == process:
        link.unlink(missing_ok=True)
    os.close(file)


def _memfd_name(key: str) -> str:
    return f"/memfd:expert_prefetch-{key}"


def _create(
    key: str, num_bytes: int, options: HostMemoryOptions, fill: Callable[[HostMemory], None]
) -> tuple[int, list[str]]:
    """A filled and sealed memfd, and what was asked of its memory and not possible."""
    try:
        file = os.memfd_create(_memfd_name(key).removeprefix("/memfd:"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise ConfigError(
            f"{CONFIG_KEY}: memfd_create failed ({error.strerror}), and a shared_store needs it: allow this system "
            "call in the container's seccomp profile, or set shared_store to off"
        ) from error
    try:
        os.ftruncate(file, num_bytes)
        memory = HostMemory(num_bytes, replace(options, pin=False), file)
        fill(memory)
        notes = memory.notes
        del memory  # nothing may map what is sealed for writing
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file, notes
