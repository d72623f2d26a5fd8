"""Tokens and log-probabilities, plain vLLM against the plugin, in every mode of execution.

Two models: the trained tiny MoE, and a random checkpoint whose experts are large enough that layers share overflow rows
on a GPU. A configuration counts only if its cache was at work.

Stock against stock is the control. Where two runs of plain vLLM differ from each other, in the same mode and batch,
there is nothing to be equal to: the tokens must be the same, and no log-probability further off than theirs.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine  # noqa: F401  # puts the checkout onto the path
from chain import ChainOptions, walk
from checkpoint import CheckpointOptions, write_checkpoint
from exactness import Sequence, compare
from harness import TINY_MODEL, Engine, counters, engine_job, job_output, load_prompts, run_in_process
from shapes import MoeShape, ServingPlan

EAGER = "eager"
GRAPHS = {"piecewise graphs": "PIECEWISE", "full graphs": "FULL_AND_PIECEWISE"}
NUM_TOKENS, NUM_PROMPT_TOKENS = 32, 24
NUM_GROUPS = 8
"""Of prompts, at most, per batch size."""
AT_ONCE = 18
STOCK, CONTROL, PLUGIN = "stock", "control", "plugin"
SETTLE_SECONDS = 0.7
"""On a GPU, totals reach the counters twice a second."""
SHARING = MoeShape(4, 32, 4, hidden=1024, intermediate=512, num_heads=16, num_kv_heads=4, head_size=64, vocab=4096)
"""A row of w13 has 2 MB and one of w2 1 MB, so that most rows beyond the slots are in pages of their own."""


@dataclass(frozen=True)
class Subject:
    """A model, the share of its experts with a slot, and the size of its vocabulary where prompts are random tokens."""

    folder: str
    residency: float
    vocab: int | None = None


def measure(plan: ServingPlan, scratch: Path, on_gpu: bool, quick: bool) -> dict[str, Any]:
    """One row per model, mode and batch size. Without a GPU there are no graphs, but compiled steps."""
    modes = [EAGER, *(GRAPHS if on_gpu else [] if quick else ["compiled"])]
    subjects = {"trained, tiny": Subject(str(TINY_MODEL), 0.5)}
    if on_gpu:
        subjects["random, shares rows"] = Subject(_sharing_model(scratch), 0.25, SHARING.vocab)
    # All but the first and the last are no captured sizes: their steps have rows of padding.
    batches = [batch for batch in (1, 3, 5, 9, 17) if batch < plan.exact_prompts] + [plan.exact_prompts]
    wanted = {
        (name, mode, who): _job(subject, mode, who == PLUGIN, batches, plan.exact_prompts, on_gpu)
        for name, subject in subjects.items()
        for mode in modes
        for who in ((STOCK, CONTROL, PLUGIN) if on_gpu else (STOCK, PLUGIN))
    }
    with ThreadPoolExecutor(AT_ONCE if on_gpu else 1) as pool:
        found = dict(zip(wanted, pool.map(lambda job: run_in_process(__file__, job), wanted.values()), strict=True))
    rows = []
    for name, mode in {key[:2]: None for key in wanted}:
        for batch in map(str, batches):
            theirs, ours = found[name, mode, STOCK][batch], found[name, mode, PLUGIN][batch]
            again = found.get((name, mode, CONTROL), found[name, mode, STOCK])[batch]
            control = compare(theirs["sequences"], again["sequences"]).max_deviation
            both = [compare(stock["sequences"], ours["sequences"]) for stock in (theirs, again)]
            compared = min(both, key=lambda one: (one.differing_tokens, one.max_deviation))
            counted = {key: ours[key] for key in ("lookups", "overflow_mb", "prefetched_mb", "shared_mb")}
            rows.append({"model": name, "mode": mode, "batch": int(batch), **vars(compared), **counted})
            rows[-1] |= {"bit_equal": compared.bit_equal, "control_deviation": control}
            as_stock = compared.differing_tokens == 0 and compared.max_deviation <= control
            rows[-1]["as_stock"] = compared.bit_equal or as_stock
            must_share = subjects[name].vocab is not None
            at_work = ours["lookups"] > 0 and ours["overflow_mb"] > 0 and (ours["shared_mb"] > 0 or not must_share)
            rows[-1]["at_work"] = at_work
    wrong = any(not (row["as_stock"] and row["at_work"]) for row in rows)
    return {**({"status": "failed"} if wrong else {}), "rows": rows}


def _sharing_model(scratch: Path) -> str:
    import torch

    folder = scratch / "sharing"
    write_checkpoint(folder, CheckpointOptions(SHARING, ChainOptions()), torch.device("cuda"))
    return str(folder)


def _job(
    subject: Subject, mode: str, with_plugin: bool, batches: list[int], num_prompts: int, on_gpu: bool
) -> dict[str, Any]:
    extra: dict[str, Any] = {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 2**28} if on_gpu else {}
    if mode in GRAPHS:
        extra["compilation_config"] = {
            "cudagraph_mode": GRAPHS[mode],
            "cudagraph_capture_sizes": [batches[0], batches[-1]],
        }
    config = {"cache_fraction": subject.residency} if with_plugin else None
    engine = Engine(subject.folder, mode == EAGER, config, max(batches), extra=extra)
    if subject.vocab is not None:
        engine = replace(engine, extra={**extra, "skip_tokenizer_init": True})
    return engine_job(engine, batches=batches, num_prompts=num_prompts, vocab=subject.vocab, settle=on_gpu)


def generate(job: dict[str, Any], result: dict[str, Any]) -> None:
    """In the child: greedy sequences for each batch size, and what the plugin counted meanwhile."""
    from vllm import SamplingParams

    llm = Engine(**job["engine"]).open()
    prompts: list[Any] = load_prompts(job["num_prompts"]) if job["vocab"] is None else []
    if not prompts:
        tokens = [walk(job["vocab"], number, NUM_PROMPT_TOKENS) for number in range(job["num_prompts"])]
        prompts = [{"prompt_token_ids": ids} for ids in tokens]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=2, ignore_eos=True, detokenize=False)
    for batch in job["batches"]:
        before = _settled(job["settle"])
        asked = prompts[: NUM_GROUPS * batch]
        groups = [asked[start : start + batch] for start in range(0, len(asked), batch)]
        outputs = [output for group in groups for output in llm.generate(group, sampling, use_tqdm=False)]
        now = _settled(job["settle"])
        grown = {name: value - before.get(name, 0) for name, value in now.items()}
        result[str(batch)] = {
            "sequences": [_sequence(output.outputs[0]) for output in outputs],
            "lookups": sum(value for name, value in grown.items() if name.startswith("lookups_total")),
            "overflow_mb": grown.get("transfer_bytes_total/overflow", 0) / 1e6,
            "prefetched_mb": grown.get("transfer_bytes_total/prefetch", 0) / 1e6,
            "shared_mb": now.get("overflow_bytes", 0) / 1e6,
        }


def _settled(wait: bool) -> dict[str, float]:
    if wait:
        time.sleep(SETTLE_SECONDS)
    return counters()


def _sequence(completion: Any) -> Sequence:
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [(token, candidates[token].logprob) for token, candidates in pairs]


if __name__ == "__main__":
    with job_output(sys.argv[2]) as (job, result):
        generate(job, result)
