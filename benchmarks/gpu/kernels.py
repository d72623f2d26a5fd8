"""The plugin's kernels alone: gather bandwidth by blocks, size and number of records; the latency of a plan."""

from typing import Any

import torch
from layers import DEVICE, Layer, make_store, planner_state
from shapes import MB, Plan
from timing import captured, gbps, median_ms

from vllm_expert_prefetch.experts.device_staging import DeviceLane, DeviceStagingOptions
from vllm_expert_prefetch.native.library import cuda_library

NUM_IN_GRAPH = 100
"""Launches per replay, so that a replay's own cost does not count."""


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
    for num_blocks in plan.num_blocks:
        layer = Layer(store, num_records, DeviceLane(DEVICE), DeviceStagingOptions(num_demand_blocks=num_blocks))
        layer.ask(loads)
        num_bytes = num_records * layer.record_bytes
        calls = max(1, min(50, 200 * MB // num_bytes))
        ms = median_ms(captured(lambda it=layer: it.staging.stage(it.demand)).replay, plan.repeats, calls)  # type: ignore[misc]
        rows.append(_row("gather", num_blocks, layer.record_bytes, num_records, ms))
    for name, batched in (("copy engine", False), ("copy engine, batched", True)):
        with torch.cuda.stream(torch.cuda.Stream()):
            ms = median_ms(lambda it=batched: layer.staging.copy(loads, it), plan.repeats, calls)  # type: ignore[misc]
        rows.append(_row(name, 0, layer.record_bytes, num_records, ms))
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
    """Microseconds in a graph, launch included, of a plan with fresh random ids each time, and of an empty gather."""
    results: dict[str, Any] = {}
    for num_experts, num_slots, num_ids in ((128, 64, 8), (128, 96, 64), (512, 256, 64)):
        for policy, name in ((0, "lru"), (2, "lfru")):
            key = f"plan_us_{num_ids}_of_{num_experts}_{name}"
            results[key] = _plan_us(num_experts, num_slots, num_ids, policy, plan.repeats)
    layer = Layer(make_store((4096,), 8), 8, DeviceLane(DEVICE), DeviceStagingOptions())
    layer.ask([])

    def run() -> None:
        for _ in range(NUM_IN_GRAPH):
            layer.staging.stage(layer.demand)

    results["empty_gather_us"] = round(median_ms(captured(run).replay, plan.repeats) * 1e3 / NUM_IN_GRAPH, 2)
    return results


def _plan_us(num_experts: int, num_slots: int, num_ids: int, policy: int, repeats: int) -> float:
    top_k = 8
    state = planner_state(num_experts, num_slots, top_k, policy)
    words = torch.zeros(num_slots, dtype=torch.int32, device=DEVICE)
    real = torch.ones(num_ids // top_k, dtype=torch.int64, device=DEVICE)
    ids = torch.rand(NUM_IN_GRAPH, num_ids // top_k, num_experts, device=DEVICE).topk(top_k).indices.int()
    lists = [torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (2 * num_ids, 1, num_ids, 1)]
    slot_ids = torch.zeros(num_ids, dtype=torch.int32, device=DEVICE)
    library: Any = cuda_library()

    def run() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for routed in ids:
            library.plan_step(state, words, routed, real, slot_ids, *lists, 0, stream)

    return round(median_ms(captured(run).replay, repeats) * 1e3 / NUM_IN_GRAPH, 2)


def _num_sms() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count
