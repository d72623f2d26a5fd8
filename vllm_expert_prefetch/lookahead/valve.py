"""Whether fetching ahead pays for a layer, and how much of a guess its link has time for."""

import math

from vllm_expert_prefetch.cache.words import Words

_WINDOW_STEPS = 16
_COUNTED_WINDOW_STEPS = 64
_FIRST_HOLD, _LONGEST_HOLD = 8, 64
"""In windows."""
_MARGIN = 0.98
"""Fetching must cost at most this share of what not fetching costs: a draw is not worth the traffic."""
_CHANCE = 0.5
"""Of the standard deviation of a difference of costs, that it must be beyond."""
_COST_WEIGHT = 0.25
"""Of the last one of several windows in a row in what a depth is known to cost."""
_WASTE = 0.25
"""What a copy for nothing costs, in misses: it yields to demands, but takes the link from what is wanted next."""
_WINDOW_WEIGHT = 0.125
_LEAST_HIDDEN = 0.125
"""Of a record's time on the link that a guess must come before its layer: less hides nothing that a wrong guess does
not cost."""


class Valve:
    """Decides how deep look-ahead for one layer goes: guesses of distance 1 to `depth` are fetched, 0 for none.

    A trial of another depth now and then, and what was found best is held. Two rules. Where waiting is timed, windows
    of 16 steps are compared by what they cost: seconds waited for experts, and spent on predicting them. A greater
    depth must be cheaper, and by more than may be chance, as misses are few in a window. Where guessing one layer ahead
    takes as long as waiting does without, nothing can pay: only that is tried, rarely. Where nothing is timed, a window
    of 64 steps pays unless its prefetches save fewer misses than they cause, a copy for nothing counted as a quarter;
    one that does not takes a distance away. The longer the best has stayed the same, the rarer the trials. All
    distances, always, where `forced`.
    """

    def __init__(self, forced: bool, is_timed: bool, most: int = 1) -> None:
        """`most`: the greatest depth."""
        self.depth = min(1, most) if is_timed and not forced else most
        self._most = most
        self._forced = forced
        self._is_timed = is_timed
        self._costs: list[float | None] = [None] * (most + 1)
        self._variances = [0.0] * (most + 1)
        """Of these costs, if misses come by chance."""
        self._learned: int | None = None
        """The depth of the last window."""
        self._guessing: float | None = None
        """Seconds that a step's guesses of distance 1 took when they alone were made last."""
        self._best = most
        self._num_steps = 0
        self._seconds = self._spent = self._gain = 0.0
        self._num_missed = 0
        self._hold = 0
        self._next_hold = _FIRST_HOLD
        self._next_trial = 0

    def note(self, delta: Words, spent_seconds: float) -> None:
        """What the layer did since the last call, and what was spent on predicting for it. Nothing of it counts where
        a step was wide: what that waited for, used and missed is in the same sums."""
        if self._forced or delta.wide_steps or delta.steps <= 0:
            return
        self._num_steps += delta.steps
        self._seconds += delta.stall_ns * 1e-9 + spent_seconds
        self._spent += spent_seconds
        self._num_missed += delta.misses + delta.late
        self._gain += delta.used - delta.claimed - delta.displaced - _WASTE * delta.unused
        if self._num_steps >= (_WINDOW_STEPS if self._is_timed else _COUNTED_WINDOW_STEPS):
            if self._is_timed:
                self._learn(self._seconds / self._num_steps, (self._seconds - self._spent) / self._num_steps)
                if self.depth == 1:
                    self._guessing = self._spent / self._num_steps
                self._choose_by_time()
            else:
                self._choose_by_gain()
            self._num_steps, self._seconds, self._spent, self._gain = 0, 0.0, 0.0, 0.0
            self._num_missed = 0

    def _learn(self, seconds: float, waiting: float) -> None:
        """A step of the window cost so many seconds, of which it was `waiting` so many."""
        known, weight = self._costs[self.depth], _COST_WEIGHT
        if known is None or self.depth != self._learned:
            known, weight = seconds, 1.0
        self._learned = self.depth
        self._costs[self.depth] = known + weight * (seconds - known)
        variance = waiting**2 / self._num_missed if self._num_missed else 0.0
        self._variances[self.depth] = (1 - weight) ** 2 * self._variances[self.depth] + weight**2 * variance

    def _choose_by_time(self) -> None:
        waiting = self._costs[0]
        may_pay = waiting is None or self._guessing is None or self._guessing < _MARGIN * waiting
        candidates = range(self._most + 1 if may_pay else 2)
        unknown = [depth for depth in candidates if self._costs[depth] is None]
        if unknown:
            self.depth = unknown[0]
            return
        best = 0
        for depth in candidates:
            chance = math.sqrt(self._variances[depth] + self._variances[best])
            if self._cost(depth) + _CHANCE * chance <= _MARGIN * self._cost(best):
                best = depth
        if self._hold:
            self._hold -= 1
        elif not may_pay:
            self._next_hold = self._hold = _LONGEST_HOLD
        elif best == self._best:
            self._next_hold = self._hold = min(2 * self._next_hold, _LONGEST_HOLD)
        else:
            self._next_hold = self._hold = _FIRST_HOLD
        self._best = best
        self.depth = best if self._hold else self._trial(len(candidates))

    def _cost(self, depth: int) -> float:
        cost = self._costs[depth]
        assert cost is not None
        return cost

    def _trial(self, num_depths: int) -> int:
        """Every other one of the first depths in turn."""
        self._next_trial = (self._next_trial + 1) % num_depths
        if self._next_trial == self._best:
            return self._trial(num_depths)
        return self._next_trial

    def _choose_by_gain(self) -> None:
        if self.depth and self._gain < 0:
            # A trial that fails: what was before is the best, and the next trial comes later than this one.
            was_trial = self.depth > self._best
            self._next_hold = min(2 * self._next_hold, _LONGEST_HOLD) if was_trial else _FIRST_HOLD
            self.depth = self._best = self.depth - 1
            self._hold = self._next_hold
            return
        self._best = self.depth
        if self.depth < self._most:
            self._hold -= 1
            if self._hold <= 0:
                self.depth += 1


class Budget:
    """How many of a layer's records may be on their way: as many as the link can begin before the layer needs them.

    The next step cancels what has not begun by then, but what was evicted for it is gone.
    """

    def __init__(self, record_seconds: float, most: int) -> None:
        """`record_seconds`: what one record takes on the link, as measured. `most`: the layer's slots."""
        self.record_seconds = record_seconds
        self._most = most
        self._window: float | None = None

    def note(self, seconds: float) -> None:
        """So much time there is between a prefetch for the layer and the layer."""
        window = seconds if self._window is None else self._window
        self._window = window + _WINDOW_WEIGHT * (seconds - window)

    @property
    def num_records(self) -> int:
        """1 to `most`; `most` while nothing is known."""
        if self._window is None or self.record_seconds <= 0:
            return self._most
        return max(1, min(self._most, math.ceil(self._window / self.record_seconds)))

    @property
    def hides(self) -> bool:
        """Whether a copy that is right comes noticeably sooner than on demand."""
        return self._window is None or self._window >= _LEAST_HIDDEN * self.record_seconds

    @property
    def has_time(self) -> bool:
        """Whether a whole record fits: only then is a less likely guess worth a try."""
        return self._window is None or self._window >= self.record_seconds
