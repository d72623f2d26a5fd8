"""From what the engines gave to the rows of the result."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from chain import followed
from routing import bound_ms
from serve import Server
from shapes import ServingPlan
from variants import CACHE, LOOK_AHEAD, Variant


@dataclass
class Contestant:
    """A variant's server and what it has given so far: `rounds[batch]` is a list of Server.measure's results."""

    variant: Variant
    server: Server
    start: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)


def describe(contestant: Contestant, control: Contestant, plan: ServingPlan) -> dict[str, Any]:
    """What it is, and whether its log-probabilities are the control's and its tokens those of the cycle."""
    ours, theirs = (c.checked["logprobs"] for c in (contestant, control))
    deviations = [abs(a - b) for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True)]
    tokens = [
        (prompt, generated)
        for results in contestant.rounds.values()
        for result in results
        for prompt, generated in zip(result["prompts"], result["tokens"], strict=True)
    ]
    in_cycle = sum(followed(prompt, generated, plan.shape.vocab) for prompt, generated in tokens)
    return {
        "status": "ok",
        **contestant.start,
        "expert_gb_on_accelerator": round(contestant.variant.accelerator_bytes / 1e9, 3),
        "arguments": contestant.variant.config or contestant.variant.extra,
        "largest_logprob_deviation": max(deviations),
        "tokens_of_the_cycle": round(in_cycle / sum(len(generated) for _, generated in tokens), 4),
    }


def rows_of(contestants: list[Contestant], plan: ServingPlan, link_gbps: float) -> list[dict[str, Any]]:
    """A row per variant and batch size; the first contestant is the control."""
    control, rows = contestants[0], []
    cache = next((c for c in contestants if c.variant.name == CACHE), None)
    for contestant in contestants:
        for batch, results in contestant.rounds.items():
            resident_ms = _tpot_ms(control.rounds[batch])
            # Look-ahead hides copies, it does not avoid them: its bound is that of the cache without it.
            missed = _missed_bytes(cache if cache and contestant.variant.name == LOOK_AHEAD else contestant, batch)
            rows.append(
                {
                    "variant": contestant.variant.name,
                    "batch": batch,
                    "tpot_ms": _tpot_ms(results),
                    "resident_ms": resident_ms,
                    "bound_ms": None if missed is None else round(bound_ms(resident_ms, missed, link_gbps), 4),
                    "missed_mb_per_token": None if missed is None else round(missed / batch / 1e6, 4),
                    "wall_s": round(sum(sum(result["steps"]) for result in results), 3),
                    "differing_tokens": _differing(results, control.rounds[batch]),
                    **_counted(results),
                }
            )
    return rows


def _tpot_ms(results: list[dict[str, Any]]) -> float:
    """The median of the rounds' mean steps: misses come in bursts, so steps have a mean and rounds a median."""
    return round(1000 * statistics.median(statistics.mean(result["steps"]) for result in results), 4)


def _total(results: list[dict[str, Any]], *names: str) -> float:
    return sum(result["counted"].get(name, 0.0) for result in results for name in names)


def _missed_bytes(contestant: Contestant, batch: int) -> float | None:
    """Bytes per decode step that cross the link because a step needs them; None where nobody counts them."""
    if contestant.variant.config is None:
        return contestant.variant.moved_bytes
    results = contestant.rounds[batch]
    moved = _total(results, "transfer_bytes_total/demand", "transfer_bytes_total/overflow")
    return moved / sum(result["num_steps"] for result in results)


def _counted(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The plugin's own counters: rates, None where nothing was counted."""
    looked_up = [f"lookups_total/{outcome}" for outcome in ("hit", "late", "miss")]
    steps = sum(result["num_steps"] for result in results)
    return {
        "hit_rate": _ratio(_total(results, looked_up[0]), _total(results, *looked_up)),
        "late_rate": _ratio(_total(results, looked_up[1]), _total(results, *looked_up)),
        "recall": _ratio(_total(results, "recall_found_total/top_k"), _total(results, "recall_routed_total")),
        "prefetched_mb_per_step": round(_total(results, "transfer_bytes_total/prefetch") / steps / 1e6, 4),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _differing(results: list[dict[str, Any]], control: list[dict[str, Any]]) -> int:
    return sum(
        a != b
        for ours, theirs in zip(results, control, strict=True)
        for one, two in zip(ours["tokens"], theirs["tokens"], strict=True)
        for a, b in zip(one, two, strict=True)
    )
