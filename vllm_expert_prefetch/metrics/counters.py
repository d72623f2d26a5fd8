"""The worker's side: numbers in a small private file, mapped into memory, that the API server reads."""

import json
import mmap
import os
import struct
import weakref
from collections.abc import Mapping
from pathlib import Path

from vllm_expert_prefetch.metrics.definitions import INDEX, SERIES

SUFFIX = ".counters"
HEADER_BYTES = 4096
_LENGTH = struct.Struct("<I")
_DOUBLE = 8


class Counters:
    """One float64 per series of `definitions.SERIES`. `add` is one memory write, seen at once by the reader."""

    def __init__(self, path: Path, labels: Mapping[str, str], info: Mapping[str, str]) -> None:
        """Create `path` (mode 0600). `labels` are those of `COMMON_LABELS`, `info` those of `INFO_LABELS`."""
        self.path = path
        header = json.dumps({"labels": dict(labels), "info": dict(info), "series": SERIES, "pid": os.getpid()}).encode()
        if len(header) > HEADER_BYTES - _LENGTH.size:
            raise ValueError(f"metrics header of {len(header)} bytes exceeds {HEADER_BYTES - _LENGTH.size}")
        size = HEADER_BYTES + _DOUBLE * len(SERIES)
        # Written under another name first: a reader must never see half a file.
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._map[: _LENGTH.size + len(header)] = _LENGTH.pack(len(header)) + header
        self._values = memoryview(self._map)[HEADER_BYTES:].cast("d")
        temporary.rename(path)
        weakref.finalize(self, _unlink, path, os.getpid())

    def add(self, index: int, amount: float) -> None:
        """Increase a counter; `index` is `definitions.INDEX[series]`."""
        self._values[index] += amount

    def set(self, series: str, value: float) -> None:
        """Set a gauge."""
        self._values[INDEX[series]] = value

    def get(self, series: str) -> float:
        """The present value."""
        return self._values[INDEX[series]]


def read_counters(path: Path) -> tuple[dict[str, str], dict[str, str], dict[str, float], int]:
    """Read a file of `Counters`: labels, info, value per series, pid of the writer."""
    content = path.read_bytes()
    (length,) = _LENGTH.unpack_from(content)
    header = json.loads(content[_LENGTH.size : _LENGTH.size + length])
    values = struct.unpack_from(f"{len(header['series'])}d", content, HEADER_BYTES)
    return header["labels"], header["info"], dict(zip(header["series"], values, strict=True)), header["pid"]


def _unlink(path: Path, owner_pid: int) -> None:
    if os.getpid() == owner_pid:
        path.unlink(missing_ok=True)
