"""A port of the worker's own: workers on other hosts than the API server cannot share files with it."""

import weakref
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from vllm_expert_prefetch.metrics.collector import ExpertPrefetchCollector
from vllm_expert_prefetch.metrics.counters import Counters


def serve_counters(counters: Counters, port: int) -> None:
    """Show the numbers of `counters`, and of no other worker, on http://HOST:port/metrics while they live.

    Raises OSError naming the port and the setting when it is taken.
    """
    registry = CollectorRegistry()
    registry.register(ExpertPrefetchCollector(counters.path.parent, counters.path.name))
    try:
        server, _ = start_http_server(port, registry=registry)
    except OSError as error:
        raise OSError(
            f"expert_prefetch: port {port} for this worker's metrics cannot be used ({error.strerror}). metrics_port "
            "is the port of the first worker on a host, the next ones follow: choose another"
        ) from error
    weakref.finalize(counters, _stop, server)


def _stop(server: WSGIServer) -> None:
    server.shutdown()
    server.server_close()
