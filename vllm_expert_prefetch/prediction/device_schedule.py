"""What `schedule` decides, where nothing waits for the GPU: guesses of fixed size, and a gate that reads counters."""

from typing import NamedTuple

import torch

from vllm_expert_prefetch.prediction.routing import Prediction

_WINDOW_STEPS = 64
_FIRST_HOLD, _LONGEST_HOLD = 4 * _WINDOW_STEPS, 64 * _WINDOW_STEPS
_WASTE = 0.25
"""What a copy for nothing costs, in misses: it yields to demands, but takes the link from what is wanted next."""


def most_wanted_of(prediction: Prediction, real: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of all real rows' guesses, (1, P) int64, by falling sum of their gate weights, -1 where there is none;
    and (1,) int64, negative when no row is real.

    `real` (T,) int64 is negative for padding, whose weights may be anything and do not count; a prediction may speak of
    the first rows only. As `schedule.most_wanted`, by torch operations of fixed size, which a graph can capture.
    """
    ids, weights = prediction
    some = real if len(real) == 1 else real.amax(0, keepdim=True)
    if len(ids) == 1:
        return ids.contiguous(), some
    is_real = real[: len(ids)].unsqueeze(1) >= 0
    shares = torch.where(is_real, weights + 1e-9, 0.0)  # more than 0: guessed at all
    mass = torch.zeros(num_experts, device=ids.device).index_add_(0, ids.flatten(), shares.flatten())
    mass, wanted = mass.topk(min(ids.numel(), num_experts))
    return torch.where(mass > 0, wanted, -1).unsqueeze(0), some


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
