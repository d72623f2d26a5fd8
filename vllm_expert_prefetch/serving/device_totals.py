"""From the totals that the GPU writes into host memory to the worker's counters, without ever waiting for the GPU."""

import threading
import time
from collections.abc import Sequence

from vllm_expert_prefetch.experts import DeviceLayerCache
from vllm_expert_prefetch.metrics.counters import Counters, layer_start
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX, OUTCOMES, PREDICTED
from vllm_expert_prefetch.prediction.count_gate import Outcomes
from vllm_expert_prefetch.prediction.truth import Score
from vllm_expert_prefetch.serving.device_lookahead import DeviceLookAhead

_PERIOD_SECONDS = 0.5
_STEPS, _HITS, _LATE, _MISSES, _EVICTIONS, _USED, _UNUSED, _DISPLACED, _ISSUED, _CANCELLED = range(10, 20)
_STREAM_STEPS, _STREAM_MISSES, _CLAIMED = 21, 22, 23
_OF_LAYER = {
    **{
        f"layer_lookups_total/{outcome}": word for outcome, word in zip(OUTCOMES, (_HITS, _LATE, _MISSES), strict=False)
    },
    **{f"layer_predictions_total/{o}": word for o, word in zip(PREDICTED, (_USED, _UNUSED, _CANCELLED), strict=True)},
}


class DeviceTotals:
    """Adds what the layers' totals have grown by to `counters`, and tells the gates of `look_ahead`: twice a second,
    from a daemon thread."""

    def __init__(
        self, caches: Sequence[DeviceLayerCache], counters: Counters, look_ahead: DeviceLookAhead | None = None
    ) -> None:
        self._caches = list(caches)
        self._counters = counters
        self._look_ahead = look_ahead
        self._last: list[list[int]] = [cache.totals() for cache in caches]
        self._brought = [_brought_ahead(totals) for totals in self._last]
        self._decoded = (0.0, 0.0)
        self._scored = [0.0] * len(Score._fields)
        threading.Thread(target=self._run, name="expert-prefetch-totals", daemon=True).start()

    def _publish(self) -> None:
        """Add what has come since the last time."""
        step_seconds = self._step_seconds()
        for layer, cache in enumerate(self._caches):
            totals = cache.totals()
            grown = [now - before for now, before in zip(totals, self._last[layer], strict=True)]
            self._last[layer] = totals
            self._add(layer, grown, cache.staging.record_bytes)
            # The GPU may be writing: a cancellation may be seen before what was issued, and a counter must not fall.
            brought = max(self._brought[layer], _brought_ahead(totals))
            records = brought - self._brought[layer]
            self._brought[layer] = brought
            self._counters.add(INDEX["transfer_bytes_total/prefetch"], records * cache.staging.record_bytes)
            if self._look_ahead is not None:
                saved = grown[_USED] - grown[_CLAIMED]
                outcomes = Outcomes(grown[_STEPS], saved, grown[_UNUSED], grown[_DISPLACED])
                self._look_ahead.note(layer, outcomes, step_seconds)
        if self._look_ahead is not None:
            self._counters.set("gated_layers", self._look_ahead.num_closed)
            self._add_scores(self._look_ahead.truth.totals())

    def _add(self, layer: int, grown: Sequence[int], record_bytes: int) -> None:
        add = self._counters.add
        add(INDEX["lookups_total/hit"], grown[_HITS])
        add(INDEX["lookups_total/late"], grown[_LATE])
        add(INDEX["lookups_total/miss"], grown[_MISSES])
        add(INDEX["evictions_total"], grown[_EVICTIONS])
        add(INDEX["waves_total/none"], grown[_STEPS] - grown[_STREAM_STEPS])
        add(INDEX["waves_total/stream"], grown[_STREAM_STEPS])
        add(INDEX["transfer_bytes_total/stream"], grown[_STREAM_MISSES] * record_bytes)
        demanded = grown[_MISSES] - grown[_STREAM_MISSES] + grown[_CLAIMED]
        add(INDEX["transfer_bytes_total/demand"], demanded * record_bytes)
        add(INDEX["predictions_total/used"], grown[_USED])
        add(INDEX["predictions_total/unused"], grown[_UNUSED])
        add(INDEX["predictions_total/cancelled"], grown[_CANCELLED])
        add(INDEX["displaced_lookups_total"], grown[_DISPLACED])
        if self._counters.layers:
            for series, word in _OF_LAYER.items():
                add(layer_start(layer) + LAYER_INDEX[series], grown[word])

    def _step_seconds(self) -> float | None:
        """What a decode step has taken since the last time; None when there was none."""
        steps, seconds = (self._counters.get(series) for series in ("steps_total/decode", "step_seconds/decode/sum"))
        num_steps, spent = steps - self._decoded[0], seconds - self._decoded[1]
        self._decoded = (steps, seconds)
        return spent / num_steps if num_steps else None

    def _add_scores(self, sums: Sequence[float]) -> None:
        tokens, routed, found, found_all, mass = (now - before for now, before in zip(sums, self._scored, strict=True))
        self._scored = list(sums)
        add = self._counters.add
        add(INDEX["scored_tokens_total"], tokens)
        add(INDEX["recall_routed_total"], routed)
        add(INDEX["recall_found_total/top_k"], found)
        add(INDEX["recall_found_total/fetched"], found_all)
        add(INDEX["missing_gate_mass_total"], tokens - mass)

    def _run(self) -> None:
        while True:
            time.sleep(_PERIOD_SECONDS)
            self._publish()


def _brought_ahead(totals: Sequence[int]) -> int:
    """Records that the lane has copied, or has begun to: a step settles all that were issued before it."""
    return totals[_ISSUED] - totals[_CANCELLED] - totals[_CLAIMED]
