"""From the totals that the GPU writes into host memory to the worker's counters, without ever waiting for the GPU."""

import threading
import time
from collections.abc import Sequence

from vllm_expert_prefetch.experts import DeviceLayerCache
from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.metrics.definitions import INDEX

_PERIOD_SECONDS = 0.5
_STEPS, _HITS, _LATE, _MISSES, _EVICTIONS = 10, 11, 12, 13, 14
_STREAM_STEPS, _STREAM_MISSES = 21, 22


class DeviceTotals:
    """Adds what the layers' totals have grown by to `counters`: twice a second, from a daemon thread."""

    def __init__(self, caches: Sequence[DeviceLayerCache], counters: Counters) -> None:
        self._caches = list(caches)
        self._add_to = counters.add
        self._last: list[list[int]] = [cache.totals() for cache in caches]
        threading.Thread(target=self._run, name="expert-prefetch-totals", daemon=True).start()

    def _publish(self) -> None:
        """Add what has come since the last time."""
        for index, cache in enumerate(self._caches):
            totals = cache.totals()
            grown = [now - before for now, before in zip(totals, self._last[index], strict=True)]
            self._last[index] = totals
            self._add(grown, cache.staging.record_bytes)

    def _add(self, grown: Sequence[int], record_bytes: int) -> None:
        add = self._add_to
        add(INDEX["lookups_total/hit"], grown[_HITS])
        add(INDEX["lookups_total/late"], grown[_LATE])
        add(INDEX["lookups_total/miss"], grown[_MISSES])
        add(INDEX["evictions_total"], grown[_EVICTIONS])
        add(INDEX["waves_total/none"], grown[_STEPS] - grown[_STREAM_STEPS])
        add(INDEX["waves_total/stream"], grown[_STREAM_STEPS])
        add(INDEX["transfer_bytes_total/stream"], grown[_STREAM_MISSES] * record_bytes)
        add(INDEX["transfer_bytes_total/demand"], (grown[_MISSES] - grown[_STREAM_MISSES]) * record_bytes)

    def _run(self) -> None:
        while True:
            time.sleep(_PERIOD_SECONDS)
            self._publish()
