"""From what the layers' caches have written down to the worker's counters: at one place, for every platform."""

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol

from vllm_expert_prefetch.cache.base import Caches
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.metrics.ledger import Ledger
from vllm_expert_prefetch.metrics.steps import StepClock

_PERIOD_SECONDS = 0.5
_LOOK_SECONDS = 5.0
"""How often the file of the counters is looked for."""
_logger = logging.getLogger("vllm.expert_prefetch")


class Guesser(Protocol):
    """What the publisher asks of look-ahead."""

    def begin_step(self, num_one_token_each: int) -> None:
        """An engine step begins."""

    def note(self, deltas: Sequence[Words], decode_step_seconds: float | None) -> None:
        """What the layers did since the last call."""

    def publish(self, counters: Counters) -> None:
        """Bring what the counters say of guesses up to date."""


class Publisher:
    """Publishes one worker's numbers when an engine step ends, and tells look-ahead what its guesses came to.

    On a GPU the words are written a step later, so that a thread publishes as well, twice a second.
    """

    def __init__(self, counters: Counters, caches: Caches | None, look_ahead: Guesser | None) -> None:
        """`caches`: None where every expert is resident."""
        self.counters = counters
        self.clock = StepClock(counters)
        self._caches = caches
        self._look_ahead = look_ahead
        self._ledger: Ledger | None = None
        self._decoded = (0.0, 0.0)
        self._lock = threading.Lock()
        self._looks_at, self._has_complained = 0.0, False
        if caches is not None:
            record_bytes = [0 if cache is None else cache.record_bytes for cache in caches.layers]
            rate = counters.get("link_bytes_per_second")
            self._ledger = Ledger(counters, record_bytes, caches.mirror, rate, caches.ghost_mirror)
            if caches.on_device:
                held = weakref.ref(self)
                threading.Thread(
                    target=_publish_now_and_then, args=(held,), name="expert-prefetch", daemon=True
                ).start()

    def step_begins(self, num_prefilling: int, num_decoding: int, continues: bool) -> None:
        """See `StepClock.begin`."""
        self.clock.begin(num_prefilling, num_decoding, continues)
        if self._look_ahead is not None:
            self._look_ahead.begin_step(self.clock.num_one_token_each)

    def step_ended(self) -> None:
        """One engine step is over: time it, and publish."""
        self.clock.end()
        self.publish()
        if time.monotonic() > self._looks_at:
            self._looks_at = time.monotonic() + _LOOK_SECONDS
            self._keep_file()

    def _keep_file(self) -> None:
        try:
            if self.counters.keep():
                _logger.warning("expert_prefetch: %s was removed and is written anew", self.counters.path)
        except OSError as error:
            if not self._has_complained:
                _logger.warning("expert_prefetch: /metrics shows nothing of the plugin any more: %s", error)
            self._has_complained = True

    def publish(self) -> None:
        """Add what has come since the last time."""
        if self._ledger is None or self._caches is None:
            return
        with self._lock:
            deltas = self._ledger.publish()
            if self._look_ahead is not None:
                self._look_ahead.note(deltas, self._decode_step_seconds())
                self._look_ahead.publish(self.counters)

    def _decode_step_seconds(self) -> float | None:
        """What a decode step has taken since the last time; None when there was none."""
        steps, seconds = (self.counters.get(series) for series in ("steps_total/decode", "step_seconds/decode/sum"))
        num_steps, spent = steps - self._decoded[0], seconds - self._decoded[1]
        self._decoded = (steps, seconds)
        return spent / num_steps if num_steps else None


def _publish_now_and_then(held: "weakref.ref[Publisher]") -> None:
    """For as long as the publisher lives: the thread does not keep it, nor its caches, alive."""
    while True:
        time.sleep(_PERIOD_SECONDS)
        publisher = held()
        if publisher is None:
            return
        publisher.publish()
        del publisher
