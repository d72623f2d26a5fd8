"""Which expert is where: plain integers, standard library only.

`ExpertCache` is the state machine of one layer, an `EvictionPolicy` picks victims, and the `Planner` turns the
routed ids of one step into one `Plan`. This package is the specification of every faster implementation.
"""

from vllm_expert_prefetch.residency.cache import ExpertCache
from vllm_expert_prefetch.residency.planner import Planner
from vllm_expert_prefetch.residency.policies import POLICIES, EvictionPolicy, create_policy
from vllm_expert_prefetch.residency.types import (
    ABSENT,
    IN_FLIGHT,
    RESIDENT,
    Load,
    Plan,
    PrefetchPlan,
    Residency,
    Split,
    Wave,
)

__all__ = [
    "ABSENT",
    "IN_FLIGHT",
    "POLICIES",
    "RESIDENT",
    "EvictionPolicy",
    "ExpertCache",
    "Load",
    "Plan",
    "Planner",
    "PrefetchPlan",
    "Residency",
    "Split",
    "Wave",
    "create_policy",
]
