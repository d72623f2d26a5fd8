"""What planning one layer's step costs; `pytest --benchmark-only` prints it. Nothing is asserted about time."""

import itertools
import random

import pytest

from vllm_expert_prefetch.residency import ExpertCache, Planner, create_policy


@pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=False)
@pytest.mark.parametrize(
    ("num_routed", "num_experts", "num_slots"), [(8, 128, 64), (64, 512, 256)], ids=["8-of-128", "64-of-512"]
)
def test_plan_and_complete(benchmark, num_routed, num_experts, num_slots):
    rng = random.Random(0)
    steps = itertools.cycle([rng.sample(range(num_experts), num_routed) for _ in range(256)])
    planner = Planner(ExpertCache(num_experts, num_slots, create_policy("lru")), top_k=8, max_token_waves=8)

    def step():
        plan = planner.plan(next(steps))
        planner.complete(plan)
        return plan

    plan = benchmark(step)
    assert plan.num_hits + plan.num_misses == num_routed
