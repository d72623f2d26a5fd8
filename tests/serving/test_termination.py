"""When a server that gets SIGTERM is ended by force: after vLLM's own time to finish requests, not before."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest

from vllm_expert_prefetch.serving import termination


@pytest.fixture
def clock(monkeypatch):
    """Seconds slept, and exit codes; nothing waits, nothing ends."""
    seen = SimpleNamespace(slept=[], codes=[])
    monkeypatch.setattr(termination, "time", SimpleNamespace(sleep=seen.slept.append, monotonic=time.monotonic))
    monkeypatch.setattr(termination, "_exit", seen.codes.append)
    monkeypatch.setattr(termination.multiprocessing, "active_children", list)
    # Names of the module, not of `time` and `threading`: threads of other tests go on with theirs.
    started = lambda target, args=(), daemon=None: SimpleNamespace(start=lambda: target(*args))  # noqa: E731
    monkeypatch.setattr(
        termination,
        "threading",
        SimpleNamespace(Thread=started, current_thread=threading.current_thread, main_thread=threading.main_thread),
    )
    return seen


@pytest.mark.parametrize("drain_seconds", [0, 60])
def test_requests_get_the_time_that_vllm_gives_them(clock, drain_seconds):
    handled = []
    end = termination._ending_handler(lambda number, frame: handled.append(number), drain_seconds)
    end(signal.SIGTERM, None)
    assert handled == [signal.SIGTERM]
    assert clock.slept == [drain_seconds + termination.GRACE_SECONDS]
    assert clock.codes == [128 + signal.SIGTERM]


def test_the_configured_time_is_passed_on(clock, monkeypatch):
    def of_vllm(number, frame):
        pass

    of_vllm.__module__ = "vllm.entrypoints.cli.serve"
    installed = []
    monkeypatch.setattr(termination.signal, "getsignal", lambda number: of_vllm)
    monkeypatch.setattr(termination.signal, "signal", lambda number, handler: installed.append(handler))
    monkeypatch.setattr(termination, "_end_after_engines", lambda: None)
    termination.make_server_interruptible(60)
    installed[0](signal.SIGTERM, None)
    assert clock.slept == [60 + termination.GRACE_SECONDS]
