"""What the rows say: medians over rounds, who serves best, and with which settings."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_expert_prefetch.bench.contestants import NAMES, STOCK, Contestant

_FIGURES = ("output_tokens_per_s", "tpot_ms", "tpot_ms_p99", "ttft_ms", "hit_rate", "mb_per_token")


@dataclass(frozen=True)
class Verdict:
    """`best`: of those that keep experts in host memory; None where none was measured."""

    medians: tuple[dict[str, Any], ...]
    best: str | None
    line: str


def medians(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each contestant and concurrency, the ceiling first."""
    found = []
    keys = {(row["name"], row["concurrency"]) for row in rows}
    for name, concurrency in sorted(keys, key=lambda key: (NAMES.index(key[0]), key[1])):
        own = [row for row in rows if (row["name"], row["concurrency"]) == (name, concurrency)]
        figures = {
            figure: round(statistics.median(row[figure] for row in own), 4) for figure in _FIGURES if figure in own[0]
        }
        found.append({"name": name, "concurrency": concurrency, "rounds": len(own), **figures})
    ceiling = {row["concurrency"]: row["output_tokens_per_s"] for row in found if row["name"] == STOCK}
    for row in found:
        if row["concurrency"] in ceiling:
            row["share_of_stock"] = round(row["output_tokens_per_s"] / ceiling[row["concurrency"]], 3)
    return found


def judge(rows: Sequence[Mapping[str, Any]], found: Sequence[Contestant]) -> Verdict:
    """Best is who gives most tokens per second, concurrencies weighing alike."""
    table = medians(rows)
    measured = {row["name"]: _mean(table, row["name"]) for row in table if row["name"] != STOCK}
    if not measured:
        return Verdict(tuple(table), None, "nobody but stock was measured")
    best = max(measured, key=lambda name: measured[name])
    others = [name for name in measured if name != best]
    second = max(others, key=lambda name: measured[name], default=None)
    line = f"best: {best}, {measured[best]:.1f} tokens/s"
    if second:
        line += f", {measured[best] / measured[second]:.2f} x {second}"
        if min(_by_round(rows, best)) <= max(_by_round(rows, second)):
            line += " (their rounds overlap: more --rounds, or no difference)"
    if any(row["name"] == STOCK for row in table):
        line += f", {measured[best] / _mean(table, STOCK):.0%} of stock with every expert resident"
    settings = next((one.arguments for one in found if one.name == best), [])
    return Verdict(tuple(table), best, f"{line}; settings: {' '.join(settings)}")


def _mean(table: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.geometric_mean([row["output_tokens_per_s"] for row in table if row["name"] == name])


def _by_round(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Tokens per second in each round, concurrencies weighing alike."""
    own = [row for row in rows if row["name"] == name]
    return [
        statistics.geometric_mean([row["output_tokens_per_s"] for row in own if row["round"] == number])
        for number in sorted({row["round"] for row in own})
    ]
