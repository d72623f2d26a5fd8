"""A recording of vLLM itself, started and stopped while it serves: replayed, it counts what the server counted."""

import json
import os

import pytest
from engines import TINY_MODEL, counters, greedy, layers, open_engine, prompts

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.planning.simulate import as_recorded
from vllm_expert_prefetch.tracing.trace import read_trace

pytestmark = pytest.mark.engine

COUNTED = {
    "hits": ("lookups_total/hit",),
    "misses": ("lookups_total/miss",),
    "evictions": ("evictions_total",),
    "bytes": ("transfer_bytes_total/demand", "transfer_bytes_total/overflow"),
}


def live(llm):
    found = counters(llm)
    return {name: sum(found[series] for series in parts) for name, parts in COUNTED.items()}


def last_line(capsys):
    """What a command printed, behind vLLM's log."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.proves("recording of routing (`trace`)")
def test_replayed_it_counts_what_the_server_counted(tmp_path, capsys, monkeypatch):
    config = {"cache_fraction": 0.4, "prefetch": "off", "emulated_link_gbps": 1, "trace": str(tmp_path / "a")}
    server = ["--server", str(os.getpid())]
    with open_engine(TINY_MODEL, config) as llm:
        greedy(llm, prompts(6), num_tokens=12)
        assert main(["trace", "stop", *server]) == 0
        first = live(llm)
        recorded = as_recorded(read_trace(tmp_path / "a"))
        assert recorded == {name: (count, count) for name, count in first.items()}
        assert min(first.values()) > 0

        assert all(layer.recorder is None for layer in layers(llm)), "off is one comparison"
        greedy(llm, prompts(2), num_tokens=4)
        before = live(llm)
        assert main(["trace", "start", str(tmp_path / "b"), *server]) == 0
        greedy(llm, prompts(9)[6:], num_tokens=8)
        assert main(["trace", "stop", *server]) == 0
        stopped = last_line(capsys)
        grown = {name: count - before[name] for name, count in live(llm).items()}
        assert main(["trace", "start", str(tmp_path / "c"), *server]) == 0
        greedy(llm, prompts(1), num_tokens=5)
    assert len(read_trace(tmp_path / "c")) == 5, "written when the engine ended"
    trace = read_trace(tmp_path / "b")
    assert (len(trace), stopped["steps"], stopped["dropped_steps"]) == (8, 8, 0)
    assert as_recorded(trace) == {name: (count, count) for name, count in grown.items()}
    assert trace.tokens.tolist()[1:] == trace.decoding.tolist()[1:] == [3] * 7
    assert trace.prefilling.tolist() == [3] + [0] * 7
    assert (trace.seconds > trace.stalls).all()
    assert (trace.stalls[1:] > 0).any()
    assert trace.card.link_bytes_per_second == pytest.approx(1e9, rel=0.5)
    assert main(["simulate", str(tmp_path / "b"), "--slots", "6,12", "--json"]) == 0
    rows = last_line(capsys)["rows"]
    assert rows[0]["tpot_seconds"] > rows[-1]["tpot_seconds"] > 0


def test_text_is_recorded_without_a_server(tmp_path, capsys):
    arguments = ["--prompts", "2", "--prompt-tokens", "20", "--tokens", "6"]
    assert main(["trace", "run", str(TINY_MODEL), "-o", str(tmp_path), *arguments]) == 0
    assert last_line(capsys)["steps"] == 12
    trace = read_trace(tmp_path)
    assert trace.tokens.tolist() == [20, 1, 1, 1, 1, 1] * 2
    assert as_recorded(trace)
