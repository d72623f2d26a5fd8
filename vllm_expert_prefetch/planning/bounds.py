"""What no policy can beat."""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def belady_hits(
    ids: NDArray[np.int32], tokens: NDArray[np.int32], num_slots: int, counted: Sequence[bool] | NDArray[np.bool_]
) -> tuple[int, int]:
    """(hits, lookups) of one layer whose cache knows the future: what is needed last of all leaves.

    `ids` (N, K) and `tokens` (S) as in `Planner.plan_steps`. What a narrow step needs has a slot afterwards; a wide one
    has overflow rows, and evicts nobody who is needed sooner. Only steps that are `counted` (S) count.
    """
    ends = np.cumsum(tokens) * ids.shape[1]
    routed = ids.ravel().tolist()
    steps = [{*routed[begin:end]} - {-1} for begin, end in zip([0, *ends], ends, strict=False)]
    following = _next_uses(steps)
    resident: dict[int, int] = {}  # expert -> its next use
    heap: list[tuple[int, int]] = []
    hits = lookups = 0
    for needed, uses, counts in zip(steps, following, counted, strict=True):
        if counts:
            hits += len(resident.keys() & needed)
            lookups += len(needed)
        for expert in needed & resident.keys():
            del resident[expert]
        if len(needed) > num_slots:
            there = [(use, expert) for expert, use in resident.items()]
            kept = heapq.nsmallest(num_slots, [*there, *zip(uses, needed, strict=True)])
            resident.clear()
        else:
            kept = [*zip(uses, needed, strict=True)]
        while len(resident) + len(kept) > num_slots:
            use, expert = heapq.heappop(heap)
            if resident.get(-expert) == -use:
                del resident[-expert]
        for use, expert in kept:
            resident[expert] = use
            heapq.heappush(heap, (-use, -expert))
    return hits, lookups


def _next_uses(steps: list[set[int]]) -> list[list[int]]:
    """For each needed expert of each step, the number of the next step that needs it."""
    seen: dict[int, int] = {}
    found = []
    for number in range(len(steps) - 1, -1, -1):
        found.append([seen.get(expert, len(steps) + expert) for expert in steps[number]])
        seen.update(dict.fromkeys(steps[number], number))
    return found[::-1]


def bound(num_layers: int, num_misses: float, record_time: float) -> float:
    """What a step takes at least, in layers: computing, or copying what it misses without look-ahead."""
    return max(float(num_layers), num_misses * record_time)
