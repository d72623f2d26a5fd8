"""Which expert is where: plain integers, standard library only.

`ExpertCache` turns the routed ids of one step, or a guess, into a plan; a `Policy` says who leaves. This package is the
specification of the C++ and CUDA planner (csrc/residency.h) and what planning and replays compute with.
"""

from vllm_expert_prefetch.residency.cache import ExpertCache
from vllm_expert_prefetch.residency.policies import HALF_LIFE, POLICIES, Policy, Ranking
from vllm_expert_prefetch.residency.types import (
    ABSENT,
    IN_FLIGHT,
    RESIDENT,
    Load,
    Plan,
    PrefetchPlan,
    Residency,
)

__all__ = [
    "ABSENT",
    "HALF_LIFE",
    "IN_FLIGHT",
    "POLICIES",
    "RESIDENT",
    "ExpertCache",
    "Load",
    "Plan",
    "Policy",
    "PrefetchPlan",
    "Ranking",
    "Residency",
]
