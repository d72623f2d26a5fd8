"""The metrics. `docs/metrics.md` shows the same table."""

from dataclasses import dataclass
from enum import Enum

PREFIX = "vllm_expert_prefetch_"
COMMON_LABELS = ("model_name", "engine", "rank")


class Kind(Enum):
    """Prometheus metric types in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    INFO = "info"


@dataclass(frozen=True)
class Metric:
    """One metric. `label` is its own label, beside COMMON_LABELS, with every value it takes."""

    name: str
    kind: Kind
    unit: str
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """As shown on /metrics (the suffix _info is added by Prometheus' own conventions)."""
        return f"{PREFIX}{self.name}"

    @property
    def series(self) -> list[str]:
        """One key per time series of a rank."""
        return [f"{self.name}/{value}" for value in self.values] if self.label else [self.name]


METRICS = (
    Metric(
        "lookups_total",
        Kind.COUNTER,
        "lookups",
        "Distinct experts needed, per wave of a layer, by where they were found.",
        "outcome",
        ("hit", "late", "miss", "speculated"),
    ),
    Metric(
        "transfer_bytes_total",
        Kind.COUNTER,
        "bytes",
        "Bytes of expert records copied from the host store, into slots or the stream buffer.",
        "kind",
        ("demand", "prefetch", "stream"),
    ),
    Metric(
        "transfer_seconds_total",
        Kind.COUNTER,
        "seconds",
        "Time spent issuing copies; on the CPU platform, the time until they have landed.",
    ),
    Metric("evictions_total", Kind.COUNTER, "evictions", "Experts that gave their slot to another."),
    Metric(
        "waves_total",
        Kind.COUNTER,
        "waves",
        "Kernel calls of MoE layers, by how the step was split.",
        "split",
        ("none", "tokens", "experts", "stream"),
    ),
    Metric("moe_layers", Kind.GAUGE, "layers", "MoE layers served from a slot cache."),
    Metric("experts", Kind.GAUGE, "experts", "Routed experts of all MoE layers."),
    Metric("slots", Kind.GAUGE, "slots", "Expert slots of all MoE layers."),
    Metric("host_store_bytes", Kind.GAUGE, "bytes", "Host memory that holds the routed experts."),
    Metric("cache_bytes", Kind.GAUGE, "bytes", "Accelerator memory of all slots."),
    Metric("stream_buffer_bytes", Kind.GAUGE, "bytes", "Accelerator memory of the stream buffer, 0 without one."),
    Metric("expert_record_bytes", Kind.GAUGE, "bytes", "Bytes copied for one expert, mean over layers."),
    Metric("info", Kind.INFO, "", "Mode, policy, prefetch, staging engine, link and versions, as labels."),
)

INFO_LABELS = ("execution", "policy", "prefetch", "staging", "link", "pinned", "version", "vllm_version")

NUMERIC_METRICS = tuple(metric for metric in METRICS if metric.kind is not Kind.INFO)
SERIES = tuple(key for metric in NUMERIC_METRICS for key in metric.series)
INDEX = {key: index for index, key in enumerate(SERIES)}
