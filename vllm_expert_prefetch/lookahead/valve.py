"""Whether fetching ahead pays for a layer, and how much of a guess its link has time for."""

import math

from vllm_expert_prefetch.cache.words import Words

_WINDOW_STEPS = 16
_COUNTED_WINDOW_STEPS = 64
_FIRST_HOLD, _LONGEST_HOLD = 4, 64
"""In windows."""
_MARGIN = 0.98
"""Fetching must cost at most this share of what not fetching costs: a draw is not worth the traffic."""
_WASTE = 0.25
"""What a copy for nothing costs, in misses: it yields to demands, but takes the link from what is wanted next."""
_WINDOW_WEIGHT = 0.125


class Valve:
    """Decides for one layer whether its prefetch pays: a trial now and then, and what was found best is held.

    Two rules. Where waiting is timed, windows of 16 steps with and without prefetch are compared by what they cost:
    seconds waited for experts, and spent on predicting them. Where nothing is timed, a window of 64 steps with prefetch
    pays unless it saves fewer misses than it causes, a copy for nothing counted as a quarter. The longer prefetch has
    not paid, or the clearer the comparison was, the rarer the trials. Never closed where `forced`.
    """

    def __init__(self, forced: bool, is_timed: bool) -> None:
        self.is_open = True
        self._forced = forced
        self._is_timed = is_timed
        self._cost: dict[bool, float | None] = {True: None, False: None}
        self._num_steps = 0
        self._seconds = self._gain = 0.0
        self._hold = 0
        self._next_hold = _FIRST_HOLD

    def note(self, delta: Words, spent_seconds: float) -> None:
        """What the layer did since the last call, and what was spent on predicting for it. Wide steps do not count."""
        num_steps = delta.steps - delta.wide_steps
        if self._forced or num_steps <= 0:
            return
        self._num_steps += num_steps
        self._seconds += delta.stall_ns * 1e-9 * num_steps / delta.steps + spent_seconds
        self._gain += delta.used - delta.claimed - delta.displaced - _WASTE * delta.unused
        if self._num_steps >= (_WINDOW_STEPS if self._is_timed else _COUNTED_WINDOW_STEPS):
            self._cost[self.is_open] = self._seconds / self._num_steps
            pays = self._pays()
            self._num_steps, self._seconds, self._gain = 0, 0.0, 0.0
            self._choose(pays)

    def _pays(self) -> bool | None:
        """Whether to fetch, by the rule; None where the other way must be tried first."""
        if not self._is_timed:
            return self._gain >= 0 if self.is_open else None
        with_it, without_it = self._cost[True], self._cost[False]
        return None if with_it is None or without_it is None else with_it <= _MARGIN * without_it

    def _choose(self, pays: bool | None) -> None:
        if self._is_timed and pays is None:
            self.is_open = not self.is_open
            return
        if self._hold == 0:  # the window that is over was a trial, or the beginning
            best = bool(pays)
            same_as_tried = best == self.is_open
            self._next_hold = _FIRST_HOLD if same_as_tried else min(2 * self._next_hold, _LONGEST_HOLD)
            self._hold = self._next_hold if self._is_timed or not best else 0
            self.is_open = best
            return
        self._hold -= 1
        best = self.is_open if pays is None else pays
        self.is_open = best if self._hold else not best


class Budget:
    """How many of a layer's records may be on their way: as many as the link can begin before the layer needs them.

    The next step cancels what has not begun by then, but what was evicted for it is gone.
    """

    def __init__(self, record_seconds: float, most: int) -> None:
        """`record_seconds`: what one record takes on the link, as measured. `most`: the layer's slots."""
        self._record_seconds = record_seconds
        self._most = most
        self._window: float | None = None

    def note(self, seconds: float) -> None:
        """So much time there is between a prefetch for the layer and the layer."""
        window = seconds if self._window is None else self._window
        self._window = window + _WINDOW_WEIGHT * (seconds - window)

    @property
    def num_records(self) -> int:
        """1 to `most`; `most` while nothing is known."""
        if self._window is None or self._record_seconds <= 0:
            return self._most
        return max(1, min(self._most, math.ceil(self._window / self._record_seconds)))

    @property
    def has_time(self) -> bool:
        """Whether a whole record fits: only then is a less likely guess worth a try."""
        return self._window is None or self._window >= self._record_seconds
