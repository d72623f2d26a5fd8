"""Where a recording goes: a folder of its own, bounded together with the older recordings beside it."""

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.trace import SUFFIX, Trace, write_trace

_logger = logging.getLogger("vllm.expert_prefetch")
_PREFIX = "trace-"
MB = 10**6
MOST_PENDING = 64
"""Files that may wait for the disk."""


class TraceFolder:
    """`directory/trace-TIME-PID/000001.safetensors` and so on, written by a thread.

    The oldest files of all recordings in `directory` go when they are larger than `limit_bytes` together.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """Raises TraceError where nothing can be written."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        self.path = directory.absolute() / f"{_PREFIX}{stamp}-{os.getpid()}"
        self.problem: str | None = None
        """Why nothing is written any more."""
        self._directory, self._limit = directory, limit_bytes
        self._number = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise TraceError(f"{directory}: {error.strerror}: give a folder that the server may write to") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expert-prefetch-trace")
        self._pending: list[Future[None]] = []

    def write(self, trace: Trace) -> None:
        """Write the next file behind the caller's back. A disk that fails or cannot keep up ends the recording."""
        self._pending = [file for file in self._pending if not file.done()]
        if len(self._pending) > MOST_PENDING:
            self._stop("the disk cannot keep up")
        if self.problem is None:
            self._number += 1
            self._pending.append(self._thread.submit(self._write, trace, self._number))

    def close(self, last: Trace | None = None) -> None:
        """Write the `last` file, and wait for those before it; a recording without a file leaves no folder."""
        self._thread.shutdown()
        if last is not None and self.problem is None:
            self._write(last, self._number + 1)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _write(self, trace: Trace, number: int) -> None:
        try:
            self._make_room(write_trace(self.path / f"{number:06d}{SUFFIX}", trace, number))
        except OSError as error:
            self._stop(f"{self.path}: {error.strerror}")

    def _make_room(self, num_bytes: int) -> None:
        """`num_bytes`: of the newest file, which stays. Another server may be at the same."""
        sizes = {}
        for file in sorted(self._directory.glob(f"{_PREFIX}*/[0-9]*{SUFFIX}")):
            with suppress(FileNotFoundError):
                sizes[file] = file.stat().st_size
        excess = sum(sizes.values()) - max(self._limit, num_bytes)
        for file, size in sizes.items():
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= size
            if file.parent != self.path:
                with suppress(OSError):  # it holds more
                    file.parent.rmdir()

    def _stop(self, problem: str) -> None:
        if self.problem is None:
            _logger.warning("expert_prefetch: the recording of routing has stopped: %s", problem)
        self.problem = problem
