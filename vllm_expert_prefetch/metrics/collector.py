"""The reader's side: the workers' numbers as Prometheus metrics, on vLLM's own /metrics."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_expert_prefetch.locks import is_locked
from vllm_expert_prefetch.metrics.counters import SUFFIX, Snapshot, read_counters
from vllm_expert_prefetch.metrics.definitions import (
    COMMON_LABELS,
    INFO_LABELS,
    LAYER_LABEL,
    METRICS,
    Kind,
    histogram_series,
)
from vllm_expert_prefetch.metrics.definitions import Metric as Definition

_FAMILIES = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
    Kind.INFO: InfoMetricFamily,
}


class ExpertPrefetchCollector(Collector):
    """Reads the counter files of `directory` whose names match `pattern` at each scrape. Dead workers show nothing."""

    def __init__(self, directory: Path, pattern: str = f"*{SUFFIX}") -> None:
        self.directory = directory
        self.pattern = pattern

    def describe(self) -> Iterable[Metric]:
        """The families without samples: registering must not read files."""
        return [_family(definition, []) for definition in METRICS]

    def collect(self) -> Iterable[Metric]:
        """One family per metric, one sample per series and rank. Per-layer ones that nobody asked for are left out."""
        ranks = self._ranks()
        has_layers = any(rank.layers for rank in ranks)
        shown = [definition for definition in METRICS if has_layers or not definition.per_layer] if ranks else []
        return [_family(definition, ranks) for definition in shown]

    def _ranks(self) -> list[Snapshot]:
        newest: dict[tuple[str, ...], Snapshot] = {}
        for path in sorted(self.directory.glob(self.pattern), key=lambda path: path.name):
            try:
                if is_locked(path):
                    snapshot = read_counters(path)
                    newest[tuple(snapshot.labels[name] for name in COMMON_LABELS)] = snapshot
            except FileNotFoundError:  # the worker ended between the listing and the read
                continue
        return list(newest.values())


def register_collector(registry: CollectorRegistry, directory: Path) -> None:
    """Show this server's workers in `registry`; a second call for the same registry does nothing."""
    if not getattr(registry, "_expert_prefetch_registered", False):
        registry.register(ExpertPrefetchCollector(directory))
        registry._expert_prefetch_registered = True  # type: ignore[attr-defined]


def extend_multiprocess_collector(directory: Path) -> None:
    """Show this server's workers wherever prometheus-client's multiprocess mode is read: /metrics then comes from a
    registry that is made for each scrape, which nothing can be registered in. A second call does nothing.
    """
    if hasattr(MultiProcessCollector, "_expert_prefetch_extended"):
        return
    collect = MultiProcessCollector.collect
    ours = ExpertPrefetchCollector(directory)

    def collect_with_ours(self: MultiProcessCollector) -> Iterable[Metric]:
        return [*collect(self), *ours.collect()]

    MultiProcessCollector.collect = collect_with_ours  # type: ignore[method-assign]
    MultiProcessCollector._expert_prefetch_extended = True  # type: ignore[attr-defined]


def _family(definition: Definition, ranks: list[Snapshot]) -> Metric:
    name = definition.full_name.removesuffix("_info") if definition.kind is Kind.INFO else definition.full_name
    own = [LAYER_LABEL] * definition.per_layer + [definition.label] * bool(definition.label)
    family = _FAMILIES[definition.kind](name, definition.help, labels=[*COMMON_LABELS, *own])
    for snapshot in ranks:
        common = [snapshot.labels[label] for label in COMMON_LABELS]
        if definition.kind is Kind.INFO:
            family.add_metric(common, {key: snapshot.info[key] for key in INFO_LABELS})
            continue
        for labels, stem, layer in _sets(definition, snapshot):
            _add_sample(family, definition, [*common, *labels], stem, layer, snapshot)
    return family


def _sets(definition: Definition, snapshot: Snapshot) -> Iterator[tuple[list[str], str, int | None]]:
    """Own label values, key and layer of everything that one rank shows under one name."""
    layers = list(enumerate(snapshot.layers)) if definition.per_layer else [(None, "")]
    for number, layer in layers:
        for stem in definition.stems:
            own = [stem.split("/")[1]] if definition.label else []
            yield [layer] * definition.per_layer + own, stem, number


def _add_sample(
    family: Metric, definition: Definition, labels: list[str], stem: str, layer: int | None, snapshot: Snapshot
) -> None:
    if definition.kind is not Kind.HISTOGRAM:
        family.add_metric(labels, snapshot.value(stem, layer))  # type: ignore[attr-defined]
        return
    *counts, total = [snapshot.value(key) for key in histogram_series(stem, definition.buckets)]
    bounds = [*map(floatToGoString, definition.buckets), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)  # type: ignore[attr-defined]
