"""The words in front of a layer's planner: its state, and what has happened since the start (csrc/residency.h)."""

from typing import NamedTuple


class Words(NamedTuple):
    """In the order of csrc/residency.h, whose `word_names` a test compares with these fields. All int."""

    num_experts: int
    num_slots: int
    top_k: int
    policy: int
    tick: int
    cold_tick: int
    num_free: int
    num_in_flight: int
    num_preloaded: int
    """Experts in overflow rows, on their way or landed; 0 between steps."""
    steps: int
    """Totals from here on. Steps that needed an expert."""
    wide_steps: int
    """Of these, those that needed more experts than there are slots."""
    hits: int
    late: int
    misses: int
    speculated: int
    """Lookups of steps that executed a guess; hits, late and misses leave these steps out."""
    overflow: int
    """Records copied into overflow rows."""
    evictions: int
    used: int
    unused: int
    displaced: int
    """Misses on experts that a prefetch had evicted."""
    issued: int
    cancelled: int
    claimed: int
    """Late ones whose copy had not started: the step copied them itself."""
    demanded: int
    """Records copied because a step needed them, claimed ones included."""
    out_of_range: int
    """Routed ids of tokens that name no expert: these tokens are wrong."""
    errors: int
    """Copies that kernels refused, before the step that wrote this: tokens since may be wrong; 0 on the host."""
    stall_ns: int
    """Time that steps waited for records; 0 on a GPU, where nothing is timed."""
    late_ns: int
    """Of this, waiting for prefetches whose copy ran."""

    def since(self, before: "Words") -> "Words":
        """What has been added to the totals since `before`; the state's fields make no sense in it."""
        return Words._make(now - then for now, then in zip(self, before, strict=True))

    @property
    def lookups(self) -> int:
        """Distinct experts needed, summed over steps."""
        return self.hits + self.late + self.misses + self.speculated

    @property
    def prefetched(self) -> int:
        """Records that the prefetch lane has copied, or is about to."""
        return self.issued - self.cancelled - self.claimed

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""
        return self.num_slots - self.num_free - self.num_in_flight
