"""Does `vllm-expert-prefetch plan` say what happens? Its arithmetic against engines on an emulated link.

Both demo models, three shares of experts with a slot, three links, on which a record takes 0.5, 1 and 2 times as long
as a layer computes. One sequence at a time. The plan gets the machine as `--measure` would: how long a step takes where
copies take no time, measured in turn with the rest, and the link. Everything else it reads from config.json.

*Bytes per token*: planned for the hit rate that was measured, against the counters. *TPOT*: planned for that hit rate
without look-ahead, against the clock. *Before anything is measured*: whether hit rate and TPOT, with look-ahead, are in
the ranges that the plan gives.

`worst_bytes` and `worst_tpot`: greatest relative errors; at most 0.02 and 0.15 are wanted. `in_range`: share of cells.
"""

import statistics
import sys
from dataclasses import replace
from typing import Any

from harness import ROOT, TINY_MODEL, finish, job_output, parser, run_in_process

from vllm_expert_prefetch.config import ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import Load
from vllm_expert_prefetch.planning.model_files import find
from vllm_expert_prefetch.planning.plan import Plan, make_plan
from vllm_expert_prefetch.planning.timing import LAYER_SECONDS, MEMORY_SHARE, Machine

RESIDENCIES, RATIOS = (0.25, 0.5, 0.75), (0.5, 1.0, 2.0)
CONTEXT = 512
PLENTY = 1e12
"""Bytes of memory: nothing is to be refused here."""


def main() -> int:
    """Measure, plan and compare."""
    arguments = parser(__doc__)
    arguments.add_argument("--models", default="tiny,smollm2-moe", help="tiny, smollm2-moe; the latter made beforehand")
    arguments.add_argument("--rounds", type=int, default=5, help="batches of requests in each cell")
    options = arguments.parse_args()
    if options.job:
        with job_output(options.job) as (job, result):
            measure(job, result)
        return 0
    kinds, residencies = options.models.split(","), list(RESIDENCIES)
    if options.quick:
        kinds, residencies, options.rounds = ["tiny"], [0.5], 2
    rows = []
    for kind in kinds:
        model = str(TINY_MODEL if kind == "tiny" else ROOT / ".demo" / kind)
        for residency in residencies:
            job = {"model": model, "residency": residency, "rounds": options.rounds}
            job |= {"tokens": 96 if kind == "tiny" and not options.quick else 48}
            for measured in run_in_process(__file__, job)["rows"]:
                rows.append({"model": kind, "residency": residency, **compare(model, measured)})
                if not options.json:
                    print(rows[-1], flush=True)
    finish("plan_accuracy", {**summary(rows), "rows": rows}, options)
    return 0


def measure(job: dict[str, Any], result: dict[str, Any]) -> None:
    """In the child: one engine over three links, look-ahead off and on, in turn."""
    from lookahead_engine import INSTANT_GBPS, LATENCY_US, StudyEngine, Variant

    engine = StudyEngine(job["model"], job["residency"], True, None, job["tokens"])
    variants = {"off": Variant("off"), "auto": Variant("auto", "router", is_forced=False)}
    requests = engine.requests(job["rounds"], 1)
    engine.run(variants["off"], INSTANT_GBPS, requests[0])  # warm-up
    step = seconds_of([engine.run(variants["off"], INSTANT_GBPS, own) for own in requests], waits=False)
    result["rows"] = rows = []
    for ratio in RATIOS:
        record_seconds = ratio * step / engine.num_layers
        gbps = engine.record_bytes / (record_seconds - LATENCY_US * 1e-6) / 1e9
        runs: dict[str, list[Any]] = {"instant": [], **{name: [] for name in variants}}
        for own in requests:
            runs["instant"].append(engine.run(variants["off"], INSTANT_GBPS, own))
            for name, variant in variants.items():
                runs[name].append(engine.run(variant, gbps, own))
        counted = {
            series: statistics.mean(run.counted[series] for run in runs["off"]) for series in runs["off"][0].counted
        }
        hits, misses = counted["lookups_total/hit"], counted["lookups_total/miss"]
        rows.append(
            {
                "copy_compute": ratio,
                "slots": engine.num_slots,
                "compute_ms": 1e3 * seconds_of(runs["instant"], waits=False),
                "link_gbps": engine.record_bytes / record_seconds / 1e9,
                "hit_rate": hits / (hits + misses),
                "bytes_per_token": counted["transfer_bytes_total/demand"] + counted["transfer_bytes_total/overflow"],
                "tpot_ms": 1e3 * seconds_of(runs["off"]),
                "tpot_auto_ms": 1e3 * seconds_of(runs["auto"]),
            }
        )


def seconds_of(runs: list[Any], waits: bool = True) -> float:
    """Of a step: the median of what it takes apart from waiting, and the mean of that."""
    rest = statistics.median(milliseconds for run in runs for milliseconds in run.rest_ms) / 1e3
    stall = statistics.mean(run.counted["stall_seconds_total"] for run in runs)
    return rest + (stall if waits else 0.0)


def compare(model: str, measured: dict[str, Any]) -> dict[str, Any]:
    """A row: what was planned beside what was measured, and the relative errors."""
    plan = plan_of(model, measured)
    rate, seconds = measured["hit_rate"], measured["tpot_ms"] / 1e3
    planned_bytes = plan.decode.needed_bytes * (1 - rate)
    planned = plan.decode.seconds(plan.machine, rate, 0.0)
    bound = plan.decode.bound(plan.machine, rate)
    return {
        **{name: round(value, 4) for name, value in measured.items()},
        "planned_bytes": round(planned_bytes),
        "bytes_error": round(planned_bytes / measured["bytes_per_token"] - 1, 4),
        "planned_tpot_ms": round(1e3 * planned, 4),
        "tpot_error": round(planned / seconds - 1, 4),
        "bound_ms": round(1e3 * bound, 4),
        "planned_hit_rate": [round(getattr(plan.hits, name), 3) for name in ("low", "expected", "high")],
        "planned_auto_ms": [round(1e3 * getattr(plan.tpot, name), 3) for name in ("low", "expected", "high")],
        "hit_rate_in_range": plan.hits.low <= rate <= plan.hits.high,
        "tpot_in_range": plan.tpot.low <= measured["tpot_auto_ms"] / 1e3 <= plan.tpot.high,
    }


def plan_of(model: str, measured: dict[str, Any]) -> Plan:
    """Of a machine whose step takes as long as was measured where copies took no time."""
    config = ExpertPrefetchConfig(slots_per_layer=int(measured["slots"]))
    machine = Machine(PLENTY, 1e12, None, measured["link_gbps"] * 1e9)
    work = make_plan(find(model), machine, Load(CONTEXT, 1), config=config).decode
    reading = measured["compute_ms"] / 1e3 - work.layers * LAYER_SECONDS
    machine = replace(machine, bytes_per_second=work.read_bytes / (MEMORY_SHARE * reading))
    return make_plan(find(model), machine, Load(CONTEXT, 1), config=config)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the study is about."""
    return {
        "worst_bytes": max(abs(row["bytes_error"]) for row in rows),
        "worst_tpot": max(abs(row["tpot_error"]) for row in rows),
        "in_range": {
            name: round(statistics.mean(row[f"{name}_in_range"] for row in rows), 3) for name in ("hit_rate", "tpot")
        },
        "cells": len(rows),
    }


if __name__ == "__main__":
    sys.exit(main())
