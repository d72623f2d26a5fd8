"""Decode time of every variant at one residency: engines side by side, one awake at a time, in interleaved rounds."""

import os
import tempfile
from pathlib import Path
from typing import Any

import machine
from chain import walk
from harness import Engine
from serve import Refused, Server
from shapes import ServingPlan
from side_rows import Contestant, describe, rows_of
from variants import RESIDENT, Variant, groups, variants

OVERHEAD_BYTES = 5e9
"""Of an engine beside its experts: other weights, KV cache, CUDA graphs and context; on the host the process."""
LOGPROB_SEQUENCES, LOGPROB_TOKENS = 2, 16


def measure(model: Path, plan: ServingPlan, residency: float, link_gbps: float, on_gpu: bool) -> dict[str, Any]:
    """One residency: what each engine is, and a row per variant and batch size."""
    plugin = {} if plan.emulated_gbps is None else {"emulated_link_gbps": plan.emulated_gbps}
    found = [v for v in variants(plan.shape, residency, plugin) if v.name in plan.variants or not plan.variants]
    engines: dict[str, Any] = {v.name: {"status": "needs a GPU"} for v in found if v.needs_gpu and not on_gpu}
    rows: list[dict[str, Any]] = []
    packed = groups([v for v in found if v.name not in engines], *_memory(on_gpu))
    for group in packed:
        contestants = _start(model, plan, group, engines, on_gpu)
        try:
            _run(contestants, engines, plan)
        finally:
            for contestant in contestants:
                contestant.server.close()
        engines |= {c.variant.name: describe(c, contestants[0], plan) for c in contestants}
        rows += rows_of(contestants, plan, link_gbps)
    failed = any(engine["status"] == "failed" for engine in engines.values())
    return {
        **({"status": "failed"} if failed else {}),
        "residency": residency,
        "link_gbps": link_gbps,
        "link": "measured" if on_gpu else "emulated",
        "at_once": [[variant.name for variant in group] for group in packed],
        "engines": engines,
        "rows": rows,
    }


def _memory(on_gpu: bool) -> tuple[float, float, float]:
    """What engines may use of the accelerator and of the host, and what each needs beside its experts."""
    host = 0.85 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not on_gpu:
        return host, host, 1.5e9
    return 0.9 * float(machine.gpus()[0]["memory.total"].split()[0]) * 2**20, host, OVERHEAD_BYTES


def engine_of(model: Path, plan: ServingPlan, variant: Variant, on_gpu: bool) -> Engine:
    """How the variant is started: vLLM's defaults, but for memory, so that several fit, and captured sizes."""
    batch = max(plan.batches)
    extra: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": max(2048, batch * 64),
        **variant.extra,
    }
    if on_gpu:
        extra |= {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**30}
        extra["compilation_config"] = {"cudagraph_capture_sizes": list(plan.batches)}
    return Engine(str(model), not on_gpu, variant.config, batch, 1024, extra)


def _start(
    model: Path, plan: ServingPlan, group: list[Variant], engines: dict[str, Any], on_gpu: bool
) -> list[Contestant]:
    """All at once. Who is refused, or does other things than asked for, is entered in `engines` and left out."""
    logs = Path(tempfile.mkdtemp(prefix="engines-"))
    contestants = [
        Contestant(variant, Server(engine_of(model, plan, variant, on_gpu), logs / f"{number}.log"))
        for number, variant in enumerate(group)
    ]
    for contestant in list(contestants):
        try:
            contestant.start = contestant.server.started()
            asked = (contestant.variant.config or {}).get("execution", "exact")
            serves = contestant.start["info"].get("execution", "exact")
            if not serves.startswith(asked):
                raise Refused(serves)
        except (Refused, RuntimeError) as error:
            _drop(contestant, contestants, engines, error)
    return contestants


def _drop(contestant: Contestant, contestants: list[Contestant], engines: dict[str, Any], error: Exception) -> None:
    """Go on without one; never without the control."""
    contestant.server.close()
    contestants.remove(contestant)
    status = "refused" if isinstance(error, Refused) else "failed"
    engines[contestant.variant.name] = {"status": status, "reason": str(error)}
    if contestant.variant.name == RESIDENT:
        for other in contestants:
            other.server.close()
        raise error


def _run(contestants: list[Contestant], engines: dict[str, Any], plan: ServingPlan) -> None:
    """Every sequence goes on where its last round ended; the very first round warms up."""
    skip = 0

    def ask_all(batch: int, num_tokens: int, logprobs: bool = False) -> list[tuple[Contestant, dict[str, Any]]]:
        nonlocal skip
        prompts = [walk(plan.shape.vocab, i, plan.num_prompt_tokens, skip) for i in range(batch)]
        skip += num_tokens
        answers = []
        for contestant in list(contestants):
            try:
                result = contestant.server.measure(prompts, num_tokens, logprobs)
                answers.append((contestant, {**result, "prompts": prompts}))
            except RuntimeError as error:
                _drop(contestant, contestants, engines, error)
        return answers

    ask_all(plan.batches[0], plan.num_tokens)
    for batch in plan.batches:
        for _ in range(plan.rounds):
            for contestant, result in ask_all(batch, plan.num_tokens):
                contestant.rounds.setdefault(batch, []).append(result)
    for contestant, result in ask_all(LOGPROB_SEQUENCES, LOGPROB_TOKENS, logprobs=True):
        contestant.checked = result
