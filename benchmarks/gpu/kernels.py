"""The plugin's kernels alone: gather bandwidth by blocks, size and number of records; the latency of a plan."""

from typing import Any

import torch
from layers import DEVICE, ask, layer_of, make_caches, make_store, plan_only
from shapes import MB, Plan
from timing import captured, gbps, median_ms

NUM_IN_GRAPH = 100
"""Launches per replay, so that a replay's own cost does not count."""
TOP_K = 8
PLANNED = (128, 64, 1), (128, 96, 8), (512, 256, 8), (128, 64, 256), (128, 64, 8192)
"""Experts, slots, tokens."""


def measure_gather(plan: Plan, peak_gbps: float) -> dict[str, Any]:
    """GB/s of the gather kernel and of the copy engines, by record size, number of records and blocks.

    `fewest_blocks` is the smallest grid that reaches 95 % of the link's peak with the records of one token of the
    default model (8 of 9.4 MB), None when none does.
    """
    rows = []
    for record_bytes in plan.record_bytes:
        w2 = record_bytes // 48 * 16
        store = make_store((record_bytes - w2, w2), max(plan.num_records))
        for num_records in plan.num_records:
            rows += _measure_records(plan, store, num_records)
        del store
    for row in rows:
        row["of_peak"] = round(row["gbps"] / peak_gbps, 3)
    typical = [row for row in rows if row["by"] == "gather" and (row["record_mb"], row["records"]) == (9.437, 8)]
    enough = [row["blocks"] for row in typical if row["of_peak"] >= 0.95]
    return {"rows": rows, "fewest_blocks": min(enough, default=None), "num_sms": _num_sms()}


def _measure_records(plan: Plan, store: Any, num_records: int) -> list[dict[str, Any]]:
    rows = []
    loads = [(expert, num_records - 1 - expert) for expert in range(num_records)]
    record_bytes = sum(view[0].nbytes for view in store.views.values())
    calls = max(1, min(50, 200 * MB // (num_records * record_bytes)))
    for num_blocks in plan.num_blocks:
        cache = layer_of(make_caches(store, 1, store.num_experts, 1, num_blocks=num_blocks), 0)
        ask(cache, loads)
        ms = median_ms(captured(cache.gather).replay, plan.repeats, calls)
        rows.append(_row("gather", num_blocks, record_bytes, num_records, ms))

    def copy() -> None:
        for expert, row in loads:
            for name, view in store.views.items():
                cache.tensors[name][row].copy_(view[expert], non_blocking=True)

    rows.append(_row("copy engine", 0, record_bytes, num_records, median_ms(copy, plan.repeats, calls)))
    return rows


def _row(by: str, blocks: int, record_bytes: int, num_records: int, ms: float) -> dict[str, Any]:
    return {
        "by": by,
        "blocks": blocks,
        "record_mb": round(record_bytes / MB, 3),
        "records": num_records,
        "gbps": gbps(num_records * record_bytes, ms),
        "us": round(ms * 1e3, 2),
    }


def measure_plans(plan: Plan) -> dict[str, Any]:
    """Microseconds in a graph, launch included: of a plan with fresh random ids each time, its words written to the
    host; of a step that finds everything in its slots; and of a prefetch that finds everything there."""
    results: dict[str, Any] = {}
    for num_experts, num_slots, num_tokens in PLANNED:
        for policy in ("lru", "lfru"):
            key = f"plan_us_{num_tokens * TOP_K}_of_{num_experts}_{policy}"
            results[key] = _plan_us(num_experts, num_slots, num_tokens, policy, plan.repeats)
    return {**results, **_hit_us(plan)}


def _plan_us(num_experts: int, num_slots: int, num_tokens: int, policy: str, repeats: int) -> float:
    caches = make_caches(make_store((4096,), num_experts), 1, num_slots, TOP_K, policy)
    cache = layer_of(caches, 0)
    rows = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
    ids = torch.rand(NUM_IN_GRAPH, num_tokens, num_experts, device=DEVICE).topk(TOP_K).indices.int()

    def run() -> None:
        for routed in ids:
            plan_only(cache, caches, routed, rows)

    return round(median_ms(captured(run).replay, repeats) * 1e3 / NUM_IN_GRAPH, 2)


def _hit_us(plan: Plan) -> dict[str, float]:
    caches = make_caches(make_store((4096,), 128), 1, 64, TOP_K)
    cache = layer_of(caches, 0)
    rows, ids = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.arange(TOP_K, device=DEVICE).int().view(1, -1)
    works = {
        "empty_gather_us": cache.gather,
        "serve_us": lambda: cache.serve(ids, rows),
        "prefetch_us": lambda: cache.prefetch(ids, rows),
    }
    found = {}
    for name, work in works.items():

        def run(work: Any = work) -> None:
            for _ in range(NUM_IN_GRAPH):
                work()
            caches.join()

        found[name] = round(median_ms(captured(run).replay, plan.repeats) * 1e3 / NUM_IN_GRAPH, 2)
    return found


def _num_sms() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count
