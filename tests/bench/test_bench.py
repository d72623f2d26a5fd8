"""Servers in turn, what is kept of an interrupted run, who is compared, and the verdict. Servers are stand-ins."""

import json
import shlex
import stat
import sys
from pathlib import Path

import pytest
from engines import TINY_MODEL

from vllm_expert_prefetch.bench import BenchError, rounds, server
from vllm_expert_prefetch.bench.client import Lengths, scrape
from vllm_expert_prefetch.bench.contestants import NAMES, OFF, ON, STOCK, UVA, Contestant, contestants
from vllm_expert_prefetch.bench.contestants import PREFETCH as LAYERS
from vllm_expert_prefetch.bench.rounds import Job, Rows, run_rounds
from vllm_expert_prefetch.bench.verdict import judge, medians
from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.config import ExpertPrefetchConfig, config_from_additional
from vllm_expert_prefetch.metrics.rates import Between
from vllm_expert_prefetch.planning.budget import Load, make_budget
from vllm_expert_prefetch.planning.configuration import configuration
from vllm_expert_prefetch.planning.model_files import find
from vllm_expert_prefetch.planning.timing import Machine

PAGE = """vllm_expert_prefetch_lookups_total{engine="0",outcome="hit",rank="0"} 3.0
vllm_expert_prefetch_lookups_total{engine="0",outcome="hit",rank="1"} 5.0
vllm_expert_prefetch_lookups_total{engine="0",outcome="miss",rank="0"} 2.0
vllm_expert_prefetch_slots{rank="0"} 64
vllm:num_requests_running 1
"""
FAKE = """#!{python}
import http.server, sys
if "--refuse" in sys.argv:
    sys.exit("INFO: loading\\nConfigError: expert_prefetch: that cannot be. Do this")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"fine 1")
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
QWEN = find("Qwen3-30B-A3B")
BUDGET = make_budget(QWEN, Machine(24e9, 1e12, None, 25e9), Load(8192, 1))


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    command = tmp_path / "vllm"
    command.write_text(FAKE.format(python=sys.executable))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(server, "_vllm", lambda: str(command))
    return command


@pytest.fixture
def loads(monkeypatch):
    """What the client was asked for: (concurrency, requests)."""
    asked = []

    def ask(url, model, tokenizer, concurrency, num_requests, folder, lengths):
        asked.append((concurrency, num_requests))
        figures = {"output_throughput": 100.0, "p50_tpot_ms": 5.0, "p99_tpot_ms": 9.0, "p50_ttft_ms": 30.0}
        return {"completed": num_requests, "total_output_tokens": 1000, **figures}

    monkeypatch.setattr(rounds, "ask", ask)
    return asked


def job(num_rounds=2):
    return Job(("model",), "model", (1, 4), num_rounds, 6, Lengths(), start_seconds=30)


def test_a_server_is_ready_and_gone_afterwards(fake_vllm, tmp_path):
    with server.serve(["model"], tmp_path / "log", 30) as url:
        assert server.read(f"{url}/metrics") == "fine 1"
    with pytest.raises(OSError, match="refused"):
        server.read(f"{url}/metrics")


def test_a_server_that_refuses_says_why(fake_vllm, tmp_path):
    with (
        pytest.raises(server.DidNotStart, match="ConfigError: expert_prefetch: that cannot be"),
        server.serve(["model", "--refuse"], tmp_path / "log", 30),
    ):
        pass


def test_rounds_begin_with_another_one_each_and_who_does_not_start_is_left_out(fake_vllm, loads, tmp_path):
    said = []
    found = [Contestant(STOCK), Contestant(OFF, ("--refuse",)), Contestant(ON)]
    rows = Rows.open(tmp_path / "rows.json", "job", fresh=False)
    run_rounds(job(), found, rows, said.append)
    starts = [line.split(": ")[1].split()[0] for line in said if line.endswith("starts")]
    assert starts == [STOCK, OFF, ON, ON, STOCK]
    assert list(rows.failed) == [OFF]
    assert loads[:3] == [(2, 4), (1, 6), (4, 12)], "a warm-up, then at least three requests for each sequence"
    assert len(rows.rows) == 2 * 2 * 2


def test_who_fails_under_load_is_left_out_as_well(fake_vllm, loads, monkeypatch, tmp_path):
    def ask(*arguments):
        raise ValueError("Initial test run failed")

    monkeypatch.setattr(rounds, "ask", ask)
    rows = Rows.open(tmp_path / "rows.json", "job", fresh=False)
    run_rounds(job(), [Contestant(STOCK)], rows, lambda text: None)
    assert rows.failed == {STOCK: "Initial test run failed"}


def test_an_interrupted_run_goes_on_where_it_was(fake_vllm, loads, tmp_path):
    path = tmp_path / "rows.json"
    run_rounds(job(num_rounds=1), [Contestant(STOCK)], Rows.open(path, "job", fresh=False), lambda text: None)
    loads.clear()
    run_rounds(job(num_rounds=2), [Contestant(STOCK)], Rows.open(path, "job", fresh=False), lambda text: None)
    assert loads == [(2, 4), (1, 6), (4, 12)], "the second round only"
    with pytest.raises(BenchError, match="--fresh"):
        Rows.open(path, "another job", fresh=False)
    assert Rows.open(path, "another job", fresh=True).rows == []
    path.write_text("x")
    with pytest.raises(BenchError, match="--out"):
        Rows.open(path, "job", fresh=False)


def test_a_run_that_ends_while_rows_are_written_loses_none(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    Rows.open(path, "job", fresh=False).add({"name": STOCK})
    write = Path.write_text

    def cut_off(self, text):
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    rows = Rows.open(path, "job", fresh=False)
    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        rows.add({"name": ON})
    assert Rows.open(path, "job", fresh=False).rows == [{"name": STOCK}]


def test_series_of_all_ranks_are_added_up_and_plain_vllm_has_none():
    found = {"total_output_tokens": 4}
    assert rounds._counted(Between(scrape("x 1\n"), scrape(PAGE)), found)["hit_rate"] == 0.8
    assert rounds._counted(Between(scrape("x 1\n"), scrape("x 2\n")), found) == {}


def test_everybody_keeps_as_many_bytes_of_experts_on_the_accelerator():
    found = {one.name: one for one in contestants(BUDGET, True, {})}
    assert list(found) == list(NAMES)
    assert {found[name].config["slots_per_layer"] for name in (OFF, ON)} == {BUDGET.slots[0]}
    assert (found[OFF].config["prefetch"], found[ON].config["prefetch"]) == ("off", "auto")
    offloaded = float(found[UVA].flags[1]) * 2**30
    assert BUDGET.experts_bytes - offloaded == pytest.approx(BUDGET.cache_bytes, rel=1e-3)
    layers = dict(zip(found[LAYERS].flags, found[LAYERS].flags[1:], strict=False))
    size, number = int(layers["--offload-group-size"]), int(layers["--offload-num-in-group"])
    kept = 48 - 48 * number // size + 1  # and one buffer
    assert kept * 128 * BUDGET.record_bytes == pytest.approx(BUDGET.cache_bytes, abs=128 * BUDGET.record_bytes)


def test_the_cpu_platform_has_no_offloaders_and_looks_ahead_when_told_or_over_an_emulated_link():
    assert [one.name for one in contestants(BUDGET, False, {})] == [STOCK, OFF, ON]
    assert contestants(BUDGET, False, {}, [ON])[0].config["prefetch"] == "on"
    emulated = contestants(BUDGET, False, {"emulated_link_gbps": 0.1}, [ON])[0]
    assert emulated.config["prefetch"] == "auto"
    given = json.loads(emulated.arguments[emulated.arguments.index("--additional-config") + 1])
    assert config_from_additional(given) == ExpertPrefetchConfig(**emulated.config)


def row(name, number, concurrency, tokens):
    figures = {"output_tokens_per_s": tokens, "tpot_ms": 1e3 / tokens, "tpot_ms_p99": 1.0, "ttft_ms": 1.0}
    return {"name": name, "round": number, "concurrency": concurrency, **figures}


ROWS = [
    *(row(STOCK, number, 1, 100.0) for number in range(3)),
    *(row(OFF, number, 1, tokens) for number, tokens in enumerate((40.0, 60.0, 50.0))),
    *(row(ON, number, 1, tokens) for number, tokens in enumerate((80.0, 90.0, 10.0))),
]


def test_medians_of_rounds_the_ceiling_first_and_the_best_of_those_with_experts_in_host_memory():
    table = medians(ROWS)
    assert [(own["name"], own["output_tokens_per_s"], own["share_of_stock"]) for own in table] == [
        (STOCK, 100, 1),
        (OFF, 50, 0.5),
        (ON, 80, 0.8),
    ]
    verdict = judge(ROWS, contestants(BUDGET, False, {}))
    assert verdict.best == ON
    for part in ("plugin-on", "1.60 x plugin-off", "80% of stock", "rounds overlap", '"prefetch": "on"'):
        assert part in verdict.line
    apart = judge([own for own in ROWS if own["output_tokens_per_s"] != 10], contestants(BUDGET, False, {}))
    assert "overlap" not in apart.line
    assert judge(ROWS[:3], []).best is None


def test_vllm_reads_the_configuration_that_is_written_and_the_flags_of_its_offloaders(tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    common = ("some/model", "--max-model-len", "512", "--no-enable-prefix-caching")
    for one in contestants(BUDGET, True, {}):
        assert vars(parser.parse_args([*common[1:], *one.flags]))["max_model_len"] == 512
    file = tmp_path / "best.yaml"
    best = contestants(BUDGET, True, {}, [ON])[0]
    file.write_text(configuration([*common, *best.flags], best.config))
    read = parser.parse_args(["--config", str(file)])
    assert (read.model, read.max_model_len, read.enable_prefix_caching) == ("some/model", 512, False)
    assert config_from_additional(read.additional_config) == ExpertPrefetchConfig(**best.config)
    uva = contestants(BUDGET, True, {}, [UVA])[0]
    file.write_text(configuration([*common, *uva.flags], uva.config))
    assert set(parser.parse_args(["--config", str(file)]).cpu_offload_params) == {"w13_weight", "w2_weight"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--rounds 0", ["--rounds must be at least 1"]),
        ("--tp 3", ["64 cannot be divided over 3 GPUs: use 2"]),
        ("--concurrency 1,x", ["--concurrency", "1,x"]),
        ("--cache-gb 0", ["--cache-gb must be above 0"]),
        ("--only plugin", ["plugin is none of", "plugin-on"]),
        ("--only vllm-uva", ["--only vllm-uva", "none of them on this platform"]),
        ("--context 128", ["--context 420"]),
        ("--cache-gb 1", ["more than all experts take"]),
    ],
)
def test_what_cannot_be_compared_is_one_message(capsys, monkeypatch, flags, says):
    monkeypatch.setattr("vllm_expert_prefetch.cli.bench._on_gpu", lambda: False)
    assert main(["bench", str(TINY_MODEL), *shlex.split(flags)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in says:
        assert part in message


def test_the_command_ends_with_one_json_line_and_writes_what_it_was_asked_for(
    capsys, monkeypatch, fake_vllm, loads, tmp_path
):
    monkeypatch.setattr("vllm_expert_prefetch.cli.bench._on_gpu", lambda: False)
    files = {name: tmp_path / name for name in ("rows.json", "plot.png", "best.yaml")}
    flags = ["--rounds", "1", "--link-gbps", "0.1", "--out", str(files["rows.json"])]
    flags += ["--plot", str(files["plot.png"]), "--write-config", str(files["best.yaml"])]
    assert main(["bench", str(TINY_MODEL), *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {own["name"] for own in found["medians"]} == {STOCK, OFF, ON}
    assert "slots_per_layer: 8" in files["best.yaml"].read_text()
    assert all(path.stat().st_size for path in files.values())
