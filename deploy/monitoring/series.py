"""Names of series inside PromQL: which the plugin declares, and which an expression reads."""

import re

from vllm_expert_prefetch.metrics.definitions import METRICS, PREFIX, Kind

SERVER = "job, instance, model_name, engine"
"""The labels that name one server; its ranks are summed."""

_SUFFIXES = {Kind.HISTOGRAM: ("_bucket", "_count", "_sum")}
DECLARED = frozenset(
    f"{metric.full_name}{suffix}" for metric in METRICS for suffix in _SUFFIXES.get(metric.kind, ("",))
)


def series_in(expression: str) -> set[str]:
    """The series of the plugin and the recorded ones that a PromQL expression reads."""
    return set(re.findall(rf"{PREFIX}[a-z_]+|expert_prefetch:[a-z0-9_:]+", expression))


def is_declared(expression: str) -> bool:
    """Whether the plugin has every series of its own that the expression reads.

    What reads a series that comes with a later version is left out until then.
    """
    return all(name in DECLARED for name in series_in(expression) if name.startswith(PREFIX))
