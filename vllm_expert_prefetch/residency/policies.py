"""Eviction policies: who leaves when a slot is needed.

Decisions come from counts of touches, never from a clock, so that tensor-parallel ranks, tests and the simulator
decide alike.
"""

import heapq
import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Container


class EvictionPolicy(ABC):
    """Ranks the RESIDENT experts of one layer.

    Contract: the cache calls `insert` when a load has landed, `touch` on every hit and `remove` on eviction.
    `insert(cold=True)` marks an expert brought by a wide step (a prefill): it must be evicted before anything that a
    narrow step has touched, so that a prefill does not flush the decode working set.
    """

    @abstractmethod
    def insert(self, expert: int, cold: bool = False) -> None:
        """Start ranking `expert`, which is not ranked yet."""

    @abstractmethod
    def touch(self, expert: int) -> None:
        """Note a hit on `expert`, which is ranked."""

    @abstractmethod
    def remove(self, expert: int) -> None:
        """Stop ranking `expert`, which is ranked."""

    @abstractmethod
    def victims(self, count: int, protected: Container[int]) -> list[int]:
        """At most `count` ranked experts outside `protected`, the first to leave first. Changes nothing."""

    @abstractmethod
    def ranked(self) -> set[int]:
        """The experts ranked now (for integrity checks)."""


class LruPolicy(EvictionPolicy):
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()
        self.touch = self._order.move_to_end  # type: ignore  # one C call on the hot path

    def insert(self, expert: int, cold: bool = False) -> None:
        self._order[expert] = None
        if cold:
            self._order.move_to_end(expert, last=False)

    def touch(self, expert: int) -> None:
        self._order.move_to_end(expert)

    def remove(self, expert: int) -> None:
        del self._order[expert]

    def victims(self, count: int, protected: Container[int]) -> list[int]:
        chosen: list[int] = []
        for expert in self._order:
            if len(chosen) == count:
                break
            if expert not in protected:
                chosen.append(expert)
        return chosen

    def ranked(self) -> set[int]:
        return set(self._order)


class _CountingPolicy(EvictionPolicy):
    """Shared bookkeeping of the frequency policies. Counts outlive eviction: there are only as many as experts."""

    def __init__(self) -> None:
        self._tick = 0
        self._count: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._cold: set[int] = set()

    def insert(self, expert: int, cold: bool = False) -> None:
        self._last[expert] = self._tick
        if cold:
            self._cold.add(expert)
        else:
            self.touch(expert)

    def touch(self, expert: int) -> None:
        self._tick += 1
        self._last[expert] = self._tick
        self._count[expert] = self._count.get(expert, 0) + 1
        self._cold.discard(expert)

    def remove(self, expert: int) -> None:
        del self._last[expert]
        self._cold.discard(expert)

    def victims(self, count: int, protected: Container[int]) -> list[int]:
        candidates = [expert for expert in self._last if expert not in protected]
        return heapq.nsmallest(count, candidates, key=self._key)

    def ranked(self) -> set[int]:
        return set(self._last)

    @abstractmethod
    def _key(self, expert: int) -> tuple[float, ...]:
        """Smallest leaves first; cold experts before all others."""


class LfuPolicy(_CountingPolicy):
    """Least frequently used first; the older one among equals."""

    def _key(self, expert: int) -> tuple[float, ...]:
        return (expert not in self._cold, self._count.get(expert, 0), self._last[expert], expert)


class LfruPolicy(_CountingPolicy):
    """Least frequently *recently* used first: touches divided by the age of the last one."""

    def _key(self, expert: int) -> tuple[float, ...]:
        age = self._tick - self._last[expert] + 1
        return (expert not in self._cold, self._count.get(expert, 0) / age, self._last[expert], expert)


class RandomPolicy(EvictionPolicy):
    """A random victim: the baseline of cache studies. Seeded, hence repeatable."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._num_removed = 0
        self._members: dict[int, None] = {}

    def insert(self, expert: int, cold: bool = False) -> None:
        self._members[expert] = None

    def touch(self, expert: int) -> None:
        pass

    def remove(self, expert: int) -> None:
        del self._members[expert]
        self._num_removed += 1

    def victims(self, count: int, protected: Container[int]) -> list[int]:
        candidates = [expert for expert in self._members if expert not in protected]
        # A generator per answer: asking twice gives the same victims, evicting gives new ones.
        rng = random.Random((self._seed << 64) + self._num_removed)
        return rng.sample(candidates, min(count, len(candidates)))

    def ranked(self) -> set[int]:
        return set(self._members)


POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    "lru": lambda seed: LruPolicy(),
    "lfu": lambda seed: LfuPolicy(),
    "lfru": lambda seed: LfruPolicy(),
    "random": RandomPolicy,
}


def create_policy(name: str, seed: int = 0) -> EvictionPolicy:
    """Make the policy called `name` (a key of `POLICIES`); `seed` matters to `random` only."""
    return POLICIES[name](seed)
