"""Engines for tests: open one in this process, generate greedily, compare, free it again."""

import contextlib
import functools
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
TINY_MODEL = TESTS / "models" / "tiny-moe"


@dataclass(frozen=True)
class Output:
    """A greedy completion: token ids and the log-probabilities of the two best tokens at each place."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]


_has_failed = False
"""Whether the last engine did not start."""


@contextlib.contextmanager
def open_engine(model: Path | str, config: dict[str, Any] | bool | None, **options: Any) -> Iterator[Any]:
    """A vLLM `LLM` in this process. `config`: the plugin's configuration, None for an engine that does not ask."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    global _has_failed
    _spare_what_is_done_for_every_engine()
    if _has_failed:
        gc.collect()  # else what an engine left that failed at its start, threads and all, would be frozen for good
        _has_failed = False
    gc.freeze()  # what is there by now stays: not looked at by every collection of this engine's
    if config is not None:
        options["additional_config"] = {"expert_prefetch": config}
    defaults = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 27,
    }
    _has_failed = True
    llm = LLM(str(model), **(defaults | options))
    _has_failed = False
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # now, not when the caller's last reference goes
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


@functools.cache
def _spare_what_is_done_for_every_engine() -> None:
    """More than half of the time of an engine that is one of many in a process, and nothing that is tested here."""
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.v1.engine import core
    from vllm.v1.worker import gpu_worker

    # vLLM looks at a model's class in a process of its own, 10 s for every new class.
    registry._run_in_subprocess = lambda look: look()
    # It looks through every module for the kernels that it replaces on CPUs, which it has then replaced.
    current_platform.register_triton_kernel_overrides = functools.cache(
        current_platform.register_triton_kernel_overrides
    )
    # It collects garbage among all objects of the process seven times.
    core.freeze_gc_heap = gpu_worker.freeze_gc_heap = lambda: None
    gc.unfreeze = lambda: None


def greedy(llm: Any, prompts: list[Any], num_tokens: int = 16, adapters: list[Any] | None = None) -> list[Output]:
    """Greedy completions of all prompts in one batch, each with its LoRA adapter where these are given."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, logprobs=2, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
    return [
        Output(
            tuple(output.outputs[0].token_ids),
            tuple(
                tuple(sorted((entry.logprob for entry in place.values()), reverse=True))
                for place in output.outputs[0].logprobs
            ),
        )
        for output in outputs
    ]


def prompts(count: int) -> list[str]:
    """Prompts of the domains in turn."""
    lines = [json.loads(line) for line in (TESTS / "data" / "prompts.jsonl").read_text().splitlines()]
    domains = list(dict.fromkeys(line["domain"] for line in lines))
    by_domain = [[line["prompt"] for line in lines if line["domain"] == domain] for domain in domains]
    return [prompt for group in zip(*by_domain, strict=True) for prompt in group][:count]


def layers(llm: Any) -> list[Any]:
    """The modules of the engine's model that hold routed experts."""
    from vllm_expert_prefetch.serving.compat import moe_layers_of

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    return moe_layers_of(model)


def draft_layers(llm: Any) -> list[Any]:
    """Those of the model that drafts for it."""
    from vllm_expert_prefetch.serving.compat import moe_layers_of

    return moe_layers_of(llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model)


def caches(llm: Any) -> list[Any]:
    """The caches of its layers, after a check of their books."""
    found = [layer.cache for layer in layers(llm) if layer.cache is not None]
    for cache in found:
        cache.check_integrity()
    return found


def counters(llm: Any) -> dict[str, float]:
    """The plugin's counters of this engine, by series."""
    from vllm_expert_prefetch.metrics.definitions import SERIES

    source = layers(llm)[0].worker.publisher.counters
    return {series: source.get(series) for series in SERIES}
