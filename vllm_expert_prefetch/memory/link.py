"""An emulated host-to-accelerator link, so that overlap and stalls can be studied where there is no GPU."""

from typing import NamedTuple


class EmulatedLink(NamedTuple):
    """Copies take at least latency + bytes / bandwidth; csrc/host/link.h emulates it.

    `gbps`: 10^9 bytes per second. `latency_us`: microseconds per batch of copies.
    """

    gbps: float
    latency_us: float

    def __str__(self) -> str:
        return f"EMULATED {self.gbps:g} GB/s + {self.latency_us:g} us (not a real link)"
