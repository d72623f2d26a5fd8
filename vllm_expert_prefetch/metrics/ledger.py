"""From the words of the layers' caches to series: the only place that knows which word counts where."""

from collections.abc import Callable, Sequence

import torch

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.metrics.counters import Counters, layer_start
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX

_NANO = 1e-9

_AMOUNTS: dict[str, Callable[[Words, int], float]] = {
    "lookups_total/hit": lambda words, record: words.hits,
    "lookups_total/late": lambda words, record: words.late,
    "lookups_total/miss": lambda words, record: words.misses,
    "lookups_total/speculated": lambda words, record: words.speculated,
    "moe_steps_total/narrow": lambda words, record: words.steps - words.wide_steps,
    "moe_steps_total/wide": lambda words, record: words.wide_steps,
    "transfer_bytes_total/demand": lambda words, record: record * (words.demanded - words.overflow),
    "transfer_bytes_total/overflow": lambda words, record: record * words.overflow,
    "transfer_bytes_total/prefetch": lambda words, record: record * words.prefetched,
    "transfer_seconds_total": lambda words, record: _NANO * (words.stall_ns - words.late_ns),
    "stall_seconds_total": lambda words, record: _NANO * words.stall_ns,
    "evictions_total": lambda words, record: words.evictions,
    "predictions_total/used": lambda words, record: words.used,
    "predictions_total/unused": lambda words, record: words.unused,
    "predictions_total/cancelled": lambda words, record: words.cancelled,
    "displaced_lookups_total": lambda words, record: words.displaced,
}
"""Series -> what the worker's total is, from one layer's words and the bytes of its record."""

_SERIES = [(INDEX[series], LAYER_INDEX.get(f"layer_{series}"), amount) for series, amount in _AMOUNTS.items()]


class Ledger:
    """Adds what the words of all layers have grown by to a worker's counters."""

    def __init__(self, counters: Counters, record_bytes: Sequence[int], mirror: torch.Tensor) -> None:
        """`record_bytes` of each layer; `mirror` (L, len(Words)) int64: their words, as last written."""
        self._counters = counters
        self._record_bytes = record_bytes
        self._mirror = mirror
        self._seen = mirror.clone()
        self._words = [Words._make(row) for row in self._seen.tolist()]
        self._counted = [
            [amount(w, b) for *_, amount in _SERIES] for w, b in zip(self._words, record_bytes, strict=True)
        ]

    def publish(self) -> list[Words]:
        """Add what has come since the last time. Returns each layer's difference.

        A GPU may be writing the words: a cancellation may be seen before what was issued, and no counter may fall.
        """
        now = self._mirror.clone()
        if torch.equal(now, self._seen):
            return [words.since(words) for words in self._words]
        self._seen = now
        before, self._words = self._words, [Words._make(row) for row in now.tolist()]
        for layer, words in enumerate(self._words):
            if words != before[layer]:
                self._add(layer, words)
        self._counters.set("resident_slots", sum(words.num_resident for words in self._words))
        return [words.since(then) for words, then in zip(self._words, before, strict=True)]

    def _add(self, layer: int, words: Words) -> None:
        counted, add = self._counted[layer], self._counters.add
        start = layer_start(layer) if self._counters.layers else None
        for number, (index, own, amount) in enumerate(_SERIES):
            grown = amount(words, self._record_bytes[layer]) - counted[number]
            if grown > 0:
                counted[number] += grown
                add(index, grown)
                if start is not None and own is not None:
                    add(start + own, grown)
