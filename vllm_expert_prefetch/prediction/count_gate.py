"""Whether fetching pays, where nothing waits for the GPU: a gate that reads counters."""

from typing import NamedTuple

_WINDOW_STEPS = 64
_FIRST_HOLD, _LONGEST_HOLD = 4 * _WINDOW_STEPS, 64 * _WINDOW_STEPS
_WASTE = 0.25
"""What a copy for nothing costs, in misses: it yields to demands, but takes the link from what is wanted next."""


class Outcomes(NamedTuple):
    """What became of one layer's prefetches over some steps."""

    steps: int
    saved: int
    """Misses that they made up for: needed, and there or on their way."""
    wasted: int
    """Copied, and not needed."""
    displaced: int
    """Misses on what they had evicted."""


class CountGate:
    """Decides for one layer whether its prefetch pays, from counts alone: no step is timed on a GPU.

    A window of 64 steps that saves fewer misses than it causes, waste counted as a quarter, closes the gate; after some
    steps it is open for a window again, the rarer the longer that does not pay. Never closed where `forced`.
    """

    def __init__(self, forced: bool = False) -> None:
        self.is_open = True
        self._forced = forced
        self._window = Outcomes(0, 0, 0, 0)
        self._hold = _FIRST_HOLD

    def note(self, outcomes: Outcomes) -> None:
        """What has come since the last call, in steps of the layer with the gate as it is."""
        if self._forced:
            return
        self._window = Outcomes(*(sum(pair) for pair in zip(self._window, outcomes, strict=True)))
        if self._window.steps < (_WINDOW_STEPS if self.is_open else self._hold):
            return
        if not self.is_open:
            self._hold = min(2 * self._hold, _LONGEST_HOLD)
            self.is_open = True
        elif self._window.saved < self._window.displaced + _WASTE * self._window.wasted:
            self.is_open = False
        else:
            self._hold = _FIRST_HOLD
        self._window = Outcomes(0, 0, 0, 0)
