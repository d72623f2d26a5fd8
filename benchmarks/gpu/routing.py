"""A synthetic routing trace with stated locality, and what a cache of C slots would make of it."""

import random
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from shapes import MoeShape

from vllm_expert_prefetch.residency import POLICIES, ExpertCache


@dataclass(frozen=True)
class TraceOptions:
    """`zipf`: the popularity of the layer's i-th expert falls as i^-zipf (0 is uniform). `repeat`: the chance that an
    expert of the previous token is routed to again, popularity aside. `recall`: the share of the true experts that the
    predictions name. The defaults are near what is published for Qwen3-30B-A3B and its kind: consecutive tokens share
    about 0.4 of their experts, and a look-ahead of one layer names about 0.9 of them."""

    zipf: float = 0.5
    repeat: float = 0.3
    recall: float = 0.9
    seed: int = 1


@dataclass(frozen=True)
class Trace:
    """`routed[step][layer]` and `predicted[step][layer]` are top_k distinct expert ids each."""

    routed: list[list[list[int]]]
    predicted: list[list[list[int]]]
    options: TraceOptions


def make_trace(shape: MoeShape, num_steps: int, options: TraceOptions) -> Trace:
    """One token per step."""
    rng = random.Random(options.seed)
    popular = [rng.sample(range(shape.num_experts), shape.num_experts) for _ in range(shape.num_layers)]
    cumulative = list(accumulate((rank + 1) ** -options.zipf for rank in range(shape.num_experts)))
    routed: list[list[list[int]]] = []
    for _ in range(num_steps):
        before = routed[-1] if routed else [[]] * shape.num_layers
        routed.append(
            [_next_token(rng, popular[i], cumulative, before[i], shape.top_k, options) for i in range(len(popular))]
        )
    predicted = [[_predict(rng, ids, shape.num_experts, options.recall) for ids in layers] for layers in routed]
    return Trace(routed, predicted, options)


def _next_token(
    rng: random.Random,
    popular: list[int],
    cumulative: list[float],
    before: list[int],
    top_k: int,
    options: TraceOptions,
) -> list[int]:
    chosen = dict.fromkeys(expert for expert in before if rng.random() < options.repeat)
    while len(chosen) < top_k:
        chosen[rng.choices(popular, cum_weights=cumulative)[0]] = None
    ids = list(chosen)[:top_k]
    rng.shuffle(ids)
    return ids


def _predict(rng: random.Random, ids: list[int], num_experts: int, recall: float) -> list[int]:
    others = [expert for expert in range(num_experts) if expert not in ids]
    return [expert if rng.random() < recall else others.pop(rng.randrange(len(others))) for expert in ids]


def cache_misses(trace: Trace, shape: MoeShape, num_slots: int, policy: str, warm_up: int) -> list[int]:
    """Misses of all layers per step after `warm_up` steps, by the specification itself, slots empty at first."""
    misses = [0] * (len(trace.routed) - warm_up)
    for layer in range(shape.num_layers):
        cache = ExpertCache(shape.num_experts, num_slots, POLICIES[policy])
        for step, layers in enumerate(trace.routed):
            num_misses = len(cache.plan(layers[layer]).loads)
            if step >= warm_up:
                misses[step - warm_up] += num_misses
    return misses


def measured_locality(trace: Trace) -> dict[str, Any]:
    """The options, and what came of them: the share of experts that the previous token used too, and the recall."""
    pairs = [
        (set(a), set(b))
        for before, now in zip(trace.routed, trace.routed[1:], strict=False)
        for a, b in zip(before, now, strict=True)
    ]
    shared = sum(len(a & b) for a, b in pairs) / max(1, sum(len(b) for _, b in pairs))
    both = [
        (set(t), set(p))
        for routed, predicted in zip(trace.routed, trace.predicted, strict=True)
        for t, p in zip(routed, predicted, strict=True)
    ]
    recall = sum(len(t & p) for t, p in both) / max(1, sum(len(t) for t, _ in both))
    return {
        **asdict(trace.options),
        "shared_with_previous_token": round(shared, 3),
        "measured_recall": round(recall, 3),
    }


def bound_ms(compute_ms: float, missed_bytes: float, link_gbps: float) -> float:
    """No decode step is shorter than its computation, nor than its missed bytes over the link's peak."""
    return max(compute_ms, missed_bytes / (link_gbps * 1e6))


def variants(shape: MoeShape, fractions: tuple[float, ...]) -> list[tuple[str, int, bool, bool]]:
    """What is compared: (name, slots per layer, is it a cache, does it look ahead)."""
    found = [("all resident", shape.num_experts, False, False), ("on demand", shape.top_k, False, False)]
    for fraction in fractions:
        slots = max(2 * shape.top_k, int(fraction * shape.num_experts))
        found += [
            (f"cache {fraction:.0%}", slots, True, False),
            (f"cache {fraction:.0%} + prefetch", slots, True, True),
        ]
    return found


def warm_up_steps(trace: Trace) -> int:
    """Steps at the beginning of a trace that are run and not measured."""
    return len(trace.routed) // 3


def missed_bytes(trace: Trace, shape: MoeShape, slots: int, cached: bool) -> float:
    """Bytes per token that cross the link without prefetch: what a perfect overlap would still have to move."""
    if slots == shape.num_experts:
        return 0.0
    if not cached:
        return float(shape.num_layers * shape.top_k * shape.record_bytes)
    misses = cache_misses(trace, shape, slots, "lfru", warm_up_steps(trace))
    return sum(misses) / len(misses) * shape.record_bytes
