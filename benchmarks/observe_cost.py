"""What do the metrics cost? Decode steps of the demo model, batch 1, with counting and timing on and off in turn.

One engine in a process of its own; every few steps the counting is taken out or put back, so that a drift of the
machine's speed reaches both. `share_of_tpot` is the difference of the medians; `counted_share_of_tpot` is the time of
the counting code alone, timed in a loop, for the calls that one step makes. The second is the one to trust when the
first is within the machine's noise (`noise_share` is what the same comparison gives with counting on in both).
`ghosts_share_of_tpot` is the same comparison of ghost caches in place and taken out.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import TINY_MODEL, Engine, engine_job, finish, job_output, load_prompts, parser, run_in_process

from vllm_expert_prefetch.cache.words import Words

LIMIT = 0.005
STEPS_PER_TURN = 8


class Switch:
    """Takes the plugin's counting out of an engine, and puts it back."""

    def __init__(self, llm: Any) -> None:
        from vllm_expert_prefetch.serving.compat import moe_layers_of

        self._runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.layers = moe_layers_of(self._runner.get_model())
        self.publisher = self.layers[0].worker.publisher
        self._ghost_mirror = self.layers[0].worker.caches.ghost_mirror
        self._watched = {name: self._runner.__dict__[name] for name in ("execute_model", "sample_tokens")}

    def off(self) -> None:
        """No counter is written, no step is timed."""
        for name in self._watched:
            self._runner.__dict__.pop(name, None)

    def on(self) -> None:
        """As it is served."""
        self._runner.__dict__.update(self._watched)

    def ghosts_off(self) -> None:
        """No step is planned for ghost caches, and none of their words is read."""
        self._set_ghosts(False)

    def ghosts_on(self) -> None:
        """As it is served."""
        self._set_ghosts(True)

    def _set_ghosts(self, are_on: bool) -> None:
        mirror = self._ghost_mirror
        self.publisher._ledger._ghosts = mirror if are_on else None
        for layer in self.layers:
            states, own = layer.cache._ghosts
            given = (states, own) if are_on else (states[:0], own[:0])
            layer.worker.caches.library.cache_add_ghosts(layer.cache._native, *given)


def decode_steps(llm: Any, prompt: str, num_tokens: int, number: int, between: Callable[[int], None]) -> list[float]:
    """Seconds of each decode step of one request; `between` is called with the step's number before each."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(str(number), prompt, sampling)
    llm.llm_engine.step()
    seconds: list[float] = []
    while llm.llm_engine.has_unfinished_requests():
        between(len(seconds))
        started = time.perf_counter()
        llm.llm_engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def compare(
    llm: Any, rounds: int, num_tokens: int, turns: tuple[Callable[[], None], Callable[[], None]]
) -> list[float]:
    """Medians of the steps after each of the two `turns`, taken in turn every STEPS_PER_TURN steps."""
    times: tuple[list[float], list[float]] = ([], [])
    prompts = load_prompts(8)
    for number in range(rounds):
        first = number % 2

        def between(step: int, first: int = first) -> None:
            if step % STEPS_PER_TURN == 0:
                turns[(step // STEPS_PER_TURN + first) % 2]()

        for step, seconds in enumerate(decode_steps(llm, prompts[number % 8], num_tokens, number, between)):
            if step % STEPS_PER_TURN:  # the first one after a switch pays for it
                times[(step // STEPS_PER_TURN + first) % 2].append(seconds)
    return [statistics.median(values) for values in times]


def counting_seconds(switch: Switch, repeats: int = 2000) -> float:
    """What the counting of one decode step takes: every layer's words, one of four with a miss, and the clock."""
    mirror = switch.layers[0].worker.caches.mirror
    grown = torch.zeros_like(mirror)
    grown[:, Words._fields.index("steps")] = 1
    grown[:, Words._fields.index("hits")] = 2
    grown[::4, Words._fields.index("misses")] = 1
    mirror_before, seconds = mirror.clone(), 0.0
    for _ in range(repeats):
        mirror += grown
        started = time.perf_counter()
        switch.publisher.step_begins(0, 1, True)
        switch.publisher.step_ended()
        seconds += time.perf_counter() - started
    mirror.copy_(mirror_before)
    return seconds / repeats


def measure(path: str) -> None:
    """In the child."""
    with job_output(path) as (job, result):
        llm = Engine(**job["engine"]).open()
        switch = Switch(llm)
        switch.ghosts_off()
        compare(llm, 4, job["tokens"], (switch.on, switch.off))  # warm-up
        on, off = compare(llm, job["rounds"], job["tokens"], (switch.on, switch.off))
        same = compare(llm, job["rounds"], job["tokens"], (switch.on, switch.on))
        counting = counting_seconds(switch)
        turns = (switch.ghosts_on, switch.ghosts_off)
        ghosts_on, ghosts_off = compare(llm, job["rounds"], job["tokens"], turns)
        result.update(
            tpot_ms=1000 * on,
            tpot_ms_without=1000 * off,
            share_of_tpot=(on - off) / off,
            noise_share=abs(same[0] - same[1]) / same[1],
            ghosts_us_per_step=1e6 * (ghosts_on - ghosts_off),
            ghosts_share_of_tpot=(ghosts_on - ghosts_off) / ghosts_off,
            counting_us_per_step=1e6 * counting,
            counted_share_of_tpot=counting / off,
        )


def main() -> int:
    """Measure and report; 1 when counting takes more than the limit."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=60)
    arguments.add_argument("--tokens", type=int, default=129)
    options = arguments.parse_args()
    if options.job:
        measure(options.job)
        return 0
    if options.quick:
        options.rounds = 16
    rows = []
    for per_layer in (False, True):
        config = {"cache_fraction": 0.5, "metrics_per_layer": per_layer, "ghost_caches": True}
        engine = Engine(str(TINY_MODEL), True, config, max_num_seqs=1)
        job = engine_job(engine, rounds=options.rounds, tokens=options.tokens)
        rows.append({"metrics_per_layer": per_layer, **run_in_process(__file__, job)})
        if not options.json:
            print(rows[-1])
    finish(
        "observe_cost",
        {"limit": LIMIT, "counted_share_of_tpot": rows[0]["counted_share_of_tpot"], "rows": rows},
        options,
    )
    return int(rows[0]["counted_share_of_tpot"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
