"""vLLM with the plugin on a Ray cluster: `serve run deploy/ray-serve/serve.yaml`.

Every replica runs one `vllm serve` of its own and passes requests on to it, so that vLLM, its flags and its metrics are
the same as without Ray. The route /targets tells Prometheus (http_sd_configs) where each replica's /metrics is.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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
        """End it and everything that it started: an engine outlives a killed API server, and holds its memory."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
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


class Replica:
    """One server behind Ray Serve, deployed by `build`."""

    async def __init__(  # type: ignore[misc]  # Ray Serve waits for it
        self, arguments: list[str], environment: dict[str, str], targets: Any
    ) -> None:
        """Return when the server answers. RuntimeError when it ends instead."""
        import httpx
        from ray import serve

        # On the event loop's thread, which lives as long as the replica does: the server ends with that thread.
        self._server = VllmProcess(arguments, environment)
        self._client = httpx.AsyncClient(base_url=self._server.url, timeout=None, limits=httpx.Limits())
        self._targets = targets
        self._name = serve.get_replica_context().replica_id.unique_id
        while not await self._answers():
            await asyncio.sleep(0.5)
        await self.check_health()

    async def __call__(self, request: Any) -> Any:
        """Pass a request on, and its answer back as it comes."""
        from starlette.background import BackgroundTask
        from starlette.responses import JSONResponse, StreamingResponse

        if request.url.path == "/targets":
            return JSONResponse(await self._targets.all.remote())
        headers = {key: value for key, value in request.headers.items() if key not in _NOT_PASSED_ON}
        path = f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path
        passed_on = self._client.build_request(request.method, path, headers=headers, content=await request.body())
        answer = await self._client.send(passed_on, stream=True)
        return StreamingResponse(
            answer.aiter_raw(),
            answer.status_code,
            {key: value for key, value in answer.headers.items() if key not in _NOT_PASSED_ON},
            background=BackgroundTask(answer.aclose),
        )

    async def check_health(self) -> None:
        """Called by Ray now and then; RuntimeError makes it replace this replica."""
        from ray.util import get_node_ip_address

        if not await self._answers():
            raise RuntimeError("vllm does not answer its health check")
        await self._targets.hear.remote(self._name, f"{get_node_ip_address()}:{self._server.port}")

    async def _answers(self) -> bool:
        import httpx

        if self._server.process.poll() is not None:
            self._server.stop()
            raise RuntimeError(f"vllm has ended with exit code {self._server.process.returncode}; its log says why")
        try:
            return (await self._client.get("/health", timeout=10)).status_code == 200
        except httpx.TransportError:
            return False

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()


def build(settings: dict[str, Any]) -> Any:
    """Ray Serve's application. `settings`: `arguments` of `vllm serve`, without --port, and optionally `environment`.

    Raises ValueError for other settings.
    """
    import ray
    from ray import serve

    unknown = settings.keys() - {"arguments", "environment"}
    arguments = settings.get("arguments", [])
    if unknown or not arguments or "--port" in arguments:
        raise ValueError(
            "ray_serve: args takes `arguments` (a list for vllm serve, the model first, without --port: every replica "
            f"has its own) and `environment` (names and values); got {settings}"
        )
    targets = (
        ray.remote(num_cpus=0)(Targets)
        .options(name="expert-prefetch-targets", get_if_exists=True, lifetime="detached")
        .remote()
    )
    return serve.deployment(name="vllm")(Replica).bind(
        [str(argument) for argument in arguments], settings.get("environment", {}), targets
    )
