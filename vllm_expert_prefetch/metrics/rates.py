"""What happened between two scrapes of a server's /metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_expert_prefetch.config import GHOST_SCALES
from vllm_expert_prefetch.metrics.definitions import DISTANCES, LAYER_LABEL, PREFIX

Series = tuple[str, frozenset[tuple[str, str]]]


class NoMetrics(RuntimeError):
    """The page holds none of the plugin's metrics."""


@dataclass(frozen=True)
class Scrape:
    """One scrape: every sample of the plugin, and when it was taken (seconds of a clock that never runs backwards)."""

    seconds: float
    samples: Mapping[Series, float]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series called `name` (without the prefix) that have these labels."""
        wanted = labels.items()
        return sum(
            value
            for (own, pairs), value in self.samples.items()
            if own == f"{PREFIX}{name}" and wanted <= dict(pairs).items()
        )

    def labels(self, name: str, label: str) -> list[str]:
        """The values of a label, numbers in the order of numbers."""
        found = {dict(pairs)[label] for (own, pairs) in self.samples if own == f"{PREFIX}{name}"}
        return sorted(found, key=lambda value: (not value.isdigit(), int(value) if value.isdigit() else 0, value))

    def info(self) -> list[dict[str, str]]:
        """The settings of each rank."""
        return [dict(pairs) for (own, pairs) in self.samples if own == f"{PREFIX}info"]


def parse_scrape(text: str, seconds: float) -> Scrape:
    """Read a page of metrics. Raises NoMetrics when the plugin shows nothing there."""
    samples: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(PREFIX):
            for sample in family.samples:
                samples[sample.name, frozenset(sample.labels.items())] = sample.value
    if not samples:
        raise NoMetrics("this server shows no metric of the plugin: was it started with --plugin expert_prefetch?")
    return Scrape(seconds, samples)


@dataclass(frozen=True)
class Between:
    """Two scrapes of one server. A total that fell belongs to a server that started anew: it counts from zero."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Time between the two."""
        return self.after.seconds - self.before.seconds

    def gained(self, name: str, **labels: str) -> float:
        """How much a counter grew."""
        now, then = self.after.total(name, **labels), self.before.total(name, **labels)
        return now - then if now >= then else now

    def rates(self, name: str, label: str) -> dict[str, float]:
        """Growth per second by the values of a label."""
        return {value: self.gained(name, **{label: value}) / self.seconds for value in self.after.labels(name, label)}

    def share(self, part: float, whole: float) -> float | None:
        """A ratio, or None when nothing happened."""
        return part / whole if whole else None

    def mean(self, gauge: str) -> float | None:
        """A gauge, mean of the ranks."""
        return self.share(self.after.total(gauge), len(self.after.info()))


def summarise(before: Scrape, after: Scrape) -> dict[str, Any]:
    """Rates per second between two scrapes and the gauges of the later one, ranks summed.

    Ratios, and times per token, are None when nothing happened in between.
    """
    both = Between(before, after)
    gained, share = both.gained, both.share
    layers = after.labels("layer_lookups_total", LAYER_LABEL)
    outcomes = after.labels("lookups_total", "outcome")
    routed = gained("lookups_total") - gained("lookups_total", outcome="speculated")
    return {
        "elapsed_seconds": both.seconds,
        "servers": after.info(),
        "hit_ratio": share(gained("lookups_total", outcome="hit"), routed),
        "ghost_hit_ratios": {
            scale: share(gained("ghost_hits_total", scale=scale), gained("ghost_lookups_total", scale=scale))
            for scale in GHOST_SCALES
        },
        "planned_hit_ratio": both.mean("planned_hit_ratio"),
        "stall_ratio": share(gained("stall_seconds_total"), gained("step_seconds_sum")),
        "saved_ratio": share(gained("saved_seconds_total"), gained("step_seconds_sum")),
        "tpot_seconds": share(gained("tpot_seconds_sum"), gained("tpot_seconds_count")),
        "prefetch_precision": share(gained("predictions_total", outcome="used"), gained("predictions_total")),
        "prefetch_recall": share(gained("recall_found_total", among="top_k"), gained("recall_routed_total")),
        "open_layers": {distance: after.total("lookahead_open_layers", distance=distance) for distance in DISTANCES},
        "lookups_per_second": both.rates("lookups_total", "outcome"),
        "transfer_bytes_per_second": both.rates("transfer_bytes_total", "kind"),
        # The times of prefetches are not in transfer_seconds_total.
        "link_bytes_per_second": share(
            gained("transfer_bytes_total") - gained("transfer_bytes_total", kind="prefetch"),
            gained("transfer_seconds_total"),
        ),
        "link_bytes_per_second_at_start": both.mean("link_bytes_per_second"),
        "evictions_per_second": gained("evictions_total") / both.seconds,
        "moe_steps_per_second": both.rates("moe_steps_total", "width"),
        "steps_per_second": both.rates("steps_total", "phase"),
        **{
            name: after.total(name)
            for name in ("slots", "resident_slots", "experts", "cache_bytes", "host_store_bytes")
        },
        "layers": {
            layer: {outcome: gained("layer_lookups_total", layer=layer, outcome=outcome) for outcome in outcomes}
            for layer in layers
        },
    }
