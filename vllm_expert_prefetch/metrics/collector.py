"""The API server's side: the workers' numbers as Prometheus metrics, on vLLM's own /metrics."""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from vllm_expert_prefetch.metrics.counters import SUFFIX, read_counters
from vllm_expert_prefetch.metrics.definitions import COMMON_LABELS, INFO_LABELS, METRICS, Kind
from vllm_expert_prefetch.metrics.definitions import Metric as Definition
from vllm_expert_prefetch.metrics.runtime_dir import process_is_alive

_FAMILIES = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily}

_Rank = tuple[dict[str, str], dict[str, str], dict[str, float]]


class ExpertPrefetchCollector(Collector):
    """Reads the counter files of every worker in `directory` at each scrape. Dead workers show nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def describe(self) -> Iterable[Metric]:
        """The families without samples: registering must not read files."""
        return [_family(definition, []) for definition in METRICS]

    def collect(self) -> Iterable[Metric]:
        """One family per metric, one sample per series and rank."""
        ranks = self._ranks()
        return [_family(definition, ranks) for definition in METRICS] if ranks else []

    def _ranks(self) -> list[_Rank]:
        newest: dict[tuple[str, ...], _Rank] = {}
        for path in sorted(self.directory.glob(f"*{SUFFIX}"), key=lambda path: path.name):
            try:
                labels, info, values, pid = read_counters(path)
            except FileNotFoundError:  # the worker ended between the listing and the read
                continue
            if process_is_alive(pid):
                newest[tuple(labels[name] for name in COMMON_LABELS)] = (labels, info, values)
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


def _family(definition: Definition, ranks: list[_Rank]) -> Metric:
    if definition.kind is Kind.INFO:
        info_family = InfoMetricFamily(
            definition.full_name.removesuffix("_info"), definition.help, labels=COMMON_LABELS
        )
        for labels, info, _ in ranks:
            info_family.add_metric([labels[name] for name in COMMON_LABELS], {key: info[key] for key in INFO_LABELS})
        return info_family
    names = [*COMMON_LABELS, definition.label] if definition.label else list(COMMON_LABELS)
    family = _FAMILIES[definition.kind](definition.full_name, definition.help, labels=names)
    for labels, _, values in ranks:
        common = [labels[name] for name in COMMON_LABELS]
        for key in definition.series:
            own = [key.split("/")[1]] if definition.label else []
            family.add_metric([*common, *own], values[key])
    return family
