"""Timing of engine steps, in the worker."""

import time
from bisect import bisect_left
from collections.abc import Callable

from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.metrics.definitions import INDEX, PHASES, STEP_BUCKETS, histogram_series

_PREFILL, _DECODE, _MIXED = PHASES


class StepClock:
    """Counts and times the steps of one worker: `steps_total`, `step_seconds` and `tpot_seconds`.

    A step that continues the one before lasts from that one's end to its own: what its sequences waited for a token.
    Where kernels run behind the host, that pace is the accelerator's, while a call only issues work. After an idle time
    a step lasts from its own start. `now` gives seconds that never run backwards.
    """

    def __init__(self, counters: Counters, now: Callable[[], float] = time.perf_counter) -> None:
        self._add = counters.add
        self._now = now
        self._steps = {phase: INDEX[f"steps_total/{phase}"] for phase in PHASES}
        self._seconds = {phase: _places(f"step_seconds/{phase}") for phase in PHASES}
        self._tpot = _places("tpot_seconds")
        self._phase: str | None = None
        self._num_decoding = 0
        self._from = self._end = now()
        self.seconds = 0.0
        """What the last step took."""
        self.totals = 0, 0, 0.0
        """Steps that have ended, how many of them were decode steps, and the seconds of these. Other threads may read
        it: it is replaced as a whole."""

    def begin(self, num_prefilling: int, num_decoding: int, continues: bool) -> None:
        """A step starts with so many sequences in their prompt and so many beyond their first token.

        `continues`: some of them were in the step before, so that the engine has not been idle since.
        """
        self._phase = _DECODE if not num_prefilling else _MIXED if num_decoding else _PREFILL
        self._num_decoding = num_decoding
        self._from = self._end if continues else self._now()

    @property
    def num_one_token_each(self) -> int:
        """Sequences of the step that has begun, when all of them are beyond their first token; 0 otherwise."""
        return self._num_decoding if self._phase is _DECODE else 0

    def end(self) -> None:
        """The step that began has its tokens, or its work is issued. Without one that began, nothing happens."""
        phase = self._phase
        if phase is None:
            return
        self._phase = None
        self._end = now = self._now()
        self.seconds = seconds = now - self._from
        num_steps, num_decodes, spent = self.totals
        is_decode = phase is _DECODE
        self.totals = num_steps + 1, num_decodes + is_decode, spent + is_decode * seconds
        bucket = bisect_left(STEP_BUCKETS, seconds)
        self._add(self._steps[phase], 1)
        buckets, total = self._seconds[phase]
        self._add(buckets + bucket, 1)
        self._add(total, seconds)
        if self._num_decoding:
            buckets, total = self._tpot
            self._add(buckets + bucket, self._num_decoding)
            self._add(total, seconds * self._num_decoding)


def _places(stem: str) -> tuple[int, int]:
    """Where a histogram's first bucket and its sum are; its buckets are neighbours."""
    keys = histogram_series(stem, STEP_BUCKETS)
    return INDEX[keys[0]], INDEX[keys[-1]]
