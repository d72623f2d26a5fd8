"""The worker's side: numbers in a small private file, mapped into memory, that the API server reads."""

import contextlib
import json
import mmap
import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_expert_prefetch.locks import hold_lock, release_lock
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX, LAYER_SERIES, SERIES

SUFFIX = ".counters"
HEADER_BYTES = 4096
_LENGTH = struct.Struct("<I")
_DOUBLE = 8


class Counters:
    """One float64 per series of `definitions.SERIES`, then one per layer and series of `definitions.LAYER_SERIES`.

    `add` is one memory write, seen at once by the reader.
    """

    def __init__(
        self, path: Path, labels: Mapping[str, str], info: Mapping[str, str], layers: Sequence[str] = ()
    ) -> None:
        """Create `path` (mode 0600), or raise OSError. `labels` are those of `COMMON_LABELS`, `info` those of
        `INFO_LABELS`, `layers` the names of the layers that are counted one by one.
        """
        self.path = path
        self.layers = tuple(layers)
        header = json.dumps({"labels": labels, "info": info, "layers": layers}, default=dict).encode()
        if len(header) > HEADER_BYTES - _LENGTH.size:
            raise ValueError(f"metrics header of {len(header)} bytes exceeds {HEADER_BYTES - _LENGTH.size}")
        size = HEADER_BYTES + _DOUBLE * num_series(len(self.layers))
        self._write((_LENGTH.pack(len(header)) + header).ljust(size, b"\0"))

    def _write(self, content: bytes) -> None:
        # Under another name first: a reader must never see half a file, nor one without its lock.
        temporary = self.path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, len(content))  # where it lacks space, writing would be SIGBUS
            self._map = mmap.mmap(descriptor, len(content))
        except OSError as error:
            temporary.unlink()
            raise OSError(f"{self.path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        self._map[:] = content
        self._values = memoryview(self._map)[HEADER_BYTES:].cast("d")
        lock = hold_lock(temporary)
        temporary.rename(self.path)
        weakref.finalize(self, _unlink, self.path, lock, os.getpid())

    def keep(self) -> bool:
        """Write the file anew where it was removed, say by a cleaner of temporary folders. Returns whether it was."""
        if self.path.exists():
            return False
        if not self.path.parent.exists():
            self.path.parent.mkdir(mode=0o700)
            hold_lock(self.path.parent)
        self._write(self._map[:])
        return True

    def add(self, index: int, amount: float) -> None:
        """Increase a counter; `index` is `definitions.INDEX[series]` or `layer_index(...)`."""
        self._values[index] += amount

    def set(self, series: str, value: float) -> None:
        """Set a gauge."""
        self._values[INDEX[series]] = value

    def get(self, series: str) -> float:
        """The present value."""
        return self._values[INDEX[series]]


@dataclass(frozen=True)
class Snapshot:
    """What one file of `Counters` held when it was read. `values` are in the order of the file."""

    labels: dict[str, str]
    info: dict[str, str]
    layers: list[str]
    values: tuple[float, ...]

    def value(self, series: str, layer: int | None = None) -> float:
        """One number; `layer` counts from 0 in `layers`."""
        return self.values[INDEX[series] if layer is None else layer_index(layer, series)]


def layer_start(layer: int) -> int:
    """The place of a layer's first series; `layer` counts from 0."""
    return len(SERIES) + layer * len(LAYER_SERIES)


def layer_index(layer: int, series: str) -> int:
    """The place of a per-layer series; `layer` counts from 0."""
    return layer_start(layer) + LAYER_INDEX[series]


def num_series(num_layers: int) -> int:
    """Numbers in a file that counts `num_layers` layers one by one."""
    return len(SERIES) + num_layers * len(LAYER_SERIES)


def read_counters(path: Path) -> Snapshot:
    """Read a file of `Counters`."""
    content = path.read_bytes()
    (length,) = _LENGTH.unpack_from(content)
    header = json.loads(content[_LENGTH.size : _LENGTH.size + length])
    values = struct.unpack_from(f"{num_series(len(header['layers']))}d", content, HEADER_BYTES)
    return Snapshot(**header, values=values)


def _unlink(path: Path, lock: int, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        with contextlib.suppress(OSError):  # its folder may be gone, or something else by now
            path.unlink()
        release_lock(lock)
