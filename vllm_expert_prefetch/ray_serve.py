"""vLLM with the plugin on a Ray cluster: `serve run deploy/ray-serve/serve.yaml`.

Every replica runs one `vllm serve` of its own and passes requests on to it, so that vLLM, its flags and its metrics are
the same as without Ray. The route /targets tells Prometheus (http_sd_configs) where each replica's /metrics is.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

FORGET_SECONDS = 30.0
"""A replica that was not heard of for so long is no target any more."""
_NOT_PASSED_ON = {"host", "content-length", "connection", "transfer-encoding", "keep-alive"}


class VllmProcess:
    """One `vllm serve` on a free port of this host, ended with this process."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        program = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
        if program is None:
            raise RuntimeError("no vllm command beside this Python or in PATH: install vLLM on every node")
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        command = [program, "serve", *arguments, "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PARENT, *command], env={**os.environ, **environment}, start_new_session=True
        )

    @property
    def url(self) -> str:
        """Its address on this host."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End it and everything that it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed replica takes its server along
os.execv(sys.argv[1], sys.argv[1:])
"""


class Targets:
    """Which replicas there are, for Prometheus. One actor of the cluster."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}

    def hear(self, replica: str, address: str) -> None:
        """A replica is there, and its metrics are at `address` (host:port)."""
        self._seen[replica] = (address, time.monotonic())

    def all(self) -> list[dict[str, Any]]:
        """As Prometheus' HTTP service discovery reads it."""
        newest = time.monotonic() - FORGET_SECONDS
        return [
            {"targets": [address], "labels": {"replica": replica}}
            for replica, (address, heard) in sorted(self._seen.items())
            if heard > newest
        ]
