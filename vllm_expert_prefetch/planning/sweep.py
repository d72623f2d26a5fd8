"""Many settings over one trace, in several processes."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.guesses import RECALL
from vllm_expert_prefetch.planning.planner import library
from vllm_expert_prefetch.planning.replay import Setting
from vllm_expert_prefetch.planning.simulate import GB, Sums, belady, look_ahead, simulate_layer, tpot
from vllm_expert_prefetch.tracing.trace import Trace

_Job = tuple[str, Setting, int]
"""What to replay, and which layer of it; -1: all together."""
_SERVED, _BELADY, _AHEAD, _ORACLE = "served", "belady", "ahead", "oracle"


@dataclass(frozen=True)
class Sweep:
    """One trace, and the clock that it is replayed against; None: hits and bytes only."""

    trace: Trace
    clock: Clock | None
    recall: Sequence[float] = RECALL

    def run(
        self,
        settings: Sequence[Setting],
        with_bounds: bool = True,
        num_processes: int = 1,
        show: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[dict[str, Any]]:
        """One row for each of `settings`. Times are in seconds, rates 0 to 1; None: not known.

        `show` is called with how many replays are done, of how many. Raises ConfigError where the native library is
        missing.
        """
        library()
        jobs = [*dict.fromkeys(job for setting in settings for job in self._jobs(setting, with_bounds))]
        found: dict[_Job, Sums] = {}
        for job, sums in self._results(jobs, num_processes):
            found[job] = sums
            show(len(found), len(jobs))
        return [self._row(setting, found, with_bounds) for setting in settings]

    def _jobs(self, setting: Setting, with_bounds: bool) -> Iterator[_Job]:
        layers = range(self.trace.card.num_layers)
        if setting.depth:
            yield _AHEAD, setting, -1
            if with_bounds:
                yield _ORACLE, setting, -1
        else:
            yield from ((_SERVED, setting, layer) for layer in layers)
        if with_bounds:
            yield from ((_BELADY, Setting(setting.slots, ""), layer) for layer in layers)

    def _results(self, jobs: list[_Job], num_processes: int) -> Iterator[tuple[_Job, Sums]]:
        if num_processes == 1:
            yield from map(self._replay, jobs)
            return
        # The trace goes to the children as it is in memory: forked, not sent.
        global _swept
        _swept = self
        with multiprocessing.get_context("fork").Pool(num_processes) as pool:
            yield from pool.imap_unordered(_replay, jobs)

    def _replay(self, job: _Job) -> tuple[_Job, Sums]:
        kind, setting, layer = job
        if kind == _SERVED:
            return job, simulate_layer(self.trace, layer, setting, self.clock)
        if kind == _BELADY:
            return job, belady(self.trace, layer, setting.slots[layer])
        assert self.clock is not None
        return job, look_ahead(self.trace, setting, self.clock, self.recall if kind == _AHEAD else None)

    def _row(self, setting: Setting, found: dict[_Job, Sums], with_bounds: bool) -> dict[str, Any]:
        card, layers = self.trace.card, range(self.trace.card.num_layers)

        def total(kind: str, own: Setting) -> Sums:
            return sum((found[kind, own, layer] for layer in layers), Sums())

        sums = found[_AHEAD, setting, -1] if setting.depth else total(_SERVED, setting)
        oracle = found.get((_ORACLE, setting, -1))
        is_recorded = (setting.slots, setting.policy) == (card.num_slots, card.policy)
        return {
            "policy": setting.policy,
            "slots": setting.slots[0] if len(set(setting.slots)) == 1 else list(setting.slots),
            "share": sum(setting.slots) / sum(card.num_experts),
            "cache_gb": sum(slots * size for slots, size in zip(setting.slots, card.record_bytes, strict=True)) / GB,
            "depth": setting.depth,
            "areas": setting.areas,
            "as_recorded": is_recorded,
            "lookups": sums.lookups,
            "hits": sums.hits,
            "misses": sums.misses,
            "evictions": sums.evictions,
            "bytes": sums.num_bytes,
            "hit_rate": sums.hit_rate,
            "decode_hit_rate": sums.decode_hit_rate,
            "belady_decode_hit_rate": total(_BELADY, Setting(setting.slots, "")).decode_hit_rate
            if with_bounds
            else None,
            "stall_seconds": None if self.clock is None else sums.stall,
            "tpot_seconds": None if self.clock is None else tpot(self.trace, self.clock, sums),
            "oracle_tpot_seconds": None
            if self.clock is None or oracle is None
            else tpot(self.trace, self.clock, oracle),
        }


_swept: Sweep | None = None


def _replay(job: _Job) -> tuple[_Job, Sums]:
    assert _swept is not None
    return _swept._replay(job)
