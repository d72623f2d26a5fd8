"""How fast the link is, measured once when a server starts."""

import time

import torch

from vllm_expert_prefetch.experts.staging import TorchStaging

_REPEATS = 5


def measure_bandwidth(staging: TorchStaging, loads: list[tuple[int, int]]) -> float:
    """Bytes per second of staging `loads`, the best of a few times; 0 without loads.

    `loads` are (expert, slot) pairs that are in these slots already: copying them again changes nothing. Nothing is
    counted. The best, because whatever else the machine does can only slow a copy down.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    best = 0.0
    for _ in range(_REPEATS if loads else 0):
        started = time.perf_counter()
        staging.stage(loads)
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, staging.record_bytes * len(loads) / (time.perf_counter() - started))
    staging.reset_totals()
    return best
