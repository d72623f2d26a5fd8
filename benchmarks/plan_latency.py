"""What does planning one MoE layer's step cost on the host? The C++ planner against its Python specification.

Both are called from Python and do the whole of a step: look up, choose victims, keep the books. The routed experts are
drawn at random, lru, half of the experts have a slot: the misses that are part of it are counted beside the times.
Planners take turns, chunk by chunk; a time is the median over chunks of the mean of a chunk. With `--against FOLDER`
this script and that of another built checkout take turns as well, and the result is the median over turns of each.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import finish, parser

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import POLICIES, ExpertCache

SHAPES = ((8, 128), (64, 512))
STEPS_PER_CHUNK = 200
TURNS = 7


def python_chunk(num_experts: int, steps: list[list[int]]) -> Callable[[], None]:
    """Plans every step once, in Python."""
    cache = ExpertCache(num_experts, num_experts // 2, POLICIES["lru"])

    def chunk() -> None:
        for ids in steps:
            cache.plan(ids)

    return chunk


def native_chunk(num_experts: int, steps: list[list[int]]) -> tuple[Callable[[], None], torch.Tensor]:
    """Plans every step once, in C++, called as the serving layer's tensors are; and the planner's state."""
    library: Any = host_library()
    num_slots = num_experts // 2
    state = torch.zeros(library.planner_words(num_experts, num_slots), dtype=torch.int64)
    library.planner_init(state, num_experts, num_slots, 8, list(POLICIES).index("lru"))
    tensors = [torch.tensor(ids, dtype=torch.int32) for ids in steps]
    rows, words = torch.empty_like(tensors[0]), torch.zeros(num_experts, dtype=torch.int32)
    plan, num_routed = library.planner_plan, len(rows)

    def chunk() -> None:
        for ids in tensors:
            plan(state, words, ids, num_routed, rows, None)

    return chunk, state


def measure(num_routed: int, num_experts: int, num_chunks: int) -> dict[str, Any]:
    """Microseconds per step of both planners."""
    rng = random.Random(0)
    steps = [rng.sample(range(num_experts), num_routed) for _ in range(STEPS_PER_CHUNK)]
    native, state = native_chunk(num_experts, steps)
    variants = {"python": python_chunk(num_experts, steps), "host": native}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_chunks + 3):
        for name, chunk in variants.items():
            started = time.perf_counter()
            chunk()
            if number >= 3:  # warm-up
                times[name].append(1e6 * (time.perf_counter() - started) / STEPS_PER_CHUNK)
    words = Words._make(state[: len(Words._fields)].tolist())
    shape = f"{num_routed}_of_{num_experts}"
    found = {f"{name}_us_{shape}": round(statistics.median(values), 3) for name, values in times.items()}
    return {**found, f"misses_per_step_{shape}": round(words.misses / words.steps, 2)}


def measure_here(options: argparse.Namespace) -> dict[str, Any]:
    """All shapes, in this process."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for num_routed, num_experts in SHAPES:
        result |= measure(num_routed, num_experts, 20 if options.quick else 400)
    return result


def measure_in_turns(folder: Path) -> dict[str, Any]:
    """This checkout and `folder`, whose numbers are called `before_...`."""
    found: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for prefix, root in (("", Path(__file__).parents[1]), ("before_", folder)):
            command = [sys.executable, str(root / "benchmarks" / "plan_latency.py"), "--quick", "--json"]
            environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{root}: {done.stderr[-2000:]}")
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(prefix + key, []).append(value)
    return {key: round(statistics.median(values), 3) for key, values in found.items()}


def main() -> int:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--against", metavar="FOLDER", type=Path, help="another checkout, its host library built")
    options = arguments.parse_args()
    if host_library() is None:
        print(f"the native planner is not there: {why_not_host()}", file=sys.stderr)
        return 1
    result = measure_in_turns(options.against.resolve()) if options.against else measure_here(options)
    if not options.json:
        for key, value in result.items():
            print(f"{key:33} {value}")
    finish("plan_latency", result, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
