"""The values that cross the borders of this package. All are immutable and hold plain integers."""

from enum import IntEnum
from typing import NamedTuple


class Residency(IntEnum):
    """Where one expert of one layer is."""

    ABSENT = 0
    IN_FLIGHT = 1
    RESIDENT = 2


ABSENT, IN_FLIGHT, RESIDENT = Residency.ABSENT, Residency.IN_FLIGHT, Residency.RESIDENT

NO_EXPERT = -1
NO_ROW = -1
PADDING_ROW = -1


class Load(NamedTuple):
    """One record to copy from the host store into a row, and whom it replaces there.

    Rows below the number of slots are slots; the rows from there on are overflow rows, which replace nobody.
    """

    expert: int
    row: int
    victim: int


class Plan(NamedTuple):
    """What one step does to one layer.

    `rows` maps each distinct expert that the step needs, in order of first appearance, to its row. The kernel may run
    once the copies of `loads` (the misses) have landed, and those of `late`: prefetches that were on their way, which
    are waited for or taken over, and never made twice. Every other needed expert is a hit.
    `num_used` counts prefetched experts that are needed for the first time, `num_unused` those that were evicted
    without having been needed, `num_displaced` needed experts that a prefetch had evicted since they were needed last.
    `awaited` are overflow rows that a copy runs into although the step does not need it: it must have ended as well,
    before the row is another layer's.
    """

    is_wide: bool
    rows: dict[int, int]
    loads: tuple[Load, ...]
    late: tuple[int, ...]
    num_used: int = 0
    num_unused: int = 0
    num_displaced: int = 0
    awaited: tuple[int, ...] = ()

    @property
    def num_hits(self) -> int:
        """Needed experts that were resident."""
        return len(self.rows) - len(self.loads) - len(self.late)

    @property
    def num_evictions(self) -> int:
        """Experts that gave their slot to another."""
        return sum(load.victim != NO_EXPERT for load in self.loads)

    def row_ids(self, ids: list[int], num_real: int) -> list[int]:
        """The row of each of `ids`, of which the first `num_real` belong to tokens and the others to padding.

        A negative id stays -1, as in plain vLLM; other padding takes the row of the first needed expert, or row 0, so
        that the kernel has nothing more to read.
        """
        spare = next(iter(self.rows.values()), 0)
        return [
            PADDING_ROW if expert < 0 else self.rows.get(expert, spare) if index < num_real else spare
            for index, expert in enumerate(ids)
        ]


class PrefetchPlan(NamedTuple):
    """What to copy because it was predicted, most wanted first; the loads are IN_FLIGHT until they are settled."""

    loads: tuple[Load, ...]
    num_unused: int
