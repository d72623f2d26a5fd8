"""The API server's side: what a scrape shows."""

import bisect
import gc
import os
import signal
import time
from pathlib import Path

import pytest
from counter_files import INFO, Worker, labels, make_counters
from processes import run_python
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from vllm_expert_prefetch.metrics.collector import ExpertPrefetchCollector, register_collector
from vllm_expert_prefetch.metrics.counters import SUFFIX, layer_index
from vllm_expert_prefetch.metrics.definitions import INDEX, METRICS, PREFIX, STEP_BUCKETS, Kind, histogram_series

HITS = f"{PREFIX}lookups_total"


@pytest.fixture
def registry(tmp_path):
    """A registry that shows the workers of `tmp_path`."""
    registry = CollectorRegistry()
    register_collector(registry, tmp_path)
    return registry


def scrape(registry):
    """Families by name, through the text format that Prometheus reads."""
    return {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}


def samples(registry, name):
    """Value by labels (as sorted pairs) of the samples called `name`."""
    found = [sample for family in scrape(registry).values() for sample in family.samples if sample.name == name]
    return {tuple(sorted(sample.labels.items())): sample.value for sample in found}


def value(registry, name, **own):
    return samples(registry, name)[tuple(sorted({**labels(), **own}.items()))]


def test_a_scrape_shows_every_metric_with_its_type_help_and_series(tmp_path, registry):
    counters = make_counters(tmp_path, layers=("0", "5"))
    families = scrape(registry)
    for metric in METRICS:
        counter = metric.kind is Kind.COUNTER
        family = families[metric.full_name.removesuffix("_total") if counter else metric.full_name]
        assert family.type == ("gauge" if metric.kind is Kind.INFO else metric.kind.value)
        assert family.documentation == metric.help
        histogram = metric.kind is Kind.HISTOGRAM
        names = {f"{metric.full_name}{part}" for part in (("_bucket", "_count", "_sum") if histogram else ("",))}
        assert {sample.name for sample in family.samples} == names
        own = [sample.labels.get(metric.label) for sample in family.samples]
        repeats = (len(metric.buckets) + 3 if histogram else 1) * (2 if metric.per_layer else 1)
        assert sorted(own, key=str) == sorted(list(metric.values or [None]) * repeats, key=str)
    assert len(families) == len(METRICS)
    assert counters.path.exists()


def test_per_layer_series_appear_under_the_layers_name_and_only_when_asked_for(tmp_path, registry):
    plain = make_counters(tmp_path)
    assert not [name for name in scrape(registry) if "layer_" in name]
    counters = make_counters(tmp_path, "engine0-rank1-000000", "1", layers=("1", "5"))
    counters.add(layer_index(1, "layer_lookups_total/miss"), 4)
    by_layer = samples(registry, f"{PREFIX}layer_lookups_total")
    found = {(dict(key)["layer"], dict(key)["outcome"]): number for key, number in by_layer.items() if number}
    assert found == {("5", "miss"): 4}
    assert {dict(key)["rank"] for key in by_layer} == {"1"}
    assert plain.path.exists()


def test_a_histogram_is_cumulative_and_its_count_is_that_of_its_last_bucket(tmp_path, registry):
    counters = make_counters(tmp_path)
    clock_like = [0.0004, 0.0011, 0.0011, 7.0, 99.0]
    keys = histogram_series("tpot_seconds", STEP_BUCKETS)
    for seconds in clock_like:
        counters.add(INDEX[keys[bisect.bisect_left(STEP_BUCKETS, seconds)]], 1)
        counters.add(INDEX[keys[-1]], seconds)
    name = f"{PREFIX}tpot_seconds"
    buckets = {float(dict(key)["le"]): count for key, count in samples(registry, f"{name}_bucket").items()}
    for bound, count in buckets.items():
        assert count == sum(seconds <= bound for seconds in clock_like)
    assert set(buckets) == {*STEP_BUCKETS, float("inf")}
    assert value(registry, f"{name}_count") == 5
    assert value(registry, f"{name}_sum") == pytest.approx(sum(clock_like))


def test_a_killed_workers_series_vanish_before_its_parent_has_noticed(tmp_path, registry):
    with Worker(tmp_path) as worker:
        worker.add("lookups_total/hit", 5)
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while samples(registry, HITS) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Path(f"/proc/{worker.pid}").exists(), "nobody has waited for it yet"
        assert generate_latest(registry) == b""


def test_a_file_that_a_dead_worker_has_left_shows_nothing(tmp_path, registry):
    """Whoever has its process number by now."""
    with Worker(tmp_path) as worker:
        assert samples(registry, HITS)
        worker.kill()
        (path,) = tmp_path.glob(f"*{SUFFIX}")
        assert generate_latest(registry) == b""
        assert path.exists()


def test_values_arrive_under_their_labels(tmp_path, registry):
    counters = make_counters(tmp_path)
    counters.add(INDEX["lookups_total/miss"], 7)
    counters.add(INDEX["transfer_seconds_total"], 0.25)
    counters.set("slots", 12)
    assert value(registry, HITS, outcome="miss") == 7
    assert value(registry, HITS, outcome="hit") == 0
    assert value(registry, f"{PREFIX}transfer_seconds_total") == 0.25
    assert value(registry, f"{PREFIX}slots") == 12
    assert value(registry, f"{PREFIX}info", **INFO) == 1


def test_every_scrape_reads_anew(tmp_path, registry):
    counters = make_counters(tmp_path)
    for expected in (1, 2, 3):
        counters.add(INDEX["evictions_total"], 1)
        assert value(registry, f"{PREFIX}evictions_total") == expected


def test_without_a_worker_there_is_nothing_to_see(registry):
    assert generate_latest(registry) == b""


def test_a_directory_that_is_gone_is_no_error(tmp_path):
    registry = CollectorRegistry()
    register_collector(registry, tmp_path / "gone")
    assert generate_latest(registry) == b""


def test_registering_reads_no_file_and_claims_every_name(tmp_path):
    """In a registry like vLLM's, which collects from what does not describe itself."""
    (tmp_path / f"unreadable{SUFFIX}").write_text("not counters")
    registry = CollectorRegistry(auto_describe=True)
    register_collector(registry, tmp_path)
    for metric in METRICS:
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            registry.register(Named(metric.full_name))


class Named(Collector):
    """Shows one metric of this name."""

    def __init__(self, name):
        self.name = name

    def collect(self):
        return [Metric(self.name.removesuffix("_info"), "", "info" if self.name.endswith("_info") else "gauge")]


def test_each_rank_has_series_of_its_own(tmp_path, registry):
    ranks = [make_counters(tmp_path, f"engine0-rank{rank}-000000", str(rank)) for rank in range(3)]
    for rank, counters in enumerate(ranks):
        counters.add(INDEX["lookups_total/hit"], 10 + rank)
    assert [value(registry, HITS, outcome="hit", rank=str(rank)) for rank in range(3)] == [10, 11, 12]


def test_a_dead_workers_series_vanish(tmp_path, registry):
    living = make_counters(tmp_path, "engine0-rank0-000000", "0")
    living.add(INDEX["lookups_total/hit"], 1)
    with Worker(tmp_path, "engine0-rank1-000000", "1") as worker:
        worker.add("lookups_total/hit", 5)
        assert value(registry, HITS, outcome="hit", rank="1") == 5
        worker.kill()
        assert len(list(tmp_path.iterdir())) == 2, "a killed worker leaves its file"
        assert {dict(key)["rank"] for key in samples(registry, HITS)} == {"0"}


def test_the_newest_file_wins_for_the_same_labels(tmp_path, registry):
    files = [make_counters(tmp_path, f"engine0-rank0-{number:06d}") for number in (9, 10, 2)]
    for index, counters in enumerate(files):
        counters.add(INDEX["lookups_total/hit"], 1 + index)
    assert value(registry, HITS, outcome="hit") == 2
    assert len(samples(registry, f"{PREFIX}slots")) == 1
    del counters, files[1]
    gc.collect()
    assert value(registry, HITS, outcome="hit") == 1, "the newest that is left"


def test_a_dead_newest_file_does_not_hide_a_living_one(tmp_path, registry):
    living = make_counters(tmp_path, "engine0-rank0-000000")
    living.add(INDEX["lookups_total/hit"], 4)
    with Worker(tmp_path, "engine0-rank0-000001") as worker:
        worker.add("lookups_total/hit", 9)
        assert value(registry, HITS, outcome="hit") == 9
    assert value(registry, HITS, outcome="hit") == 4


def test_a_file_that_goes_during_the_scrape_is_passed_over(tmp_path, registry, monkeypatch):
    counters = make_counters(tmp_path, "engine0-rank0-000000")
    (tmp_path / f"engine0-rank1-000000{SUFFIX}").symlink_to(tmp_path / "nowhere")
    assert value(registry, f"{PREFIX}slots") == 0
    assert counters.path.exists()


def test_registering_twice_is_a_no_op(tmp_path, registry):
    register_collector(registry, tmp_path)
    counters = make_counters(tmp_path)
    assert len(samples(registry, f"{PREFIX}slots")) == 1
    assert counters.path.exists()


def test_two_registries_show_the_same(tmp_path, registry):
    other = CollectorRegistry()
    register_collector(other, tmp_path)
    counters = make_counters(tmp_path)
    counters.add(INDEX["moe_steps_total/wide"], 3)
    assert generate_latest(registry) == generate_latest(other) != b""


def test_a_second_collector_of_the_same_names_is_refused_by_the_registry(tmp_path, registry):
    """Names are claimed when registering, before any worker exists."""
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(ExpertPrefetchCollector(tmp_path))


def test_the_reader_does_not_change_the_file(tmp_path, registry):
    counters = make_counters(tmp_path)
    before = counters.path.read_bytes(), os.stat(counters.path).st_mtime_ns
    generate_latest(registry)
    assert (counters.path.read_bytes(), os.stat(counters.path).st_mtime_ns) == before


def test_the_multiprocess_mode_of_prometheus_client_shows_the_workers_as_well(tmp_path):
    """In a process of its own: the extension of prometheus-client's collector is for good."""
    output = run_python(
        "import os, sys, pathlib\n"
        f"os.environ['PROMETHEUS_MULTIPROC_DIR'] = {str(tmp_path)!r}\n"
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "from vllm_expert_prefetch.metrics.collector import extend_multiprocess_collector\n"
        "from vllm_expert_prefetch.metrics.counters import Counters\n"
        "from vllm_expert_prefetch.metrics.definitions import INFO_LABELS\n"
        f"directory = pathlib.Path({str(tmp_path)!r})\n"
        "labels = dict(model_name='m', engine='0', rank='0')\n"
        "counters = Counters(directory / 'a-1.counters', labels, dict.fromkeys(INFO_LABELS, 'x'))\n"
        "extend_multiprocess_collector(directory)\n"
        "extend_multiprocess_collector(directory)\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    samples = [line for line in output.splitlines() if line.startswith("vllm_expert_prefetch_slots{")]
    assert samples == ['vllm_expert_prefetch_slots{engine="0",model_name="m",rank="0"} 0.0']
