"""How fast the link is, measured once when a server starts."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch


class Copier(Protocol):
    """Whatever stages records of one layer."""

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""

    def stage(self, loads: Sequence[tuple[int, int]]) -> None:
        """Copy `(expert, slot)` pairs."""

    def reset_totals(self) -> None:
        """Forget what was counted."""


_PASSES = 2


def measure_bandwidth(copies: Sequence[tuple[Copier, tuple[int, int]]]) -> float:
    """Bytes per second of copies of one record each, the usual demand copy; 0 without any.

    Each of `copies` is a staging and an (expert, slot) pair that is in this slot already: copying it again changes
    nothing. One of each layer, so that no copy finds its record in a processor's cache. Nothing is counted. The faster
    of two passes: the first one finds pages that nothing has touched.
    """
    seconds = [_one_pass(copies) for _ in range(_PASSES)]
    for staging, _ in copies:
        staging.reset_totals()
    return sum(staging.record_bytes for staging, _ in copies) / min(seconds) if copies else 0.0


def _one_pass(copies: Sequence[tuple[Copier, tuple[int, int]]]) -> float:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    started = time.perf_counter()
    for staging, load in copies:
        staging.stage([load])
        if on_gpu:
            torch.cuda.synchronize()
    return time.perf_counter() - started
