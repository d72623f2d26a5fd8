"""A served model under load, seen through a real Prometheus: one server for all of it.

The server runs with per-layer series and a slow emulated link, so that there is something to see.
"""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import httpx
import pytest
from engines import prompts
from observatory import (
    RATE_INTERVAL,
    Load,
    Prometheus,
    alert_rules,
    dashboard_queries,
    has_prometheus,
    load,
    remove_scheme,
    run_prometheus,
)
from scraping import Scrapes, scrape_often
from servers import Server, descendants_of, free_port, serve

from vllm_expert_prefetch.metrics.counters import SUFFIX
from vllm_expert_prefetch.metrics.definitions import PHASES

pytestmark = [pytest.mark.engine, pytest.mark.alone]

NUM_CLIENTS = 16
LOAD_SECONDS = 60
RECORDING_SECONDS = 16  # ratios are recorded every 15 s
RECORD_BYTES = 49152
NUM_LAYERS = 8
TOP_K = 2
ITL = "sum(increase({name}_sum[2m])) / sum(increase({name}_count[2m]))"
CONFIG = {
    "cache_fraction": 0.5,
    "metrics_per_layer": True,
    "ghost_caches": True,
    "emulated_link_gbps": 1.0,
    "prefetch": "on",  # `auto` may find that it does not pay here, and panels of guesses have nothing to show then
}


def ask(metrics_port: int) -> list[str]:
    config = {"expert_prefetch": {**CONFIG, "metrics_port": metrics_port}}
    return ["--plugin", "expert_prefetch", "--additional-config", json.dumps(config)]


@dataclass
class Observed:
    """The server after the load, with what it was asked and what was seen."""

    server: Server
    prometheus: Prometheus
    before: dict[str, float]
    after: dict[str, float]
    load: Load
    scrapes: Scrapes
    top: str
    before_single: dict[str, float]
    after_single: dict[str, float]
    own_port: str
    seconds: float
    """When everything had been scraped and recorded: the time of every query."""
    after_kill: dict[str, float]
    left_behind: list[Path]

    def gained(self, name: str, **labels: str) -> float:
        """How much the series called `name` with these labels grew, summed."""
        return total(self.after, name, **labels) - total(self.before, name, **labels)


def total(metrics: dict[str, float], name: str, **labels: str) -> float:
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for key, value in metrics.items()
        if key.startswith(f"vllm_expert_prefetch_{name}{{") and all(label in key for label in wanted)
    )


@pytest.fixture(scope="module")
def observed():
    if not has_prometheus():
        pytest.skip("no prometheus in PATH: apt-get install prometheus")
    metrics_port = free_port()
    with serve(*ask(metrics_port)) as server:
        server.wait_ready()
        server.complete("In the beginning", 4)  # the first request compiles the sampler
        with run_prometheus([remove_scheme(server.url)]) as prometheus:
            yield observe(server, prometheus, metrics_port)


def observe(server: Server, prometheus: Prometheus, metrics_port: int) -> Observed:
    """Load with scrapes; then single requests; then, when Prometheus has all of it, a killed worker."""
    before = server.metrics()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with load(server.url, prompts(32), NUM_CLIENTS) as asked:
            scraping = pool.submit(scrape_often, server.url, LOAD_SECONDS)
            time.sleep(LOAD_SECONDS / 2)
            command = ["top", server.url, "--once", "--json"]
            top = subprocess.run([sys.executable, "-m", "vllm_expert_prefetch.cli.main", *command], capture_output=True)
            time.sleep(LOAD_SECONDS / 2)
        scrapes = scraping.result(60)
    after = server.metrics()
    before_single = after
    ask_for_single_tokens(server)
    after_single = server.metrics()
    own_port = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30).text
    time.sleep(RECORDING_SECONDS)
    seconds = time.time()
    after_kill = kill_worker(server)
    server.process.wait(60)
    left_behind = list(server.runtime.iterdir())
    return Observed(
        server,
        prometheus,
        before,
        after,
        asked,
        scrapes,
        top.stdout.decode(),
        before_single,
        after_single,
        own_port,
        seconds,
        after_kill,
        left_behind,
    )


def ask_for_single_tokens(server: Server) -> None:
    """Four requests, one after the other, with prompts of one token."""
    generator = random.Random(3)
    for _ in range(4):
        prompt = [generator.randrange(10, 200)]
        body = {"model": "demo", "prompt": prompt, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


def kill_worker(server: Server) -> dict[str, float]:
    """SIGKILL; what /metrics still shows of the plugin until it shows nothing, or nobody answers any more."""
    (directory,) = server.runtime.iterdir()
    (path,) = directory.glob(f"*{SUFFIX}")
    started = descendants_of(server.process.pid)
    (worker,) = [pid for pid in started if str(path) in Path(f"/proc/{pid}/maps").read_text()]
    os.kill(worker, signal.SIGKILL)
    shown, deadline = {}, time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            shown = server.metrics()
        except httpx.TransportError:
            return {}
        if not shown:
            return {}
    return shown


def counters_of(page: list[str]) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in page]
    return {key: float(value) for key, value in lines if "_total{" in key or "_bucket{" in key or "_sum{" in key}


def test_the_load_was_served(observed):
    assert observed.load.errors == []
    assert observed.load.requests >= NUM_CLIENTS


def test_scraping_ten_times_a_second_gives_no_error_and_no_total_that_runs_backwards(observed):
    assert observed.scrapes.problems == []
    pages = [counters_of(page) for page in observed.scrapes.pages]
    assert len(pages) > 5 * LOAD_SECONDS
    for earlier, later in itertools.pairwise(pages):
        assert {key: (value, later.get(key)) for key, value in earlier.items() if later.get(key, -1) < value} == {}


def test_scrapes_are_quick_under_load(observed):
    """The 95th percentile is under 50 ms, beyond what a busy machine makes an empty answer wait."""
    scrape, empty = (
        statistics.quantiles(seconds, n=20)[-1]
        for seconds in (observed.scrapes.seconds, observed.scrapes.empty_seconds)
    )
    assert scrape < 0.05 + empty, f"{1000 * scrape:.1f} ms, an empty answer {1000 * empty:.1f} ms"


def test_no_token_is_missing_from_the_totals(observed):
    """Every token but a request's first one is an observation of the time per output token."""
    assert observed.gained("tpot_seconds_count") == observed.load.tokens - observed.load.requests
    steps = observed.gained("steps_total")
    assert steps == observed.gained("step_seconds_count") > 0
    assert observed.gained("moe_steps_total") == steps * NUM_LAYERS


def test_bytes_are_misses_times_the_record(observed):
    """A late expert whose prefetch had not started is copied on demand: without prefetching it is the misses alone."""
    misses, late = (observed.gained("lookups_total", outcome=outcome) for outcome in ("miss", "late"))
    demanded = sum(observed.gained("transfer_bytes_total", kind=kind) for kind in ("demand", "overflow"))
    assert demanded % RECORD_BYTES == 0
    assert 0 < misses <= demanded / RECORD_BYTES <= misses + late
    assert observed.gained("transfer_bytes_total", kind="prefetch") % RECORD_BYTES == 0
    assert total(observed.after, "expert_record_bytes") == RECORD_BYTES


def test_layers_sum_to_the_whole(observed):
    for outcome in ("hit", "late", "miss"):
        layers = observed.gained("layer_lookups_total", outcome=outcome)
        assert layers == observed.gained("lookups_total", outcome=outcome)
    assert observed.gained("layer_stall_seconds_total") == pytest.approx(observed.gained("stall_seconds_total"))
    names = {key.split('layer="')[1].split('"')[0] for key in observed.after if "layer_lookups_total{" in key}
    assert names == {str(number) for number in range(NUM_LAYERS)}


def test_larger_caches_would_hit_more_in_the_same_lookups(observed):
    lookups = sum(observed.gained("lookups_total", outcome=outcome) for outcome in ("hit", "late", "miss"))
    hits = [observed.gained("ghost_hits_total", scale=scale) for scale in ("1.5", "2")]
    assert [observed.gained("ghost_lookups_total", scale=scale) for scale in ("1.5", "2")] == [lookups] * 2
    assert 0 < observed.gained("lookups_total", outcome="hit") < hits[0] < hits[1] <= lookups


def test_stalls_are_a_part_of_the_steps(observed):
    assert 0 < observed.gained("stall_seconds_total") < observed.gained("step_seconds_sum")


def test_the_time_per_output_token_is_that_of_vllm(observed):
    """Same tokens, same mean, within what the two clocks see of a step."""
    ours, vllms = (
        observed.prometheus.query(ITL.format(name=name), observed.seconds)[0]["value"][1]
        for name in ("vllm_expert_prefetch_tpot_seconds", "vllm:inter_token_latency_seconds")
    )
    assert float(ours) == pytest.approx(float(vllms), rel=0.05)


@pytest.mark.parametrize("query", dashboard_queries("INSTANCE"), ids=lambda query: f"{query.dashboard}-{query.panel}")
def test_every_panel_has_data(observed, query):
    expression = query.expression.replace("INSTANCE", remove_scheme(observed.server.url))
    expression = expression.replace(f"[{RATE_INTERVAL}]", f"[{LOAD_SECONDS}s]")
    samples = observed.prometheus.query(expression, observed.seconds)
    assert samples, expression
    assert all(float(sample["value"][1]) == float(sample["value"][1]) for sample in samples), "not a number"


@pytest.mark.parametrize("alert", alert_rules(), ids=lambda rule: f"{rule['alert']}-{rule['labels'].get('cause', '')}")
def test_every_alert_finds_the_series_that_it_reads(observed, alert):
    assert observed.prometheus.series_without_data(alert, observed.seconds) == []


def test_prometheus_evaluates_every_rule_without_an_error(observed):
    rules = observed.prometheus.rules()
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert len(rules) > len(alert_rules())


def test_at_batch_one_lookups_are_steps_times_layers_times_distinct_experts(observed):
    """Prompts of one token: every step of every layer then needs exactly top-k experts."""
    before, after = observed.before_single, observed.after_single
    steps = {
        phase: total(after, "steps_total", phase=phase) - total(before, "steps_total", phase=phase) for phase in PHASES
    }
    assert steps == {"prefill": 4, "decode": 32, "mixed": 0}
    assert total(after, "lookups_total") - total(before, "lookups_total") == 36 * NUM_LAYERS * TOP_K


def test_the_workers_own_port_shows_the_same(observed):
    page = [line for line in observed.own_port.splitlines() if line.startswith("vllm_expert_prefetch_")]
    assert counters_of(page) == {key: value for key, value in observed.after_single.items() if key in counters_of(page)}
    assert len(counters_of(page)) > 100
    assert "vllm:" not in observed.own_port


def test_top_shows_the_server(observed):
    shown = json.loads(observed.top)
    assert (shown["slots"], shown["experts"]) == (64, 128)
    assert len(shown["layers"]) == NUM_LAYERS
    assert 0 < shown["hit_ratio"] < shown["ghost_hit_ratios"]["1.5"] < shown["ghost_hit_ratios"]["2"] <= 1
    assert 0 < shown["tpot_seconds"] < 1


def test_a_killed_worker_shows_nothing_any_more_and_leaves_nothing(observed):
    assert observed.after_kill == {}
    assert observed.left_behind == []
