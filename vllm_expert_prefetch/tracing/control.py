"""The control socket of a worker: one JSON request and one JSON answer a connection, in the server's private folder."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.tracing.card import TraceError

SUFFIX = ".trace"
_TIMEOUT_SECONDS = 90
_MOST_BYTES = 1 << 16


def serve_control(path: Path, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable[[], None]:
    """Answer requests at `path` (mode 0600), in a thread, until the process ends or what is returned is called.

    What lies at `path` is of a worker that is gone. Raises OSError.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen()
    threading.Thread(target=_serve, args=(listener, answer), name="expert-prefetch-control", daemon=True).start()

    def close() -> None:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # ends the thread, which waits for the next request
        path.unlink(missing_ok=True)

    return close


def ask(path: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer of whoever serves `path`; None where its worker is gone. Raises TraceError with what it objects to, or
    where it does not answer."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_TIMEOUT_SECONDS)
    try:
        with connection, _short(path) as name:
            connection.connect(name)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile().readline())
    except ConnectionRefusedError:
        return None
    except (OSError, ValueError) as error:
        raise TraceError(f"the server at {path} does not answer ({error})") from error
    if "error" in answer:
        raise TraceError(answer["error"])
    return answer


def _serve(listener: socket.socket, answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            listener.close()
            return
        with suppress(OSError, ValueError), connection:
            connection.settimeout(_TIMEOUT_SECONDS)
            request = json.loads(connection.makefile().readline(_MOST_BYTES))
            found = answer(request) if isinstance(request, dict) else {"error": "a request is an object"}
            connection.sendall(json.dumps(found).encode() + b"\n")


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of at most 107 bytes for the socket `path`, as Linux wants it."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
