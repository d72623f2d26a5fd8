"""The native planner of one layer (csrc/residency.h), for replays: plain numpy arrays, no copies, no model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import POLICIES

LANDED, QUEUED, COPYING = 0, 1, 2
"""Where a prefetch into a slot stands, as csrc/slot_state.h has it; any other number: nothing is on its way."""


@dataclass(frozen=True)
class StepCounts:
    """What each of S steps came to, int32 (S) each."""

    needed: NDArray[np.int32]
    misses: NDArray[np.int32]
    overflow: NDArray[np.int32]
    evictions: NDArray[np.int32]
    wide: NDArray[np.int32]


class Planner:
    """C slots for the E experts of a layer, planned by the code that serves.

    Raises ConfigError where the native library is missing, ValueError for numbers that do not fit.
    """

    def __init__(self, num_experts: int, num_slots: int, top_k: int, policy: str) -> None:
        self._library = library()
        self.num_experts = num_experts
        self.state = np.zeros(self._library.planner_words(num_experts, num_slots), dtype=np.int64)
        self._library.planner_init(self.state, num_experts, num_slots, top_k, list(POLICIES).index(policy))
        self.row_words = np.zeros(num_experts, dtype=np.int32)
        """(E): LANDED, QUEUED or COPYING of each row; whoever plays the lane writes it, and `plan` what it cancels."""
        self._loads = np.zeros((num_experts, 2), dtype=np.int32)
        self._rows = np.zeros(0, dtype=np.int32)

    def resume(self, state: NDArray[np.int64]) -> None:
        """Go on from `state`, of a planner with the same numbers. What was on its way there has landed."""
        self.state[:] = state

    @property
    def words(self) -> Words:
        """The totals so far."""
        return Words._make(self.state[: len(Words._fields)].tolist())

    def plan_steps(self, ids: NDArray[np.int32], tokens: NDArray[np.int32]) -> StepCounts:
        """Serve steps of `tokens` (S) tokens each, whose routed `ids` are (N, K), -1 for none. Without look-ahead."""
        counts = np.empty((len(tokens), 5), dtype=np.int32)
        self._library.planner_plan_steps(self.state, ids, tokens, counts)
        return StepCounts(*counts.T)

    def plan(self, ids: NDArray[np.int32]) -> int:
        """Serve one step of the routed `ids` (M); returns its misses."""
        if len(self._rows) < len(ids):
            self._rows = np.zeros(len(ids), dtype=np.int32)
        rows = self._rows[: len(ids)]
        return int(self._library.planner_plan(self.state, self.row_words, ids, len(ids), rows, self._loads))

    def plan_prefetch(self, predicted: NDArray[np.int32], budget: int, is_far: bool) -> list[tuple[int, int]]:
        """Plan copies for `predicted` (P) experts, most wanted first: at most `budget` pairs (expert, slot)."""
        arguments = (self.state, self.row_words, predicted, budget, is_far, self._loads)
        number = self._library.planner_plan_prefetch(*arguments)
        return [(expert, slot) for expert, slot in self._loads[:number].tolist()]


def library() -> Any:
    """The native host library; ConfigError where it is missing."""
    found = host_library()
    if found is None:
        raise ConfigError(f"replays plan with the native library: {why_not_host()}")
    return found
