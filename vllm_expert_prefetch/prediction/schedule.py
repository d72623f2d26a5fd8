"""What to do with a prediction: how much of it to fetch, and whether fetching pays at all."""

import math

import torch

from vllm_expert_prefetch.prediction.routing import Prediction

_WINDOW_STEPS = 16
_FIRST_HOLD, _LONGEST_HOLD = 4, 64
_MARGIN = 0.98
"""Fetching must cost at most this share of what not fetching costs: a draw is not worth the traffic."""
_WINDOW_WEIGHT = 0.125


def most_wanted(prediction: Prediction, num_experts: int) -> torch.Tensor:
    """The union of all rows' guesses, int64, by falling sum of their gate weights.

    A prediction of one row is in that order already.
    """
    if prediction.ids.shape[0] == 1:
        return prediction.ids[0]
    mass = torch.zeros(num_experts).index_add_(0, prediction.ids.flatten(), prediction.weights.flatten())
    mass.index_add_(0, prediction.ids.flatten(), torch.full((prediction.ids.numel(),), 1e-9))  # guessed at all
    num_wanted = int((mass > 0).sum())
    return mass.topk(num_wanted)[1]


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
        """So much time was there, between a prefetch for the layer and the layer."""
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


class SelfGate:
    """Decides for one layer whether its prefetch pays, by comparing what steps cost with it and without it.

    The cost of a step is what the layer waited for its experts, plus what predicting them took. Windows of 16 steps
    with and without prefetch are compared; the cheaper way is then held, and the other one tried for a window now and
    then: the longer ago, the clearer the last comparison was. Never closed where `forced`.
    """

    def __init__(self, forced: bool = False) -> None:
        self.is_open = True
        self._forced = forced
        self._cost: dict[bool, float | None] = {True: None, False: None}
        self._seconds = 0.0
        self._num_steps = 0
        self._hold = 0
        self._next_hold = _FIRST_HOLD

    def note(self, seconds: float) -> None:
        """A step of the layer is over: what it waited, and what was spent on predicting for it."""
        if self._forced:
            return
        self._seconds += seconds
        self._num_steps += 1
        if self._num_steps == _WINDOW_STEPS:
            self._cost[self.is_open] = self._seconds / _WINDOW_STEPS
            self._seconds, self._num_steps = 0.0, 0
            self._choose()

    def _choose(self) -> None:
        with_it, without_it = self._cost[True], self._cost[False]
        if with_it is None or without_it is None:
            self.is_open = not self.is_open
            return
        best = with_it <= _MARGIN * without_it
        if self._hold == 0:  # the window that is over was a trial
            self._next_hold = min(2 * self._next_hold, _LONGEST_HOLD) if best != self.is_open else _FIRST_HOLD
            self._hold = self._next_hold
            self.is_open = best
            return
        self._hold -= 1
        self.is_open = best if self._hold else not best
