"""Routing replayed against a clock: what a cache and its look-ahead would make of it, without a model.

One accelerator and one link, which copies one record after the other. A step of a layer waits for what it misses, then
guesses farther layers, then computes while the link works on. Decisions are those of `residency`; the rules of the
queue are those of `lookahead`, with guesses that somebody gives.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_expert_prefetch.residency import ExpertCache, Policy

Step = Sequence[Sequence[int]]
"""The routed experts of every MoE layer in one step, token by token."""
Guess = Callable[[int, int, int], Sequence[int]]
"""(step, layer, distance) -> the experts that are guessed for `layer` from so many layers before it, best first."""


@dataclass
class Replayed:
    """Sums over all steps. Times are in those of one layer."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    used: int = 0
    unused: int = 0
    cancelled: int = 0
    displaced: int = 0
    demanded: int = 0
    """Records that steps copied, late ones that had not begun included."""
    prefetched: int = 0
    """Records that look-ahead copied."""
    stall: float = 0.0
    time: float = 0.0


@dataclass
class _Queued:
    layer: int
    expert: int
    left: float
    has_begun: bool = False


class Replay:
    """`num_slots` of `num_experts` in each of `num_layers` layers; a record takes `record_time` layers on the link."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        policy: Policy,
        record_time: float,
        guess: Guess | None = None,
        depth: int = 1,
    ) -> None:
        """`guess` None: nothing looks ahead; `depth`: how many layers, at most."""
        self.caches = [ExpertCache(num_experts, num_slots, policy) for _ in range(num_layers)]
        self.sums = Replayed()
        self._record_time = record_time
        self._guess, self._depth = guess, depth
        self._queue: list[_Queued] = []
        self._link_time = 0.0
        """Until when the link has worked."""
        self._landed: list[list[int]] = [[] for _ in range(num_layers)]
        self._num_steps = 0

    def warm(self, steps: Sequence[Step]) -> None:
        """Serve `steps` without counting them, without look-ahead and in no time."""
        for step in steps:
            for cache, ids in zip(self.caches, step, strict=True):
                cache.plan(ids)

    def run(self, steps: Sequence[Step]) -> Replayed:
        """Serve `steps`, and return the sums so far."""
        for step in steps:
            for layer, ids in enumerate(step):
                self._serve(layer, ids)
                if self._guess is not None and len(ids) <= self.caches[layer].num_experts:
                    self._look_ahead(layer)
                self.sums.time += 1
                self._copy_until(self.sums.time)
            self._num_steps += 1
        return self.sums

    def _serve(self, layer: int, ids: Sequence[int]) -> None:
        cache, sums = self.caches[layer], self.sums
        self._settle(layer, ids)
        plan = cache.plan(ids)
        sums.hits += plan.num_hits
        sums.late += len(plan.late)
        sums.misses += len(plan.loads)
        sums.used += plan.num_used
        sums.unused += plan.num_unused
        sums.displaced += plan.num_displaced
        wait = len(plan.loads) * self._record_time
        sums.demanded += len(plan.loads)
        for copy in [copy for copy in self._queue if copy.layer == layer and copy.expert in plan.late]:
            self._queue.remove(copy)
            wait += copy.left
            sums.prefetched += copy.has_begun
            sums.demanded += not copy.has_begun
        sums.stall += wait
        sums.time += wait
        self._link_time = max(self._link_time, sums.time)

    def _settle(self, layer: int, wanted: Sequence[int]) -> None:
        """Book what has landed for `layer`, and cancel what is not wanted and has not begun."""
        dropped = [
            copy for copy in self._queue if copy.layer == layer and not copy.has_begun and copy.expert not in wanted
        ]
        for copy in dropped:
            self._queue.remove(copy)
        self.caches[layer].settle(
            [expert for expert in self._landed[layer] if expert in self.caches[layer].in_flight],
            [copy.expert for copy in dropped],
        )
        self._landed[layer].clear()
        self.sums.cancelled += len(dropped)

    def _look_ahead(self, layer: int) -> None:
        assert self._guess is not None
        most = math.ceil(1 / self._record_time)
        for distance in range(1, self._depth + 1):
            target = layer + distance
            num_queued = sum(not copy.has_begun for copy in self._queue)
            budget = most - num_queued * (distance > 1)
            if target >= len(self.caches) or budget <= 0:
                continue
            guessed = self._guess(self._num_steps, target, distance)
            self._settle(target, guessed)
            plan = self.caches[target].plan_prefetch(guessed, budget, distance > 1)
            self.sums.unused += plan.num_unused
            self._queue += [_Queued(target, load.expert, self._record_time) for load in plan.loads]

    def _copy_until(self, now: float) -> None:
        while self._queue and self._link_time < now:
            copy = self._queue[0]
            copy.has_begun = True
            worked = min(copy.left, now - self._link_time)
            copy.left -= worked
            self._link_time += worked
            if copy.left <= 1e-9:
                self._queue.pop(0)
                self.sums.prefetched += 1
                self._landed[copy.layer].append(copy.expert)
        self._link_time = max(self._link_time, now)


def bound(num_layers: int, num_misses: float, record_time: float) -> float:
    """What a step takes at least, in layers: computing, or copying what it misses without look-ahead."""
    return max(float(num_layers), num_misses * record_time)


def belady_hits(steps: Sequence[Sequence[int]], num_slots: int, num_warm: int = 0) -> tuple[int, int]:
    """(hits, lookups) of one layer whose cache knows the future: what is needed last of all leaves.

    `steps`: the experts that each step needs, which then have a slot; the first `num_warm` are not counted.
    """
    uses: dict[int, list[int]] = {}
    for number, ids in enumerate(steps):
        for expert in set(ids):
            uses.setdefault(expert, []).append(number)
    for own in uses.values():
        own.append(len(steps) + 1)
        own.reverse()
    resident: set[int] = set()
    hits = lookups = 0
    for number, ids in enumerate(steps):
        needed = set(ids)
        for expert in needed:
            while uses[expert][-1] <= number:
                uses[expert].pop()
        if number >= num_warm:
            hits += len(needed & resident)
            lookups += len(needed)
        kept = sorted(resident | needed, key=lambda expert: (expert not in needed, uses[expert][-1], expert))
        resident = set(kept[:num_slots])
    return hits, lookups
