"""From the words of the layers' caches to series: the only place that knows which word counts where."""

from collections.abc import Callable, Sequence

import torch

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.config import GHOST_SCALES
from vllm_expert_prefetch.metrics.counters import Counters, layer_start
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX

_NANO = 1e-9

_TOTALS: dict[str, Callable[[Words, Words, float], float]] = {
    "lookups_total/hit": lambda words, sized, rate: words.hits,
    "lookups_total/late": lambda words, sized, rate: words.late,
    "lookups_total/miss": lambda words, sized, rate: words.misses,
    "lookups_total/speculated": lambda words, sized, rate: words.speculated,
    "moe_steps_total/narrow": lambda words, sized, rate: words.steps - words.wide_steps,
    "moe_steps_total/wide": lambda words, sized, rate: words.wide_steps,
    "transfer_bytes_total/demand": lambda words, sized, rate: sized.demanded - sized.overflow,
    "transfer_bytes_total/overflow": lambda words, sized, rate: sized.overflow,
    "transfer_bytes_total/prefetch": lambda words, sized, rate: sized.prefetched,
    "transfer_seconds_total": lambda words, sized, rate: _NANO * (words.stall_ns - words.late_ns),
    "stall_seconds_total": lambda words, sized, rate: _NANO * words.stall_ns,
    "evictions_total": lambda words, sized, rate: words.evictions,
    "predictions_total/used": lambda words, sized, rate: words.used,
    "predictions_total/unused": lambda words, sized, rate: words.unused,
    "predictions_total/cancelled": lambda words, sized, rate: words.cancelled,
    "displaced_lookups_total": lambda words, sized, rate: words.displaced,
    "saved_seconds_total": lambda words, sized, rate: sized.used / rate - _NANO * words.late_ns if rate else 0.0,
}
"""Series -> its total since the start. `words` are summed over the layers that it counts; `sized` likewise, after each
layer's words are multiplied by the bytes of its record; `rate` is the link's, in bytes per second. A series whose name
starts with "layer_" counts one layer.
"""

_ALL = [(INDEX[series], total) for series, total in _TOTALS.items()]
_ONE = [
    (LAYER_INDEX[f"layer_{series}"], total) for series, total in _TOTALS.items() if f"layer_{series}" in LAYER_INDEX
]


class Ledger:
    """Adds what the words of all layers have grown by to a worker's counters."""

    def __init__(
        self,
        counters: Counters,
        record_bytes: Sequence[int],
        mirror: torch.Tensor,
        link_bytes_per_second: float,
        ghosts: torch.Tensor | None = None,
    ) -> None:
        """`record_bytes` of each layer; `mirror` (L, len(Words)) int64: their words, as last written;
        `link_bytes_per_second` as measured, 0 where it is not known; `ghosts` (L, G, len(Words)) int64: the words of
        ghost caches likewise, one for each of GHOST_SCALES.

        What the words say now is not counted. With `counters.layers` there are L of them, in the order of `mirror`.
        """
        num_layers = len(mirror)
        self._counters = counters
        self._rate = link_bytes_per_second
        self._mirror = mirror
        self._seen = mirror.clone()
        self._ghosts, self._ghosts_at_first = ghosts, 0 if ghosts is None else ghosts.clone()
        self._unchanged = [Words._make(row) for row in torch.zeros_like(mirror).tolist()]
        counted = torch.ones(1, num_layers, dtype=torch.float64)
        self._series = [_ALL]
        if counters.layers:
            counted = torch.cat([counted, torch.eye(num_layers, dtype=torch.float64)])
            starts = map(layer_start, range(num_layers))
            self._series += [[(start + place, total) for place, total in _ONE] for start in starts]
        # Rows in pairs: which layers are summed, and the same with the bytes of their records.
        self._weights = torch.stack([counted, counted * torch.tensor(record_bytes)], 1).flatten(0, 1)
        self._totals = [
            [total(*pair, self._rate) for _, total in series]
            for series, pair in zip(self._series, self._sums(self._seen), strict=True)
        ]

    def publish(self) -> list[Words]:
        """Add what has come since the last time. Returns each layer's difference.

        A GPU may be writing the words: a cancellation may be seen before what was issued, and no counter may fall.
        """
        self._publish_ghosts()
        now = self._mirror.clone()
        if torch.equal(now, self._seen):
            return self._unchanged
        deltas = [Words._make(row) for row in (now - self._seen).tolist()]
        self._seen = now
        sums = self._sums(now)
        for series, totals, pair in zip(self._series, self._totals, sums, strict=True):
            for number, (place, total) in enumerate(series):
                amount = total(*pair, self._rate)
                if amount > totals[number]:
                    self._counters.add(place, amount - totals[number])
                    totals[number] = amount
        self._counters.set("resident_slots", sums[0][0].num_resident)
        return deltas

    def _publish_ghosts(self) -> None:
        if self._ghosts is None:
            return
        for scale, row in zip(GHOST_SCALES, (self._ghosts - self._ghosts_at_first).sum(0).tolist(), strict=True):
            words = Words._make(row)
            self._counters.set(f"ghost_hits_total/{scale}", words.hits)
            self._counters.set(f"ghost_lookups_total/{scale}", words.hits + words.misses)

    def _sums(self, words: torch.Tensor) -> list[tuple[Words, Words]]:
        """The words, (L, len(Words)) int64, summed over each set of layers: as they are, and times their records."""
        sums = [Words._make(row) for row in (self._weights @ words.double()).tolist()]
        return list(zip(sums[::2], sums[1::2], strict=True))
