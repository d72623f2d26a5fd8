"""SIGTERM ends a server within seconds, also where vLLM's own way of ending gets stuck (both seen with 0.32).

While it starts, vLLM answers SIGTERM by raising KeyboardInterrupt; the API server then mostly sits in pyzmq's poll,
which drops the exception, and the server starts as if nothing had happened. While it serves, vLLM ends the engine at
once and then waits for the connections of requests that nobody will finish any more.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from vllm_expert_prefetch.memory.shared_store import remove_dead_stores
from vllm_expert_prefetch.metrics.runtime_dir import remove_runtime_dir

GRACE_SECONDS = 2.0
"""How long vLLM may take for each part of ending by itself."""


def make_server_interruptible(drain_seconds: float = 0) -> None:
    """Stand by for both cases, in the process of `vllm serve` alone: a program that uses `LLM` ends as it likes.

    `drain_seconds`: what vLLM was given to finish requests, `--shutdown-timeout`.
    """
    handler = signal.getsignal(signal.SIGTERM)
    of_vllms_server = callable(handler) and (getattr(handler, "__module__", None) or "").startswith("vllm.entrypoints")
    if threading.current_thread() is threading.main_thread() and callable(handler) and of_vllms_server:
        signal.signal(signal.SIGTERM, _ending_handler(handler, drain_seconds))
        threading.Thread(target=_end_after_engines, daemon=True).start()


def _ending_handler(
    handler: Callable[[int, FrameType | None], object], drain_seconds: float
) -> Callable[[int, FrameType | None], None]:
    """vLLM's handler and, should it be lost, an end all the same. With one API server vLLM replaces it when that is up;
    with several it stays, and requests may be under way.
    """

    def end(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=_end_start, args=(drain_seconds + GRACE_SECONDS,), daemon=True).start()
        handler(number, frame)

    return end


def _end_start(grace_seconds: float) -> None:
    time.sleep(grace_seconds)
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
    _exit(128 + signal.SIGTERM)


def _end_after_engines() -> None:
    """A server whose engine processes are all gone has nothing to wait for."""
    while not (children := multiprocessing.active_children()):
        time.sleep(GRACE_SECONDS / 4)
    sentinels = [child.sentinel for child in children]
    while sentinels:
        for ended in multiprocessing.connection.wait(sentinels):
            sentinels.remove(ended)  # type: ignore[arg-type]
    time.sleep(2 * GRACE_SECONDS)
    _exit(1)


def _exit(code: int) -> None:
    remove_runtime_dir()
    remove_dead_stores()
    os._exit(code)
