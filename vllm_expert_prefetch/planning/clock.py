"""The virtual clock of a replay: what records and layers take."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.tracing.trace import Trace


@dataclass(frozen=True)
class Clock:
    """Seconds, or any other unit, the same for all of it."""

    record: tuple[float, ...]
    """What one record of each layer takes on the link."""
    compute: NDArray[np.float64]
    """(S): what one layer computes in each step."""


def clock_of(trace: Trace, link_bytes_per_second: float | None, layer_seconds: float | None) -> Clock | None:
    """In seconds. None stands for what was recorded: the link as measured at start, and each step's own time less what
    it waited, an equal part for each layer. Returns None where neither is known.
    """
    rate = trace.card.link_bytes_per_second if link_bytes_per_second is None else link_bytes_per_second
    compute = np.maximum(trace.seconds - trace.stalls, 0).astype(np.float64) / trace.card.num_layers
    if layer_seconds is not None:
        compute = np.full(len(trace), layer_seconds)
    if not rate or not compute.any():
        return None
    return Clock(tuple(size / rate for size in trace.card.record_bytes), compute)
