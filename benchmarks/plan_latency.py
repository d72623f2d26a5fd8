"""What does planning one MoE layer's step cost on the host? The C++ planner against its Python specification.

Both are called from Python and do the whole of a step: look up, choose victims, keep the books. The routed experts are
drawn at random, lru, half of the experts have a slot: the misses that are part of it are counted beside the times.
Planners take turns, chunk by chunk; a time is the median over chunks of the mean of a chunk.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import finish, parser

from vllm_expert_prefetch.experts import NativePlanner
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import ExpertCache, Planner, create_policy

SHAPES = ((8, 128), (64, 512))
STEPS_PER_CHUNK = 200


def python_chunk(num_routed: int, num_experts: int, steps: list[list[int]]) -> Callable[[], None]:
    """Plans every step once, in Python."""
    planner = Planner(ExpertCache(num_experts, num_experts // 2, create_policy("lru")), 8, 8)

    def chunk() -> None:
        for ids in steps:
            planner.complete(planner.plan(ids))

    return chunk


def native_chunk(num_routed: int, num_experts: int, steps: list[list[int]]) -> tuple[Callable[[], None], NativePlanner]:
    """Plans every step once, in C++, called as the serving layer's tensors are."""
    planner = NativePlanner(host_library(), num_experts, num_experts // 2, 8, "lru", 8, False)
    tensors = [torch.tensor(ids, dtype=torch.int32) for ids in steps]
    slot_ids, words = torch.empty_like(tensors[0]), torch.zeros(num_experts // 2, dtype=torch.int32)
    plan, state = planner.library.planner_plan, planner.state

    def chunk() -> None:
        for ids in tensors:
            plan(state, words, ids, num_routed, slot_ids)

    return chunk, planner


def measure(num_routed: int, num_experts: int, num_chunks: int) -> dict[str, Any]:
    """Microseconds per step of both planners."""
    rng = random.Random(0)
    steps = [rng.sample(range(num_experts), num_routed) for _ in range(STEPS_PER_CHUNK)]
    native, planner = native_chunk(num_routed, num_experts, steps)
    variants = {"python": python_chunk(num_routed, num_experts, steps), "host": native}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_chunks + 3):
        for name, chunk in variants.items():
            started = time.perf_counter()
            chunk()
            if number >= 3:  # warm-up
                times[name].append(1e6 * (time.perf_counter() - started) / STEPS_PER_CHUNK)
    num_steps, _, _, misses = planner.state[10:14].tolist()
    shape = f"{num_routed}_of_{num_experts}"
    found = {f"{name}_us_{shape}": round(statistics.median(values), 3) for name, values in times.items()}
    return {**found, f"misses_per_step_{shape}": round(misses / num_steps, 2)}


def main() -> int:
    """Measure and report."""
    options = parser(__doc__).parse_args()
    if host_library() is None:
        print(f"the native planner is not there: {why_not_host()}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for num_routed, num_experts in SHAPES:
        result |= measure(num_routed, num_experts, 20 if options.quick else 400)
    if not options.json:
        for key, value in result.items():
            print(f"{key:26} {value}")
    finish("plan_latency", result, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
