"""Eviction policies: who leaves when a slot is needed.

A policy is a function that says how much an expert is wanted; the least wanted one leaves. Its input is counts of
touches, never a clock, so that tensor-parallel ranks, tests and the simulator decide alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

HALF_LIFE = 12
"""Steps in which `ewma` halves the weight of a touch. What decided it is in docs/log.md."""
_TOUCH = 1 << 20


@dataclass
class Ranking:
    """The resident experts of one layer, in the order in which they were touched.

    `last[e]`: the tick of the last touch. A *cold* expert is one that no step has needed since it came: brought by a
    prefetch that has landed, or by a wide step. It leaves before every other, the newest one first.
    """

    num_experts: int
    tick: int = 0
    """Touches so far."""
    step: int = 0
    """Steps so far that needed an expert."""
    cold_tick: int = 0
    """Minus the number of experts that came cold."""
    ranked: set[int] = field(default_factory=set)
    cold: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.last = [0] * self.num_experts
        self.count = [0] * self.num_experts
        """Touches, kept after eviction."""
        self.weight = [0] * self.num_experts
        """Touches that fade, in units of 2^-20, as of step `weighed_at`; kept after eviction."""
        self.weighed_at = [0] * self.num_experts

    def touch(self, expert: int) -> None:
        """A narrow step needs `expert`."""
        self.tick += 1
        self.last[expert] = self.tick
        self.count[expert] += 1
        self.weight[expert] = self.faded(expert) + _TOUCH
        self.weighed_at[expert] = self.step
        self.ranked.add(expert)
        self.cold.discard(expert)

    def add_cold(self, expert: int) -> None:
        """`expert` has come, and nothing says yet that it will be needed again."""
        self.cold_tick -= 1
        self.last[expert] = self.cold_tick
        self.ranked.add(expert)
        self.cold.add(expert)

    def keep(self, experts: list[int], num_needed: int) -> None:
        """A wide step of `num_needed` experts needs these ranked `experts`, and not the others.

        The order among the needed ones stays, and the others age. Cold ones are cold no more.
        """
        self.tick += num_needed
        for expert in experts:
            if expert in self.cold or expert not in self.ranked:
                self.cold.discard(expert)
                self.ranked.add(expert)
                self.last[expert] = self.tick
            else:
                self.last[expert] += num_needed

    def faded(self, expert: int) -> int:
        """`weight` as of now: half for every HALF_LIFE steps, straight in between; whole numbers, everywhere alike."""
        num_halvings, rest = divmod(self.step - self.weighed_at[expert], HALF_LIFE)
        return self.weight[expert] * (2 * HALF_LIFE - rest) // (2 * HALF_LIFE) >> num_halvings

    def discard(self, expert: int) -> None:
        """`expert` is not in a slot any more."""
        self.ranked.discard(expert)
        self.cold.discard(expert)


Policy = Callable[[Ranking, int], tuple[float, ...]]
"""How much an expert is wanted: tuples that compare, the smallest one leaves. No two experts have the same."""


def lru(ranking: Ranking, expert: int) -> tuple[float, ...]:
    """Least recently used first."""
    return (expert not in ranking.cold, ranking.last[expert], expert)


def lfu(ranking: Ranking, expert: int) -> tuple[float, ...]:
    """Least frequently used first; the older one among equals."""
    return (expert not in ranking.cold, ranking.count[expert], ranking.last[expert], expert)


def lfru(ranking: Ranking, expert: int) -> tuple[float, ...]:
    """Least frequently *recently* used first: touches divided by the age of the last one."""
    is_hot = expert not in ranking.cold
    age = ranking.tick - ranking.last[expert] + 1
    return (is_hot, ranking.count[expert] / age, ranking.last[expert], expert)


def ewma(ranking: Ranking, expert: int) -> tuple[float, ...]:
    """Least frequently used first, where a touch loses half of its weight every HALF_LIFE steps.

    The spectrum between lru and lfu is known as LRFU (Lee et al., 2001).
    """
    return (expert not in ranking.cold, ranking.faded(expert), ranking.last[expert], expert)


POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "lfru": lfru, "ewma": ewma}
"""In the order of `Policy` in csrc/residency.h."""
