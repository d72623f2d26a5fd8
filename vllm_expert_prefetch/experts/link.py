"""An emulated host-to-accelerator link, so that overlap and stalls can be studied where there is no GPU."""

import time

_SPIN_SECONDS = 200e-6
"""Below this, sleeping is less exact than spinning."""


class EmulatedLink:
    """Makes a copy batch last at least latency + bytes / bandwidth seconds."""

    def __init__(self, gbps: float, latency_us: float) -> None:
        """`gbps`: 10^9 bytes per second; `latency_us`: microseconds per batch."""
        self.gbps = gbps
        self.latency_us = latency_us

    def seconds(self, num_bytes: int) -> float:
        """How long a batch of `num_bytes` lasts."""
        return self.latency_us * 1e-6 + num_bytes / (self.gbps * 1e9)

    def wait(self, started: float, num_bytes: int) -> None:
        """Return when a batch that started at `started` (time.perf_counter) would have landed."""
        deadline = started + self.seconds(num_bytes)
        remaining = deadline - time.perf_counter()
        if remaining > _SPIN_SECONDS:
            time.sleep(remaining - _SPIN_SECONDS)
        while time.perf_counter() < deadline:
            pass
