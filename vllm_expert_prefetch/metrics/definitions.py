"""The metrics. `docs/metrics.md` shows the same table."""

import math
from dataclasses import dataclass
from enum import Enum

from vllm_expert_prefetch.config import GHOST_SCALES, MOST_LOOKAHEAD_LAYERS

PREFIX = "vllm_expert_prefetch_"
COMMON_LABELS = ("model_name", "engine", "rank")


class Kind(Enum):
    """Prometheus metric types in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True)
class Metric:
    """One metric. `label` is its own label, beside COMMON_LABELS, with every value it takes.

    `buckets`: the upper bounds of a histogram, without +Inf. `per_layer`: one set of series for every MoE layer, with
    the label LAYER_LABEL, and only when the configuration asks for it.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    per_layer: bool = False

    @property
    def full_name(self) -> str:
        """As shown on /metrics (the suffix _info is added by Prometheus' own conventions)."""
        return f"{PREFIX}{self.name}"

    @property
    def stems(self) -> list[str]:
        """One key per set of own labels."""
        return [f"{self.name}/{value}" for value in self.values] if self.label else [self.name]

    @property
    def series(self) -> list[str]:
        """One key per number that a rank keeps (per layer for a `per_layer` metric).

        A histogram keeps the observations of each bucket, those beyond the last bound, and their sum.
        """
        if self.kind is not Kind.HISTOGRAM:
            return self.stems
        return [key for stem in self.stems for key in histogram_series(stem, self.buckets)]


def histogram_series(stem: str, buckets: tuple[float, ...]) -> list[str]:
    """The keys of one histogram: its buckets from the lowest to +Inf, then the sum."""
    return [*(f"{stem}/le={bound:g}" for bound in (*buckets, math.inf)), f"{stem}/sum"]


OUTCOMES = ("hit", "late", "miss", "speculated")
PREDICTED = ("used", "unused", "cancelled")
AMONG = ("top_k", "fetched")
DISTANCES = tuple(str(distance) for distance in range(1, MOST_LOOKAHEAD_LAYERS + 1))
PHASES = ("prefill", "decode", "mixed")
STEP_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Seconds. Contains the lower bounds that vLLM uses for its inter-token latency, so that quantiles compare."""

METRICS = (
    Metric(
        "lookups_total",
        Kind.COUNTER,
        "lookups",
        "Distinct experts needed, per step of a layer, by where they were found: in a slot, on their way, absent; or "
        "speculated: executed because they were predicted, wherever they were found. What those took is in "
        "transfer_bytes_total and stall_seconds_total.",
        "outcome",
        OUTCOMES,
    ),
    Metric(
        "ghost_lookups_total",
        Kind.COUNTER,
        "lookups",
        "With `ghost_caches`: lookups of what the router chose, in a cache of so many times the slots that holds no "
        "experts and fetches none ahead.",
        "scale",
        GHOST_SCALES,
    ),
    Metric(
        "ghost_hits_total",
        Kind.COUNTER,
        "lookups",
        "Of these, those that would have found their expert in a slot.",
        "scale",
        GHOST_SCALES,
    ),
    Metric(
        "transfer_bytes_total",
        Kind.COUNTER,
        "bytes",
        "Bytes of expert records copied from the host store: into slots because a step needed them, into overflow rows "
        "for the same reason, or ahead.",
        "kind",
        ("demand", "overflow", "prefetch"),
    ),
    Metric(
        "transfer_seconds_total",
        Kind.COUNTER,
        "seconds",
        "Time of the copies that steps waited for, prefetches not included; 0 on a GPU, where nothing is timed.",
    ),
    Metric(
        "stall_seconds_total",
        Kind.COUNTER,
        "seconds",
        "Time that steps waited for experts to arrive, all MoE layers together; 0 on a GPU.",
    ),
    Metric(
        "saved_seconds_total",
        Kind.COUNTER,
        "seconds",
        "Time saved by looking ahead, estimated: what the copies of used predictions take over the link, at its speed "
        "at start, less what steps waited for late ones. On a GPU an upper bound: late ones count in full.",
    ),
    Metric("evictions_total", Kind.COUNTER, "evictions", "Experts that gave their slot to another."),
    Metric(
        "moe_steps_total",
        Kind.COUNTER,
        "steps",
        "Steps of MoE layers that needed an expert, summed over layers: narrow ones, which need no more experts than "
        "there are slots, and wide ones.",
        "width",
        ("narrow", "wide"),
    ),
    Metric(
        "steps_total",
        Kind.COUNTER,
        "steps",
        "Engine steps, by what they computed: prompts, next tokens, or both.",
        "phase",
        PHASES,
    ),
    Metric(
        "step_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time from the end of the step before to the end of this one; from its start when the engine was idle before.",
        "phase",
        PHASES,
        STEP_BUCKETS,
    ),
    Metric(
        "tpot_seconds",
        Kind.HISTOGRAM,
        "seconds",
        "Time per output token: each step's time, once for every sequence that it gave a token after its first. A step "
        "of speculative decoding may give several.",
        buckets=STEP_BUCKETS,
    ),
    Metric(
        "layer_lookups_total",
        Kind.COUNTER,
        "lookups",
        "The lookups of each MoE layer; only with `metrics_per_layer`.",
        "outcome",
        OUTCOMES,
        per_layer=True,
    ),
    Metric(
        "layer_stall_seconds_total",
        Kind.COUNTER,
        "seconds",
        "Time that steps waited for the experts of each MoE layer; only with `metrics_per_layer`.",
        per_layer=True,
    ),
    Metric(
        "layer_predictions_total",
        Kind.COUNTER,
        "predictions",
        "The prefetched experts of each MoE layer; only with `metrics_per_layer`.",
        "outcome",
        PREDICTED,
        per_layer=True,
    ),
    Metric(
        "layer_recall_routed_total",
        Kind.COUNTER,
        "experts",
        "`recall_routed_total` of each MoE layer; on the CPU platform, with `metrics_per_layer`.",
        per_layer=True,
    ),
    Metric(
        "layer_recall_found_total",
        Kind.COUNTER,
        "experts",
        "`recall_found_total` of each MoE layer; on the CPU platform, with `metrics_per_layer`.",
        "among",
        AMONG,
        per_layer=True,
    ),
    Metric(
        "layer_scored_tokens_total",
        Kind.COUNTER,
        "tokens",
        "`scored_tokens_total` of each MoE layer; on the CPU platform, with `metrics_per_layer`.",
        per_layer=True,
    ),
    Metric(
        "layer_missing_gate_mass_total",
        Kind.COUNTER,
        "ratio",
        "`missing_gate_mass_total` of each MoE layer; on the CPU platform, with `metrics_per_layer`.",
        per_layer=True,
    ),
    Metric(
        "predictions_total",
        Kind.COUNTER,
        "predictions",
        "Prefetched experts, by what became of them: needed before they were evicted, not needed, or cancelled before "
        "the copy had started.",
        "outcome",
        PREDICTED,
    ),
    Metric(
        "displaced_lookups_total",
        Kind.COUNTER,
        "lookups",
        "Of the lookups, misses on an expert that a prefetch had evicted since it was needed last.",
    ),
    Metric(
        "recall_routed_total",
        Kind.COUNTER,
        "experts",
        "Experts that the router chose, in steps that were compared with their prediction: recall's denominator.",
    ),
    Metric(
        "recall_found_total",
        Kind.COUNTER,
        "experts",
        "Of these, those among the first top-k guesses, and among all that were fetched (top-k and `over_fetch`).",
        "among",
        AMONG,
    ),
    Metric("scored_tokens_total", Kind.COUNTER, "tokens", "Tokens of each layer that were compared with a prediction."),
    Metric(
        "missing_gate_mass_total",
        Kind.COUNTER,
        "ratio",
        "Share of each of these tokens' gate weights that the first top-k guesses missed, summed.",
    ),
    Metric("lookahead_enabled", Kind.GAUGE, "workers", "1 where the worker looks ahead, 0 where it does not."),
    Metric(
        "lookahead_open_layers",
        Kind.GAUGE,
        "layers",
        "MoE layers whose experts are fetched by guesses from so many layers before; the others do without, as it does "
        "not pay.",
        "distance",
        DISTANCES,
    ),
    Metric("moe_layers", Kind.GAUGE, "layers", "MoE layers served from a slot cache."),
    Metric("experts", Kind.GAUGE, "experts", "Routed experts of all MoE layers."),
    Metric("slots", Kind.GAUGE, "slots", "Expert slots of all MoE layers."),
    Metric("resident_slots", Kind.GAUGE, "slots", "Slots that hold an expert whose record has landed."),
    Metric("host_store_bytes", Kind.GAUGE, "bytes", "Host memory that holds the routed experts, shared or not."),
    Metric("cache_bytes", Kind.GAUGE, "bytes", "Accelerator memory of all slots."),
    Metric("overflow_bytes", Kind.GAUGE, "bytes", "Accelerator memory of the overflow rows, which all layers share."),
    Metric("expert_record_bytes", Kind.GAUGE, "bytes", "Bytes copied for one expert, mean over layers."),
    Metric(
        "link_bytes_per_second",
        Kind.GAUGE,
        "bytes/second",
        "Bandwidth from the host store to the slots, measured when the server started, one expert at a time.",
    ),
    Metric(
        "planned_hit_ratio",
        Kind.GAUGE,
        "ratio",
        "Hit rate that the cache was sized for: `planned_hit_rate`, or the share of experts that have a slot.",
    ),
    Metric("info", Kind.INFO, "", "Mode, policy, prefetch, link, kernel, platform, versions and more, as labels."),
)

INFO_LABELS = (
    "execution",
    "policy",
    "prefetch",
    "lookahead_layers",
    "areas",
    "link",
    "pinned",
    "store",
    "kernel",
    "quant_method",
    "self_check",
    "platform",
    "version",
    "vllm_version",
)
LAYER_LABEL = "layer"

_NUMERIC = tuple(metric for metric in METRICS if metric.kind is not Kind.INFO)
SERIES = tuple(key for metric in _NUMERIC if not metric.per_layer for key in metric.series)
INDEX = {key: index for index, key in enumerate(SERIES)}
LAYER_SERIES = tuple(key for metric in _NUMERIC if metric.per_layer for key in metric.series)
LAYER_INDEX = {key: index for index, key in enumerate(LAYER_SERIES)}
