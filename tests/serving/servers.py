"""Real `vllm serve` processes for tests, on loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from engines import TINY_MODEL
from processes import is_running

START_SECONDS = 180


@dataclass
class Server:
    """A running server: its process, address, log file and private runtime directory."""

    process: subprocess.Popen
    url: str
    log: Path
    runtime: Path

    def complete(self, prompt: str, num_tokens: int = 16, model: str = "demo") -> str:
        """A greedy completion through the OpenAI endpoint, by the model or a LoRA adapter."""
        return self.answer(prompt, num_tokens, model)["choices"][0]["text"]

    def answer(self, prompt: str, num_tokens: int = 16, model: str = "demo") -> dict[str, Any]:
        """All that the endpoint says to a request for a completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        answer.raise_for_status()
        return answer.json()

    def chat(self, text: str, num_tokens: int = 8) -> str:
        """A greedy answer through the chat endpoint."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "demo", "messages": messages, "max_tokens": num_tokens, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
        answer.raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]

    def metrics(self) -> dict[str, float]:
        """The plugin's samples on /metrics: name with its labels -> value."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith("vllm_expert_prefetch_")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def wait_ready(self) -> None:
        """Until /health answers; AssertionError with the log when the process ends first."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.3)
        raise AssertionError(f"not ready after {START_SECONDS} s: {self.log.read_text()[-4000:]}")

    def stop(self, seconds: float) -> int:
        """SIGTERM; the exit code. subprocess.TimeoutExpired when it takes longer than `seconds`."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def all_gone(self, seconds: float) -> bool:
        """Whether every process of this server has ended, within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.descendants() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.descendants()

    def descendants(self) -> list[int]:
        """Process ids that belong to this server, itself included, and have not ended: they share its session."""
        return [pid for pid in _pids() if _session(pid) == self.process.pid and is_running(pid)]


@contextlib.contextmanager
def serve(*arguments: str, model: Path = TINY_MODEL, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Start `vllm serve`; not waited for. Everything it started is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        log = Path(directory) / "log"
        runtime = Path(directory) / "runtime"
        runtime.mkdir()
        command = [vllm_command(), "serve", str(model), "--port", str(port), "--served-model-name", "demo"]
        command += ["--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", "256M", *arguments]
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "XDG_RUNTIME_DIR": str(runtime),
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings, **(environment or {})},
                start_new_session=True,
            )
        server = Server(process, f"http://127.0.0.1:{port}", log, runtime)
        try:
            yield server
        finally:
            for pid in server.descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(30)


def vllm_command() -> str:
    """The `vllm` beside this Python."""
    found = shutil.which("vllm", path=str(Path(sys.executable).parent))
    assert found, "no vllm command beside this Python: run make setup"
    return found


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants_of(pid: int) -> list[int]:
    """Ids of the processes that `pid` started, and of those that these started."""
    parents = {child: _parent(child) for child in _pids()}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
