"""What a trace would have come to under other settings: hits, bytes, and against a clock stalls and TPOT."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.planning.bounds import belady_hits
from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.guesses import drawn, oracle
from vllm_expert_prefetch.planning.planner import Planner, StepCounts
from vllm_expert_prefetch.planning.replay import Replay, Setting
from vllm_expert_prefetch.planning.sizing import share_of
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.trace import Trace

GB = 10**9


@dataclass(frozen=True)
class Sums:
    """Of one layer or of all, over all steps unless it says otherwise."""

    lookups: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_bytes: int = 0
    """Copied."""
    decode_lookups: int = 0
    decode_hits: int = 0
    """Of steps without a sequence in its prompt."""
    stall: float = 0.0
    """Seconds."""
    token_stall: float = 0.0
    """Stalls of steps, each as often as it has sequences beyond their first token."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(Sums)))

    @property
    def hit_rate(self) -> float:
        """0 to 1."""
        return self.hits / max(1, self.lookups)

    @property
    def decode_hit_rate(self) -> float:
        """Of decode steps, 0 to 1."""
        return self.decode_hits / max(1, self.decode_lookups)


def serve_layer(trace: Trace, layer: int, setting: Setting, state: NDArray[np.int64] | None = None) -> StepCounts:
    """Each step of one layer without look-ahead: from a cold cache, or from a planner's `state` on."""
    card = trace.card
    planner = Planner(card.num_experts[layer], setting.slots[layer], card.top_k[layer], setting.policy)
    if state is not None:
        planner.resume(state)
    return planner.plan_steps(trace.routed(layer), trace.tokens)


def simulate_layer(
    trace: Trace, layer: int, setting: Setting, clock: Clock | None, state: NDArray[np.int64] | None = None
) -> Sums:
    """One layer without look-ahead, step by step as served: from a cold cache, or from a planner's `state` on."""
    card = trace.card
    counts = serve_layer(trace, layer, setting, state)
    hits, decodes = counts.needed - counts.misses, trace.decodes
    sums = Sums(
        lookups=int(counts.needed.sum()),
        hits=int(hits.sum()),
        misses=int(counts.misses.sum()),
        evictions=int(counts.evictions.sum()),
        num_bytes=int(counts.misses.sum()) * card.record_bytes[layer],
        decode_lookups=int(counts.needed[decodes].sum()),
        decode_hits=int(hits[decodes].sum()),
    )
    if clock is None:
        return sums
    record = clock.record[layer]
    stalls = counts.misses * record
    if setting.areas > 1 and layer:  # the layer before was as wide: it has as many ids
        is_wide = trace.tokens * trace.ids[layer].shape[1] > card.num_experts[layer]
        stalls = stalls - np.where(is_wide, np.minimum(counts.overflow * record, clock.compute), 0)
    return sums + Sums(stall=float(stalls.sum()), token_stall=float((stalls * trace.decoding).sum()))


def simulate_all(trace: Trace, setting: Setting, clock: Clock | None = None, resumes: bool = False) -> Sums:
    """All layers without look-ahead. `resumes`: from what the caches held when the recording began."""
    total = Sums()
    for layer in range(trace.card.num_layers):
        total += simulate_layer(trace, layer, setting, clock, trace.states[layer] if resumes else None)
    return total


def look_ahead(trace: Trace, setting: Setting, clock: Clock, recall: Sequence[float] | None) -> Sums:
    """All layers with look-ahead. `recall`: of the guesses by distance; None: every guess is right."""
    replay = Replay(trace, setting, clock, oracle(trace) if recall is None else drawn(trace, recall))
    total = Sums()
    for decodes, steps in groupby(range(len(trace)), lambda step: bool(trace.prefilling[step] == 0)):
        before, stall, token_stall = replay.words, replay.stall, 0.0
        for step in steps:
            stalled = replay.stall
            replay.run([step])
            token_stall += (replay.stall - stalled) * int(trace.decoding[step])
        words = replay.words.since(before)
        total += Sums(
            lookups=words.lookups,
            hits=words.hits,
            misses=words.misses,
            evictions=words.evictions,
            decode_lookups=words.lookups * decodes,
            decode_hits=words.hits * decodes,
            stall=replay.stall - stall,
            token_stall=token_stall,
        )
    return total + Sums(num_bytes=replay.num_bytes)


def tpot(trace: Trace, clock: Clock, sums: Sums) -> float:
    """Seconds that a step took, weighed by its sequences beyond their first token, as the metric has it."""
    compute = float((clock.compute * trace.decoding).sum()) * trace.card.num_layers
    return (compute + sums.token_stall) / max(1, int(trace.decoding.sum()))


def belady(trace: Trace, layer: int, num_slots: int) -> Sums:
    """The decode hits of a cache that knows the future."""
    hits, lookups = belady_hits(trace.routed(layer), trace.tokens, num_slots, trace.decodes)
    return Sums(decode_lookups=lookups, decode_hits=hits)


def as_recorded(trace: Trace) -> dict[str, tuple[int, int]] | None:
    """The trace replayed under its own settings: (what the server counted, what the replay counts), by name.

    None where it looked ahead or executed guesses, or where its counters were not recorded. Raises TraceError where
    they disagree: nothing that is simulated from such a trace would be true.
    """
    counted = trace.counted()
    if counted is None or not trace.states or any(own.issued or own.speculated for own in counted):
        return None
    found = simulate_all(trace, Setting(trace.card.num_slots, trace.card.policy), resumes=True)
    sizes = trace.card.record_bytes
    pairs = {
        "hits": (sum(own.hits for own in counted), found.hits),
        "misses": (sum(own.misses for own in counted), found.misses),
        "evictions": (sum(own.evictions for own in counted), found.evictions),
        "bytes": (sum(own.demanded * size for own, size in zip(counted, sizes, strict=True)), found.num_bytes),
    }
    if wrong := [f"{name} {live} and {own}" for name, (live, own) in pairs.items() if live != own]:
        raise TraceError(f"the server and a replay of what it recorded count differently: {', '.join(wrong)}")
    return pairs


def slots_of_share(trace: Trace, share: float) -> tuple[int, ...]:
    """Slots of each layer when a `share` of its experts has one: rounded down, a token's experts at least."""
    pairs = zip(trace.card.num_experts, trace.card.top_k, strict=True)
    return tuple(max(top_k, min(num, share_of(num, share))) for num, top_k in pairs)


def slots_with_more(trace: Trace, slots: tuple[int, ...], more_bytes: float) -> tuple[int, ...]:
    """`slots` and as many more in every layer as `more_bytes` hold: L records for each, less an overflow row."""
    sizes = trace.card.record_bytes
    more = int(more_bytes / (sum(sizes) - max(sizes) if len(sizes) > 1 else sizes[0]))
    return tuple(min(num, own + more) for num, own in zip(trace.card.num_experts, slots, strict=True))
