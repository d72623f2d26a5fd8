"""Recording rules and alerts of Prometheus. Ratios are recorded here, so that nobody has to write them."""

from dataclasses import dataclass, field
from typing import Any

from monitoring.series import SERVER, is_declared, series_in

P = "vllm_expert_prefetch_"
R = "expert_prefetch:"
RUNBOOK = "docs/operations.md"
STALL_LIMIT = 0.2


@dataclass(frozen=True)
class Recording:
    """One recorded series."""

    record: str
    expression: str

    def as_rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        return {"record": self.record, "expr": self.expression}


@dataclass(frozen=True)
class Alert:
    """One alert. Its runbook is the section of its name in docs/operations.md."""

    name: str
    expression: str
    minutes: int
    summary: str
    description: str
    severity: str = "warning"
    labels: dict[str, str] = field(default_factory=dict)

    def as_rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": f"{self.minutes}m",
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOK}#{self.name.lower()}",
            },
        }


def _rate(series: str) -> str:
    return f"sum by ({SERVER}) (rate({P}{series}[5m]))"


def _share(part: str, whole: str) -> str:
    """Nothing, and not a division by zero, while the server is idle."""
    return f"{part} / ({whole} > 0)"


def _tpot(quantile: float) -> str:
    return f"histogram_quantile({quantile}, sum by ({SERVER}, le) (rate({P}tpot_seconds_bucket[5m])))"


RECORDINGS = (
    Recording(f"{R}lookups:rate5m", _rate("lookups_total")),
    Recording(
        f"{R}hit_ratio:rate5m",
        _share(_rate('lookups_total{outcome="hit"}'), _rate('lookups_total{outcome!="speculated"}')),
    ),
    Recording(f"{R}planned_hit_ratio", f"avg by ({SERVER}) ({P}planned_hit_ratio)"),
    Recording(f"{R}stall_ratio:rate5m", _share(_rate("stall_seconds_total"), _rate("step_seconds_sum"))),
    Recording(f"{R}tpot_seconds:mean5m", _share(_rate("tpot_seconds_sum"), _rate("tpot_seconds_count"))),
    Recording(f"{R}tpot_seconds:p50_5m", _tpot(0.5)),
    Recording(f"{R}tpot_seconds:p90_5m", _tpot(0.9)),
    Recording(f"{R}tpot_seconds:p99_5m", _tpot(0.99)),
    Recording(f"{R}transfer_bytes:rate5m", _rate("transfer_bytes_total")),
    Recording(
        f"{R}link_bytes_per_second:rate5m",  # the times of prefetches are not in transfer_seconds_total
        _share(_rate('transfer_bytes_total{kind!="prefetch"}'), _rate("transfer_seconds_total")),
    ),
    Recording(f"{R}link_bytes_per_second:at_start", f"avg by ({SERVER}) ({P}link_bytes_per_second)"),
    Recording(f"{R}link_busy_ratio:rate5m", f"avg by ({SERVER}) (rate({P}transfer_seconds_total[5m]))"),
    Recording(f"{R}slot_ratio", f"sum by ({SERVER}) ({P}slots) / sum by ({SERVER}) ({P}experts)"),
    Recording(
        f"{R}prefetch_precision:rate5m",
        _share(_rate('predictions_total{outcome="used"}'), _rate("predictions_total")),
    ),
    Recording(
        f"{R}prefetch_recall:rate5m",
        _share(_rate('recall_found_total{among="top_k"}'), _rate("recall_routed_total")),
    ),
    Recording(f"{R}missing_gate_mass:rate5m", _share(_rate("missing_gate_mass_total"), _rate("scored_tokens_total"))),
)

_LINK_IS_SLOW = f"{R}link_bytes_per_second:rate5m < 0.5 * {R}link_bytes_per_second:at_start"
_HITS_ARE_FEW = f"{R}hit_ratio:rate5m < 0.95 * {R}planned_hit_ratio"
_STALLS = f"{R}stall_ratio:rate5m > {STALL_LIMIT}"
_PREFETCH_IS_OFF = f"max by ({SERVER}) ({P}lookahead_enabled) == 0"
_STALLS_SUMMARY = "{{ $labels.instance }} waits for experts during {{ $value | humanizePercentage }} of its steps' time"

ALERTS = (
    Alert(
        "ExpertPrefetchNotActive",
        f'up{{job="vllm-expert-prefetch"}} == 1 unless on (job, instance) {P}info',
        15,
        "{{ $labels.instance }} serves without the plugin",
        "The server answers, and shows no metric of the expert cache: it was started without --plugin expert_prefetch, "
        "the plugin is not installed beside this vLLM, or VLLM_PLUGINS leaves it out.",
    ),
    Alert(
        "ExpertPrefetchNothingOffloaded",
        f"{R}slot_ratio >= 1",
        5,
        "{{ $labels.instance }} offloads nothing",
        "Every expert has a slot: the plugin saves no accelerator memory, and the model is served as plain vLLM does. "
        "Give it a smaller cache and the KV cache the rest, or serve without it.",
        severity="info",
    ),
    Alert(
        "ExpertPrefetchHitRatioLow",
        f"{_HITS_ARE_FEW} and {R}lookups:rate5m > 1",
        10,
        "{{ $labels.instance }} finds only {{ $value | humanizePercentage }} of the experts in the cache",
        "The hit rate is below the one the cache was sized for (planned_hit_rate, or else the share of experts that "
        "have a slot): the traffic has changed, or the eviction policy does not suit it.",
    ),
    Alert(
        "ExpertPrefetchStallsHigh",
        f"{_STALLS} and {_LINK_IS_SLOW}",
        10,
        f"{_STALLS_SUMMARY}: the link is slow",
        "Copies from host memory run at less than half of the speed measured when the server started.",
        labels={"cause": "link_slow"},
    ),
    Alert(
        "ExpertPrefetchStallsHigh",
        f"{_STALLS} unless ({_LINK_IS_SLOW}) unless ({R}hit_ratio:rate5m >= 0.95 * {R}planned_hit_ratio and "
        f"{_PREFETCH_IS_OFF})",
        10,
        f"{_STALLS_SUMMARY}: the cache is too small",
        "The link is as fast as ever. Either the hit rate is below the planned one, or prefetching is on and there "
        "still are too many misses.",
        labels={"cause": "cache_too_small"},
    ),
    Alert(
        "ExpertPrefetchStallsHigh",
        f"({_STALLS} and {R}hit_ratio:rate5m >= 0.95 * {R}planned_hit_ratio and {_PREFETCH_IS_OFF}) "
        f"unless ({_LINK_IS_SLOW})",
        10,
        f"{_STALLS_SUMMARY}: prefetching is off",
        "Cache and link do what was planned, and nothing is copied ahead of its use.",
        labels={"cause": "prefetch_off"},
    ),
    Alert(
        "ExpertPrefetchPrecisionLow",
        f'{R}prefetch_precision:rate5m < 0.3 and max by ({SERVER}) ({P}info{{prefetch=~"on:.*"}}) '
        f"and {_rate('predictions_total')} > 0",
        10,
        "{{ $labels.instance }} uses only {{ $value | humanizePercentage }} of its prefetches",
        "Prefetching is forced on, and most prefetches, cancelled ones included, are for nothing: they take bandwidth "
        "from demand copies and slots from other experts.",
    ),
    Alert(
        "ExpertPrefetchLinkSlow",
        f"{_LINK_IS_SLOW} and {R}stall_ratio:rate5m > 0.05",
        10,
        "{{ $labels.instance }} copies experts at {{ $value | humanize }}B/s, less than half of its speed at start",
        "Something shares the link or the memory: another process, a GPU that fell back to fewer or slower PCIe lanes, "
        "or memory of another NUMA node.",
    ),
)


def rule_groups() -> list[dict[str, Any]]:
    """The groups of the rule file; rules whose series do not exist in this version are left out."""
    records = [rule.as_rule() for rule in RECORDINGS if is_declared(rule.expression)]
    known = {rule["record"] for rule in records}
    alerts = [alert.as_rule() for alert in ALERTS if _can_fire(alert, known)]
    return [
        {"name": "expert-prefetch-records", "interval": "15s", "rules": records},
        {"name": "expert-prefetch-alerts", "rules": alerts},
    ]


def _can_fire(alert: Alert, recorded: set[str]) -> bool:
    return is_declared(alert.expression) and all(
        name in recorded for name in series_in(alert.expression) if name.startswith(R)
    )
