"""Engines of two worker processes, a core for each, and what their workers counted."""

from dataclasses import dataclass
from typing import Any

import pytest
from engines import TINY_MODEL, Output, greedy, open_engine, prompts

from vllm_expert_prefetch.locks import is_locked
from vllm_expert_prefetch.metrics.counters import SUFFIX, Snapshot, read_counters
from vllm_expert_prefetch.metrics.runtime_dir import ensure_runtime_dir

SERVED = {"cache_fraction": 0.5, "prefetch": "on", "emulated_link_gbps": 0.2}


@dataclass(frozen=True)
class Run:
    """What an engine said, and what each of its workers counted, by rank."""

    outputs: list[Output]
    ranks: dict[str, Snapshot]


def run(config: dict[str, Any] | None, **options: Any) -> Run:
    """16 prompts x 32 tokens, eight sequences at a time: decode steps route to no more ids than there are experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        before = set(ensure_runtime_dir().glob(f"*{SUFFIX}"))  # of other engines of this process
        with open_engine(TINY_MODEL, config, max_num_seqs=8, **options) as llm:
            outputs = greedy(llm, prompts(16), 32)
            files = {path for path in ensure_runtime_dir().glob(f"*{SUFFIX}") if is_locked(path)} - before
            ranks = [read_counters(path) for path in files]
    return Run(outputs, {snapshot.labels["rank"]: snapshot for snapshot in ranks})
