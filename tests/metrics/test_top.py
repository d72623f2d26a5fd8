"""`vllm-expert-prefetch top`: rates between two scrapes of a page that a collector really makes."""

import http.server
import io
import json
import os
import termios
import threading
from contextlib import contextmanager

import pytest
from counter_files import make_counters
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from rich.text import Text
from servers import free_port

from vllm_expert_prefetch.cli import top
from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.metrics.collector import register_collector
from vllm_expert_prefetch.metrics.counters import layer_index
from vllm_expert_prefetch.metrics.definitions import INDEX, STEP_BUCKETS, histogram_series
from vllm_expert_prefetch.metrics.rates import NoMetrics, parse_scrape, summarise


@pytest.fixture
def counters(tmp_path):
    made = make_counters(tmp_path, layers=("0", "2", "10"))
    for name, value in {"slots": 8, "experts": 16, "planned_hit_ratio": 0.5, "link_bytes_per_second": 2e9}.items():
        made.set(name, value)
    return made


@pytest.fixture
def page(tmp_path):
    registry = CollectorRegistry()
    register_collector(registry, tmp_path)
    return lambda: generate_latest(registry).decode()


def happen(counters):
    """Something of everything."""
    buckets = histogram_series("tpot_seconds", STEP_BUCKETS)
    gains = {
        "lookups_total/hit": 30,
        "lookups_total/miss": 10,
        "transfer_bytes_total/demand": 4000,
        "transfer_bytes_total/prefetch": 9000,
        "saved_seconds_total": 0.125,
        "transfer_seconds_total": 0.5,
        "stall_seconds_total": 0.25,
        f"{buckets[0]}": 4,
        buckets[-1]: 0.02,
        histogram_series("step_seconds/decode", STEP_BUCKETS)[-1]: 1.0,
        "steps_total/decode": 4,
        "predictions_total/used": 3,
        "predictions_total/cancelled": 1,
        "recall_routed_total": 10,
        "recall_found_total/top_k": 9,
    }
    for series, amount in gains.items():
        counters.add(INDEX[series], amount)
    for layer, (hits, misses) in enumerate([(10, 0), (9, 3), (11, 7)]):
        counters.add(layer_index(layer, "layer_lookups_total/hit"), hits)
        counters.add(layer_index(layer, "layer_lookups_total/miss"), misses)


def test_rates_are_what_happened_between_the_two(counters, page):
    happen(counters)
    before = parse_scrape(page(), 100.0)
    happen(counters)
    summary = summarise(before, parse_scrape(page(), 102.0))
    assert summary["hit_ratio"] == 0.75
    assert summary["lookups_per_second"] == {"hit": 15, "late": 0, "miss": 5, "speculated": 0}
    assert summary["transfer_bytes_per_second"] == {"demand": 2000, "overflow": 0, "prefetch": 4500.0}
    assert summary["link_bytes_per_second"] == 8000
    assert summary["stall_ratio"] == 0.25
    assert summary["tpot_seconds"] == pytest.approx(0.005)
    assert summary["steps_per_second"]["decode"] == 2
    assert (summary["prefetch_precision"], summary["prefetch_recall"]) == (0.75, 0.9)
    assert (summary["slots"], summary["experts"], summary["planned_hit_ratio"]) == (8, 16, 0.5)


def test_what_larger_caches_would_hit_stands_beside_the_plan(counters, page):
    happen(counters)
    before = parse_scrape(page(), 100.0)
    assert "the slots" not in rendered(summarise(before, parse_scrape(page(), 101.0)))
    happen(counters)
    for scale, hits in (("1.5", 32), ("2", 38)):
        counters.add(INDEX[f"ghost_hits_total/{scale}"], hits)
        counters.add(INDEX[f"ghost_lookups_total/{scale}"], 40)
    summary = summarise(before, parse_scrape(page(), 102.0))
    assert summary["ghost_hit_ratios"] == {"1.5": 0.8, "2": 0.95}
    (line,) = [line for line in rendered(summary).splitlines() if line.startswith("hit rate")]
    assert line.split(maxsplit=4)[-1] == "planned 50.0 %; 80.0 % with 1.5 x, 95.0 % with 2 x the slots"


def test_layers_come_in_the_order_of_their_numbers(counters, page):
    before = parse_scrape(page(), 0.0)
    happen(counters)
    layers = summarise(before, parse_scrape(page(), 1.0))["layers"]
    assert list(layers) == ["0", "2", "10"]
    assert layers["10"] == {"hit": 11, "miss": 7, "late": 0, "speculated": 0}


def test_the_link_is_not_faster_than_it_is(counters, page):
    """Prefetches are copied while nobody waits: their bytes have no time."""
    before = parse_scrape(page(), 0.0)
    happen(counters)
    assert summarise(before, parse_scrape(page(), 1.0))["link_bytes_per_second"] == 4000 / 0.5


def test_it_fits_80_columns_and_needs_no_colour(counters, page):
    before = parse_scrape(page(), 0.0)
    happen(counters)
    console = Console(width=80, file=io.StringIO(), no_color=True)
    console.print(top.render(summarise(before, parse_scrape(page(), 1.0))))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (layer,) = [line for line in lines if line.split()[:1] == ["10"]]
    assert layer.split()[1] == "█" * 24 + "░" * 16
    assert any("█ hit" in line and "░ miss" in line for line in lines)


@pytest.mark.parametrize(("key", "quits"), [(b"q", True), (b"Q", True), (b"x", False)])
def test_q_quits(monkeypatch, key, quits):
    master, slave = os.openpty()
    with os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        before = termios.tcgetattr(terminal)
        with top._keys() as wants_to_quit:
            os.write(master, key)
            assert wants_to_quit(0.3) == quits
        assert termios.tcgetattr(terminal) == before
    os.close(master)


def test_an_idle_server_has_no_ratios(counters, page):
    happen(counters)
    idle = summarise(parse_scrape(page(), 0.0), parse_scrape(page(), 1.0))
    assert [idle[name] for name in ("hit_ratio", "stall_ratio", "tpot_seconds", "link_bytes_per_second")] == [None] * 4


def test_an_idle_server_shows_what_it_has_and_a_dash_for_what_it_has_not(counters, page):
    happen(counters)
    lines = rendered(summarise(parse_scrape(page(), 0.0), parse_scrape(page(), 1.0))).splitlines()
    shown = {line[:10].strip(): line[10:].split() for line in lines if line.strip()}
    assert lines[0].startswith("a/model  policy some policy")
    assert shown["TPOT"] == ["-"]
    assert shown["hit rate"] == ["-", "planned", "50.0", "%"]
    assert shown["stalls"][0] == "-"
    assert shown["lookups"] == ["0/s"]
    assert shown["copied"] == ["0", "B/s"]
    assert " ".join(shown["cache"]).endswith("8 slots (0 resident) for 16 experts, 0 B on the host")
    assert "layers" not in shown


def rendered(summary):
    """What the terminal shows, without colours."""
    console = Console(width=200, file=io.StringIO())
    console.print(top.render(summary))
    return console.file.getvalue()


def test_a_server_that_started_anew_counts_from_zero(counters, page):
    for _ in range(3):
        happen(counters)
    before = parse_scrape(page(), 0.0)
    for series in INDEX:
        counters.set(series, 0)
    happen(counters)
    summary = summarise(before, parse_scrape(page(), 1.0))
    assert summary["lookups_per_second"]["hit"] == 30
    assert summary["hit_ratio"] == 0.75


def test_ranks_are_summed_and_their_plans_are_not(tmp_path, counters, page):
    other = make_counters(tmp_path, "engine0-rank1-000000", "1")
    other.set("planned_hit_ratio", 0.5)
    other.set("slots", 8)
    before = parse_scrape(page(), 0.0)
    other.add(INDEX["lookups_total/miss"], 10)
    counters.add(INDEX["lookups_total/hit"], 10)
    summary = summarise(before, parse_scrape(page(), 1.0))
    assert (summary["hit_ratio"], summary["planned_hit_ratio"], summary["slots"]) == (0.5, 0.5, 16)


def test_a_page_without_the_plugin_is_refused():
    with pytest.raises(NoMetrics, match="--plugin expert_prefetch"):
        parse_scrape("# HELP vllm:x y\n# TYPE vllm:x counter\nvllm:x_total 1\n", 0.0)


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (39, 1, 0, 0), (1, 0, 0, 999), (3, 3, 3, 0), (1, 2, 4, 8)])
def test_a_bar_is_divided_exactly(counts):
    outcomes = ("hit", "late", "speculated", "miss")
    bar = Text.from_markup(top._bar(dict(zip(outcomes, counts, strict=True))))
    cells = {part.style: part.end - part.start for part in bar.spans}
    lengths = [cells.get(top._COLOURS[outcome], 0) for outcome in outcomes]
    assert sum(lengths) == len(bar.plain) == 40
    for length, count in zip(lengths, counts, strict=True):
        assert abs(length - 40 * count / sum(counts)) < 1


@contextmanager
def serve_page(page, path="/metrics"):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == path else 404)
            self.end_headers()
            self.wfile.write(page().encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("suffix", ["", "/", "/metrics"])
def test_once_as_json_is_one_object_for_scripts(counters, page, capsys, suffix):
    happen(counters)
    with serve_page(page) as url:
        assert main(["top", f"{url}{suffix}", "--once", "--json", "--interval", "0.05"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["servers"][0]["model_name"] == "a/model"
    assert printed["slots"] == 8


def test_once_as_text_shows_every_line(counters, page, capsys):
    counters.set("lookahead_open_layers/1", 7)
    counters.set("lookahead_open_layers/2", 5)
    pages = iter([page(), None])

    def happening():
        happen(counters)
        return next(pages) or page()

    with serve_page(happening) as url:
        assert main(["top", url.removeprefix("http://"), "--once", "--interval", "0.05"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "TPOT",
        "hit rate",
        "75.0 %",
        "stalls",
        "25.0 %",
        "8 slots",
        "layers",
        "10  ",
        "61.1 % hits",
        "of the experts found; 7/5 layers, 1 to 2 ahead",
        "12.5 %",
    ):
        assert part in shown


def test_nobody_there_is_said_in_one_line(capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["top", url, "--once"]) == 1
    assert capsys.readouterr().err.startswith(f"{url}/metrics: cannot be read")


def test_a_server_without_the_plugin_is_said_in_one_line(capsys):
    with serve_page(lambda: "") as url:
        assert main(["top", url, "--once"]) == 1
    assert "--plugin expert_prefetch" in capsys.readouterr().err


def test_json_without_once_is_refused(capsys):
    assert main(["top", "localhost:1", "--json"]) == 2
    assert "--once" in capsys.readouterr().err
