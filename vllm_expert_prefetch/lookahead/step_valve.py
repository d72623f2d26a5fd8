"""Whether looking ahead pays for decode steps as a whole."""

from collections import defaultdict

_WINDOW_STEPS = 16
_TRIAL_STEPS = 8 * _WINDOW_STEPS
_FIRST_HOLD, _LONGEST_HOLD = 128, 8192
"""In steps."""
_MARGIN = 0.99
"""Steps must take at most this share of what they take without: a draw is not worth the traffic."""
_COUNTED = 7 / 8
"""The share of the steps, the shortest ones, that counts: the others are other programs' doing."""


class StepValve:
    """Open while decode steps are shorter with look-ahead than without it.

    A step takes more for looking ahead than what can be timed around a guess: copies wake the thread that copies, and
    take caches and memory from the kernels. So steps as a whole are timed, in windows with and without look-ahead in
    turn, and each number of sequences is compared with itself. What was found is held: the longer, the oftener it was
    found in a row. The first trial comes when layers have found how far each of them looks.
    """

    def __init__(self) -> None:
        self.is_open = self._best = True
        self._hold = self._next_hold = _FIRST_HOLD
        self._num_timed = 0
        self._seconds: defaultdict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        """Of the steps of a trial, by number of sequences: those without look-ahead, those with it."""

    def note(self, seconds: float, num_sequences: int) -> None:
        """A decode step of so many sequences took so long."""
        if self._hold:
            self._hold -= 1
            return
        self._seconds[num_sequences][self.is_open].append(seconds)
        self._num_timed += 1
        if self._num_timed % _WINDOW_STEPS == 0:
            self.is_open = not self.is_open
        if self._num_timed == _TRIAL_STEPS:
            self._choose()

    def _choose(self) -> None:
        pairs = [pair for pair in self._seconds.values() if all(pair)]
        weights = [min(map(len, pair)) for pair in pairs]
        without, looking = (
            sum(weight * _typical(pair[side]) for weight, pair in zip(weights, pairs, strict=True)) for side in (0, 1)
        )
        best = looking <= _MARGIN * without if pairs else self._best
        self._next_hold = min(2 * self._next_hold, _LONGEST_HOLD) if best == self._best else _FIRST_HOLD
        self._hold, self._best, self.is_open = self._next_hold, best, best
        self._num_timed = 0
        self._seconds.clear()


def _typical(seconds: list[float]) -> float:
    counted = sorted(seconds)[: max(1, int(_COUNTED * len(seconds)))]
    return sum(counted) / len(counted)
