"""Prompts: how well a long one hides its copies, and what it does to sequences that decode beside it.

Two studies of one model with a share of its experts in slots, over an emulated link. All engines are open at once, each
in a process of its own, and take turns, so that a slow minute hits all of them: figures are medians over rounds.

*Alone*: a prompt of `--prompt` tokens in one step. `over_bound`: its time over the larger one of computing it (every
expert resident) and of copying every absent expert over the link, with one area of overflow rows and with two.
`over_full_copy`: 32 sequences that decode, over computing and then copying every absent expert of every layer.
*Beside*: four sequences decode, a prompt of twice as many tokens comes; `itl_p99_ms`: the 99th percentile of the time
between their tokens while it is computed, without `max_decode_delay_ms` and with it, and how long the prompt takes.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness import TINY_MODEL, Engine, engine_environment, finish, load_prompts, parser

NUM_DECODING, NUM_WIDE = 4, 32
KV_CACHE = {"kv_cache_memory_bytes": 1 << 28}
DELAY_SHARE = 0.5
"""`max_decode_delay_ms`, as a share of what a step takes that copies every absent expert."""


class Variant(NamedTuple):
    """One engine. `delay_ms`: `max_decode_delay_ms`."""

    name: str
    share: float
    gbps: float
    prefetch: str = "on"
    areas: int = 1
    delay_ms: float | None = None

    @property
    def config(self) -> dict[str, Any] | None:
        """The plugin's; None for plain vLLM."""
        if not self.share:
            return None
        config = {"cache_fraction": self.share, "emulated_link_gbps": self.gbps, "prefetch": self.prefetch}
        config["shared_store"] = "benchmark-prompts"  # all engines hold the experts once
        if self.prefetch != "off":
            config["areas"] = self.areas
        return config if self.delay_ms is None else config | {"max_decode_delay_ms": self.delay_ms}


class Server:
    """An engine in a process of its own that answers one question at a time."""

    def __init__(self, model: str, variant: Variant, most_tokens: int) -> None:
        job = json.dumps({"model": model, "config": variant.config, "most_tokens": most_tokens})
        self.variant = variant
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--job", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=engine_environment(),
        )
        self.facts = self._answer()

    def ask(self, **question: Any) -> Any:
        """The engine's answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the engine of {self.variant} ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> int:
    """Open the engines, take turns, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(TINY_MODEL))
    arguments.add_argument("--share", type=float, default=0.5, help="of the experts that have a slot")
    arguments.add_argument("--prompt", type=int, default=900, help="tokens of a prompt alone in its step")
    arguments.add_argument("--copy-compute", type=float, default=1.0, help="copying over computing, of that prompt")
    arguments.add_argument("--steps", type=int, default=12, help="in which 32 sequences decode")
    arguments.add_argument("--rounds", type=int, default=9)
    args = arguments.parse_args()
    if args.job:
        return serve(json.loads(args.job))
    rounds = 3 if args.quick else args.rounds
    say = (lambda *_: None) if args.json else print
    most = 2 * args.prompt + NUM_WIDE
    plain = Server(args.model, Variant("plain vLLM", 0.0, 0.0), most)
    compute = statistics.median(plain.ask(kind="alone", num_tokens=args.prompt) for _ in range(5))
    probe = Server(args.model, Variant("probe", args.share, 100.0, "off"), most)
    absent_bytes = probe.facts["absent_bytes"]
    probe.close()
    copy = args.copy_compute * compute
    gbps = absent_bytes / copy / 1e9
    delay_ms = 1000 * DELAY_SHARE * (copy + compute)
    say(f"computing {1000 * compute:.1f} ms, {absent_bytes / 1e6:.1f} MB absent, a link of {gbps:.3g} GB/s")
    variants = [
        Variant("off", args.share, gbps, "off"),
        Variant("one area", args.share, gbps),
        Variant("two areas", args.share, gbps, areas=2),
        Variant("two areas, bounded", args.share, gbps, areas=2, delay_ms=delay_ms),
    ]
    servers = [plain, *(Server(args.model, variant, most) for variant in variants)]
    questions: dict[str, dict[str, Any]] = {
        "alone": {"num_tokens": args.prompt},
        "wide": {"num_sequences": NUM_WIDE, "num_steps": args.steps},
        "beside": {"num_tokens": 2 * args.prompt, "num_sequences": NUM_DECODING},
    }
    found: dict[str, dict[str, list[Any]]] = {kind: {s.variant.name: [] for s in servers} for kind in questions}
    for number in range(rounds + 1):
        for kind, question in questions.items():
            for server in servers:
                answer = server.ask(kind=kind, **question)
                if number:  # the first round warms up
                    found[kind][server.variant.name].append(answer)
        say(f"round {number} of {rounds}")
    for server in servers:
        server.close()
    result = report(found, copy, {"model": Path(args.model).name, "share": args.share, "prompt": args.prompt})
    result |= {"copy_compute": args.copy_compute, "gbps": gbps, "delay_ms": delay_ms, "rounds": rounds}
    for key in ("over_bound", "over_full_copy", "itl_p99_ms", "prompt_seconds"):
        say(key, json.dumps(result[key]))
    finish(f"prompts-{Path(args.model).name}", result, args)
    return 0


def report(found: dict[str, dict[str, list[Any]]], copy: float, result: dict[str, Any]) -> dict[str, Any]:
    """The medians, as the module's docstring defines them. `copy`: seconds for every absent expert."""
    alone, wide, beside = (found[kind] for kind in ("alone", "wide", "beside"))
    computing = statistics.median(alone["plain vLLM"])
    bound = max(computing, copy)
    full_copy = statistics.median(wide["plain vLLM"]) + copy
    served = [name for name in alone if name != "plain vLLM"]
    result["compute_ms"], result["copy_ms"] = 1000 * computing, 1000 * copy
    result["over_bound"] = {name: statistics.median(alone[name]) / bound for name in served}
    result["over_full_copy"] = {name: statistics.median(wide[name]) / full_copy for name in served}
    gaps = {name: [gap for answer in beside[name] for gap in answer["gaps"]] for name in beside}
    result["itl_p99_ms"] = {name: 1000 * statistics.quantiles(gaps[name], n=100)[98] for name in beside}
    result["itl_p50_ms"] = {name: 1000 * statistics.median(gaps[name]) for name in beside}
    result["prompt_seconds"] = {
        name: statistics.median(answer["prompt_seconds"] for answer in beside[name]) for name in beside
    }
    return result


def serve(job: dict[str, Any]) -> int:
    """In the engine's process: answer questions from the standard input."""
    most = job["most_tokens"]
    engine = (
        Engine(job["model"], True, job["config"], NUM_WIDE, most, {"max_num_batched_tokens": most, **KV_CACHE})
        .open()
        .llm_engine
    )
    _say(_facts(engine))
    for line in sys.stdin:
        question = json.loads(line)
        kind = question.pop("kind")
        kinds: dict[str, Callable[..., Any]] = {"alone": _alone, "wide": _wide, "beside": _beside}
        _say(kinds[kind](engine, **question))
    os._exit(0)  # nothing is worth waiting for


def _say(answer: Any) -> None:
    print("ANSWER", json.dumps(answer), flush=True)


def _facts(engine: Any) -> dict[str, Any]:
    from vllm_expert_prefetch.serving import compat

    layers = compat.moe_layers_of(engine.model_executor.driver_worker.worker.model_runner.get_model())
    caches = [cache for cache in (getattr(layer, "cache", None) for layer in layers) if cache is not None]
    return {"absent_bytes": sum(cache.record_bytes * (cache.num_experts - cache.num_slots) for cache in caches)}


def _tokens(engine: Any, number: int) -> list[int]:
    """Of real text, as long as is asked for."""
    tokenizer = engine.get_tokenizer()
    ids = [token for prompt in load_prompts(32) for token in tokenizer.encode(prompt)]
    return (ids * (number // len(ids) + 1))[:number]


def _add(engine: Any, name: str, tokens: list[int], num_answers: int) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_answers, ignore_eos=True, detokenize=False)
    engine.add_request(name, {"prompt_token_ids": tokens}, sampling)


def _alone(engine: Any, num_tokens: int) -> float:
    _add(engine, "prompt", _tokens(engine, num_tokens), 1)
    started = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - started


def _wide(engine: Any, num_sequences: int, num_steps: int) -> float:
    """Seconds of a step in which so many sequences decode."""
    for number in range(num_sequences):
        _add(engine, str(number), _tokens(engine, 8 * number + 16)[8 * number :], num_steps + 2)
    seconds = []
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _beside(engine: Any, num_tokens: int, num_sequences: int) -> dict[str, Any]:
    """The gaps between the tokens of sequences that decode, while a prompt is computed beside them."""
    for number in range(num_sequences):
        _add(engine, str(number), _tokens(engine, 8 * number + 16)[8 * number :], 1000)
    for _ in range(6):
        engine.step()
    _add(engine, "prompt", _tokens(engine, num_tokens), 1)
    gaps, started, is_there = [], time.perf_counter(), False
    while not is_there:
        begun = time.perf_counter()
        is_there = any(output.request_id == "prompt" and output.finished for output in engine.step())
        gaps.append(time.perf_counter() - begun)
    seconds = time.perf_counter() - started
    engine.abort_request([str(number) for number in range(num_sequences)])
    while engine.has_unfinished_requests():
        engine.step()
    return {"gaps": gaps, "prompt_seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
