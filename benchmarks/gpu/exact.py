"""Tokens and log-probabilities of the trained tiny MoE: plain vLLM against the plugin, in every mode of execution."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import exactness
import machine
from harness import TINY_MODEL, Engine, engine_job, run_in_process
from shapes import ServingPlan

RESIDENCY = 0.5
NUM_TOKENS = 32
EAGER = "eager"
GRAPHS = {"piecewise graphs": "PIECEWISE", "full graphs": "FULL_AND_PIECEWISE"}
AT_ONCE = 8


def measure(plan: ServingPlan, on_gpu: bool, quick: bool) -> dict[str, Any]:
    """One row per mode, staging engine and batch size. Without a GPU there are no graphs, but compiled steps."""
    modes = [EAGER, *(GRAPHS if on_gpu else [] if quick else ["compiled"])]
    runs = [(mode, staging) for mode in modes for staging in (None, "native")]
    if not quick:
        runs.append((EAGER, "torch"))  # Python's planner: where the host may decide
    batches = [1, plan.exact_prompts]
    wanted = {run: _job(*run, batches, plan.exact_prompts, on_gpu) for run in runs}
    script = str(machine.ROOT / "benchmarks/exactness.py")
    with ThreadPoolExecutor(AT_ONCE if on_gpu else 1) as pool:
        found = dict(zip(wanted, pool.map(lambda job: run_in_process(script, job), wanted.values()), strict=True))
    rows = []
    for (mode, staging), ours in found.items():
        for batch in map(str, batches) if staging else ():
            theirs, split = found[mode, None][batch], ours[batch]["expert_waves"] > 0
            compared = exactness.compare(theirs["sequences"], ours[batch]["sequences"], split)
            rows.append({"mode": mode, "staging": staging, "batch": int(batch), **vars(compared)})
            rows[-1]["bit_equal"] = compared.bit_equal
    wrong = any(row["differing_tokens"] or not row["bit_equal"] for row in rows)
    return {**({"status": "failed"} if wrong else {}), "model": TINY_MODEL.name, "residency": RESIDENCY, "rows": rows}


def _job(mode: str, staging: str | None, batches: list[int], num_prompts: int, on_gpu: bool) -> dict[str, Any]:
    config = None if staging is None else {"cache_fraction": RESIDENCY, "staging": staging}
    extra: dict[str, Any] = {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**28} if on_gpu else {}
    if mode in GRAPHS:
        extra["compilation_config"] = {"cudagraph_mode": GRAPHS[mode], "cudagraph_capture_sizes": batches}
    engine = Engine(str(TINY_MODEL), mode == EAGER, config, max(batches), extra=extra)
    return engine_job(engine, batches=batches, num_prompts=num_prompts, num_tokens=NUM_TOKENS)
