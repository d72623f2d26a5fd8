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

_PERIOD_SECONDS = 0.1
_UNSEEN_STEPS = 64
"""So many engine steps, more than any host runs ahead of its GPU, cannot all have passed the layers by."""
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
    """Publishes one worker's numbers, and tells look-ahead what its guesses came to: when an engine step ends, or on a
    GPU, where words are written a step later, on a thread of its own ten times a second.

    Once words say that tokens may be wrong, every step ends in RuntimeError.
    """

    def __init__(
        self, counters: Counters, caches: Caches | None, look_ahead: Guesser | None, layers: Sequence[str] = ()
    ) -> None:
        """`caches`: None where every expert is resident. `layers`: their names; else they are numbered."""
        self.counters = counters
        self.clock = StepClock(counters)
        self._caches = caches
        self._look_ahead = look_ahead
        self._layers = layers or range(0 if caches is None else len(caches.layers))
        self._on_device = caches is not None and caches.on_device
        self._ledger: Ledger | None = None
        self._totals = self.clock.totals
        self._num_unseen = 0
        """Engine steps since a layer's words changed."""
        self._fault = ""
        self._lock = threading.Lock()
        self._looks_at, self._has_complained = 0.0, False
        if caches is not None:
            record_bytes = [0 if cache is None else cache.record_bytes for cache in caches.layers]
            rate = counters.get("link_bytes_per_second")
            self._ledger = Ledger(counters, record_bytes, caches.mirror, rate, caches.ghost_mirror)
            if self._on_device:
                held = weakref.ref(self)
                threading.Thread(
                    target=_publish_now_and_then, args=(held,), name="expert-prefetch", daemon=True
                ).start()

    def step_begins(self, num_prefilling: int, num_decoding: int, continues: bool) -> None:
        """See `StepClock.begin`."""
        self._check()
        self.clock.begin(num_prefilling, num_decoding, continues)
        if self._look_ahead is not None:
            self._look_ahead.begin_step(self.clock.num_one_token_each)

    def step_ended(self) -> None:
        """One engine step is over."""
        self.clock.end()
        if not self._on_device:
            self.publish()
        self._check()
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
            before, self._totals = self._totals, self.clock.totals
            num_steps, num_decodes, spent = (now - then for now, then in zip(self._totals, before, strict=True))
            self._look_for_faults(deltas, int(num_steps))
            if self._look_ahead is not None:
                # Where there were other steps as well, what the words say is not of decode steps alone.
                self._look_ahead.note(deltas, spent / num_decodes if 0 < num_decodes == num_steps else None)
                self._look_ahead.publish(self.counters)

    def _look_for_faults(self, deltas: Sequence[Words], num_steps: int) -> None:
        assert self._caches is not None
        faults = [
            f"layer {name}: {delta.errors} copies were refused, {delta.out_of_range} routed ids name no expert"
            for name, delta in zip(self._layers, deltas, strict=True)
            if delta.errors or delta.out_of_range
        ]
        self._num_unseen = 0 if any(delta.steps for delta in deltas) else self._num_unseen + num_steps
        needs_all = all(cache is None or cache.expert_map is None for cache in self._caches.layers)
        if self._on_device and needs_all and self._num_unseen >= _UNSEEN_STEPS:
            faults.append(f"no MoE layer has seen a token in {self._num_unseen} steps")
        if faults and not self._fault:
            self._fault = (
                f"expert_prefetch: {faults[0]}: tokens since then may be wrong, and none is served any more. Start "
                "again, with self_check on; if it comes back, serve without the plugin, and please report it"
            )
            _logger.error(self._fault)

    def _check(self) -> None:
        if self._fault:
            raise RuntimeError(self._fault)


def _publish_now_and_then(held: "weakref.ref[Publisher]") -> None:
    """For as long as the publisher lives: the thread does not keep it, nor its caches, alive."""
    while True:
        time.sleep(_PERIOD_SECONDS)
        publisher = held()
        if publisher is None:
            return
        publisher.publish()
        del publisher
