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
NO_SLOT = -1


class Split(IntEnum):
    """How a step that needs more experts than there are slots is served; NONE for one that does not."""

    NONE = 0
    TOKENS = 1
    EXPERTS = 2
    STREAM = 3


class Load(NamedTuple):
    """One record to copy from the host store into a slot, and whom it replaces (`NO_EXPERT` for a free slot)."""

    expert: int
    slot: int
    victim: int


class Wave(NamedTuple):
    """One kernel call of a step.

    `experts[i]` sits in `slots[i]` once every copy in `loads` has landed, and those of `late`, experts of this wave
    that were in flight already: their copies are waited for, or taken over, never made twice. `rows` are the token
    rows of a wave that was split by tokens; None means every row (one wave) or every (row, expert) pair of these
    experts (split by experts).

    A streamed wave runs from the stream buffer, which has room for every expert of a layer, expert e at place e:
    `loads` bring what is absent from the host (`slot` is the place, no victim), and an expert whose `slots[i]` is not
    `NO_SLOT` is copied from that slot, which keeps it.
    """

    experts: tuple[int, ...]
    slots: tuple[int, ...]
    loads: tuple[Load, ...]
    rows: tuple[int, ...] | None
    late: tuple[int, ...] = ()


class Plan(NamedTuple):
    """Everything that one step does to one layer.

    A lookup is one distinct expert needed by one wave; it counts as a hit (resident), late (in flight) or a miss (one
    load). Hence num_hits + num_late + num_misses equals the distinct experts summed over waves. `num_used` counts
    prefetched experts needed for the first time, `num_unused` those evicted without having been needed, `num_displaced`
    needed experts that a prefetch had evicted since they were needed last.
    """

    split: Split
    waves: tuple[Wave, ...]
    num_hits: int
    num_late: int
    num_misses: int
    num_evictions: int
    num_used: int = 0
    num_unused: int = 0
    num_displaced: int = 0


class PrefetchPlan(NamedTuple):
    """What to copy because it was predicted, most wanted first; the loads are IN_FLIGHT until they are settled."""

    loads: tuple[Load, ...]
    num_evictions: int
    num_unused: int
