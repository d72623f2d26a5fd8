"""Routing replayed against a clock, with look-ahead: what a cache would make of it, without a model.

One accelerator and one link, which copies one record after the other. A step of a layer waits for what it misses, then
guesses farther layers, then computes while the link works on. Decisions are those of the native planner; the rules of
the queue are those of `lookahead`, with guesses that somebody gives.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.planner import COPYING, LANDED, QUEUED, Planner
from vllm_expert_prefetch.tracing.trace import Trace

Guess = Callable[[int, int, int], Sequence[int]]
"""(step, layer, distance) -> the experts that are guessed for `layer` from so many layers before it, best first."""


@dataclass(frozen=True)
class Setting:
    """What a replay serves with: the slots of each layer, the policy, and how many layers it looks ahead at most."""

    slots: tuple[int, ...]
    policy: str
    depth: int = 0
    areas: int = 1
    """Of overflow rows. With two, what a wide step copies into them is copied while the layer before computes."""


@dataclass
class _Queued:
    layer: int
    expert: int
    slot: int
    left: float
    has_begun: bool = False


class Replay:
    """One model's layers under one setting. `stall`, `time`, `num_bytes`, `demanded` and `prefetched` are sums over
    all steps.
    """

    def __init__(self, trace: Trace, setting: Setting, clock: Clock, guess: Guess | None = None) -> None:
        """`guess` None: nothing looks ahead."""
        card = trace.card
        self.planners = [
            Planner(num_experts, num_slots, top_k, setting.policy)
            for num_experts, num_slots, top_k in zip(card.num_experts, setting.slots, card.top_k, strict=True)
        ]
        self.stall = self.time = 0.0
        self.demanded = self.prefetched = 0
        """Records that steps copied, late ones that had not begun included, and those that look-ahead copied."""
        self.num_bytes = 0
        """Of both."""
        self._setting, self._clock, self._guess = setting, clock, guess
        self._record_bytes = card.record_bytes
        self._ids = [trace.routed(layer) for layer in range(card.num_layers)]
        self._tokens, self._ends = trace.tokens, np.cumsum(trace.tokens)
        self._queue: list[_Queued] = []
        self._link_time = 0.0
        """Until when the link has worked."""

    @property
    def words(self) -> Words:
        """The totals of all layers."""
        return Words._make(map(sum, zip(*(planner.words for planner in self.planners), strict=True)))

    def warm(self, num_steps: int) -> None:
        """Serve the first steps without look-ahead and in no time."""
        rows = int(self._tokens[:num_steps].sum())
        for planner, ids in zip(self.planners, self._ids, strict=True):
            planner.plan_steps(ids[:rows], self._tokens[:num_steps])

    def run(self, steps: Iterable[int]) -> None:
        """Serve the steps of these numbers."""
        for step in steps:
            end = int(self._ends[step])
            begin = end - int(self._tokens[step])
            compute, hidden = float(self._clock.compute[step]), 0.0
            for layer, own in enumerate(self._ids):
                ids = own[begin:end].reshape(-1)
                is_wide = len(ids) > self.planners[layer].num_experts
                self._serve(layer, ids, hidden)
                hidden = compute if is_wide and self._setting.areas > 1 else 0.0
                if self._guess is not None and not is_wide:
                    self._look_ahead(step, layer, compute)
                self.time += compute
                self._copy_until(self.time)

    def _serve(self, layer: int, ids: NDArray[np.int32], hidden: float) -> None:
        planner, record = self.planners[layer], self._clock.record[layer]
        waiting = [copy for copy in self._queue if copy.layer == layer]
        before = planner.words.overflow if hidden else 0
        num_misses = planner.plan(ids)
        wait = num_misses * record
        if hidden:
            wait -= min(hidden, (planner.words.overflow - before) * record)
        self.demanded += num_misses
        self.num_bytes += num_misses * self._record_bytes[layer]
        needed = {*ids.tolist()} if waiting else ()
        for copy in waiting:
            if copy.expert in needed:
                wait += copy.left
                self.prefetched += copy.has_begun
                self.demanded += not copy.has_begun
                self.num_bytes += self._record_bytes[layer]
                planner.row_words[copy.slot] = LANDED
                self._queue.remove(copy)
        self._forget_cancelled(layer)
        self.stall += wait
        self.time += wait
        self._link_time = max(self._link_time, self.time)

    def _forget_cancelled(self, layer: int) -> None:
        words = self.planners[layer].row_words
        self._queue = [copy for copy in self._queue if copy.layer != layer or words[copy.slot] in (QUEUED, COPYING)]

    def _look_ahead(self, step: int, layer: int, compute: float) -> None:
        assert self._guess is not None
        for distance in range(1, min(self._setting.depth, len(self.planners) - 1 - layer) + 1):
            target = layer + distance
            record = self._clock.record[target]
            num_queued = sum(not copy.has_begun for copy in self._queue)
            budget = math.ceil(compute / record) - num_queued * (distance > 1)
            if budget <= 0:
                continue
            planner = self.planners[target]
            guessed = np.array(self._guess(step, target, distance), dtype=np.int32)
            loads = planner.plan_prefetch(guessed, budget, distance > 1)
            self._forget_cancelled(target)
            for expert, slot in loads:
                planner.row_words[slot] = QUEUED
                self._queue.append(_Queued(target, expert, slot, record))

    def _copy_until(self, now: float) -> None:
        while self._queue and self._link_time < now:
            copy = self._queue[0]
            words = self.planners[copy.layer].row_words
            if not copy.has_begun:
                copy.has_begun = True
                words[copy.slot] = COPYING
            worked = min(copy.left, now - self._link_time)
            copy.left -= worked
            self._link_time += worked
            if copy.left <= 1e-9 * self._clock.record[copy.layer]:
                self._queue.pop(0)
                self.prefetched += 1
                self.num_bytes += self._record_bytes[copy.layer]
                words[copy.slot] = LANDED
        self._link_time = max(self._link_time, now)
