"""`vllm serve` in processes of its own, on loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vllm_expert_prefetch.bench import BenchError

SERVED_NAME = "bench"
_LAST_LINES, _ERROR_LINES = 12, 3
_STOP_SECONDS, _POLL_SECONDS = 30, 0.2


class DidNotStart(Exception):
    """A server that ended before it was ready; the message is the end of its log."""


@contextlib.contextmanager
def serve(
    arguments: Sequence[str], log: Path, seconds: float, waiting: Callable[[float], None] = lambda seconds: None
) -> Iterator[str]:
    """A ready server's URL. Everything it started is gone afterwards.

    `seconds`: for starting; `waiting` is told now and then how many have passed. Raises DidNotStart.
    """
    port = _free_port()
    command = [_vllm(), "serve", *arguments, "--port", str(port), "--host", "127.0.0.1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--served-model-name", SERVED_NAME],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log, seconds, waiting)
        yield url
    finally:
        _stop(process)


def read(url: str) -> str:
    """A page of a server."""
    with urllib.request.urlopen(url, timeout=30) as page:
        return str(page.read().decode())


def _wait(
    process: "subprocess.Popen[bytes]", url: str, log: Path, seconds: float, waiting: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if process.poll() is not None:
            raise DidNotStart(_end_of(log))
        with contextlib.suppress(urllib.error.URLError, OSError):
            read(f"{url}/health")
            return
        waiting(passed)
        time.sleep(_POLL_SECONDS)
    raise DidNotStart(f"not ready after {seconds:.0f} s: {_end_of(log)}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """It, and what is left of the session that it began, in which nothing else can be."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_STOP_SECONDS)


def _end_of(log: Path) -> str:
    """The last error that the log tells, or its last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if "Error: " in line]
    return " ".join(lines[errors[-1] :][:_ERROR_LINES] if errors else lines[-_LAST_LINES:])


def _vllm() -> str:
    """The `vllm` beside this Python."""
    found = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    if not found:
        raise BenchError("there is no vllm command beside this Python: pip install vllm")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
