"""A recording of vLLM itself, started and stopped while it serves: replayed, it counts what the server counted."""

import json
import os
from unittest.mock import Mock

import pytest
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts

from vllm_expert_prefetch.cache.base import by_hotness
from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.planning.simulate import as_recorded
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.tracing.profile import profile_of, read_profile
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
        assert main(["trace", "stop", *server, "--write-profile", str(tmp_path / "hot.json")]) == 0
        stopped = last_line(capsys)
        grown = {name: count - before[name] for name, count in live(llm).items()}
        assert main(["trace", "start", str(tmp_path / "c"), *server]) == 0
        greedy(llm, prompts(1), num_tokens=5)
    assert len(read_trace(tmp_path / "c")) == 5, "written when the engine ended"
    trace = read_trace(tmp_path / "b")
    assert (len(trace), stopped["steps"], stopped["dropped_steps"]) == (8, 8, 0)
    assert read_profile(tmp_path / "hot.json", str(TINY_MODEL)) == profile_of(trace)
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
    arguments += ["--write-profile", str(tmp_path / "hot.json")]
    assert main(["trace", "run", str(TINY_MODEL), "-o", str(tmp_path), *arguments]) == 0
    assert last_line(capsys)["steps"] == 12
    trace = read_trace(tmp_path)
    assert read_profile(tmp_path / "hot.json", str(TINY_MODEL)) == profile_of(trace)
    assert trace.tokens.tolist() == [20, 1, 1, 1, 1, 1] * 2
    assert as_recorded(trace)


def test_what_a_profile_gave_is_said_after_a_hundred_tokens(tmp_path, monkeypatch):
    config = {"cache_fraction": 0.4, "prefetch": "off", "emulated_link_gbps": 1}
    with open_engine(TINY_MODEL, config | {"trace": str(tmp_path / "a")}) as llm:
        plain = greedy(llm, prompts(4), num_tokens=26)
        cold = live(llm)["misses"]
    profile = tmp_path / "hot.json"
    flags = ["--slots", "6", "--policies", "ewma", "--no-bounds", "--json", "--write-profile", str(profile)]
    assert main(["simulate", str(tmp_path / "a"), *flags]) == 0
    log = Mock()
    monkeypatch.setattr(compat, "logger", lambda: log)
    with open_engine(TINY_MODEL, config | {"profile": str(profile)}) as llm:
        assert all(layer.warm_start is not None for layer in layers(llm))
        assert greedy(llm, prompts(4), num_tokens=26) == plain
        warm = live(llm)["misses"]
        assert all(layer.warm_start is None for layer in layers(llm)), "off is one comparison"
        greedy(llm, prompts(4), num_tokens=30)
    lines = [call.args[0] % call.args[1:] for call in log.info.call_args_list]
    (said,) = [line for line in lines if "over the first" in line]
    assert warm < cold
    assert f"over the first 100 tokens the profile gave {warm:.0f} misses instead of {cold:.0f} (a cold start)" in said
    assert said.endswith("ms of link less")


def hottest(llm):
    """The experts of each layer that have a slot, the hottest last."""
    return [by_hotness(cache.state)[-cache.num_slots :] for cache in caches(llm)]


def test_the_experts_that_were_there_at_the_end_are_there_at_the_next_start(tmp_path):
    config, profile = {"cache_fraction": 0.5, "prefetch": "off"}, tmp_path / "hot.json"
    with open_engine(TINY_MODEL, config | {"write_profile": str(profile), "profile": str(profile)}) as llm:
        greedy(llm, prompts(4), num_tokens=20)
        left = hottest(llm)
        assert all(cache.num_resident == cache.num_slots for cache in caches(llm))
        assert not profile.exists()
    with open_engine(TINY_MODEL, config) as llm:
        assert {cache.num_resident for cache in caches(llm)} == {0}
        assert hottest(llm) != left
    with open_engine(TINY_MODEL, config | {"profile": str(profile)}) as llm:
        assert all(cache.num_resident == cache.num_slots for cache in caches(llm))
        assert hottest(llm) == left


def test_the_requests_of_a_batch_are_those_that_were_alone(tmp_path, capsys):
    server, lengths = ["--server", str(os.getpid())], (5, 24, 11)
    asked = [{"prompt_token_ids": [3 + 7 * own + n for n in range(60 - 25 * own)]} for own in range(3)]

    def record(llm, name, numbers, *flags):
        from vllm import SamplingParams

        assert main(["trace", "start", str(tmp_path / name), *server, *flags]) == 0
        sampling = [SamplingParams(temperature=0, max_tokens=lengths[own], ignore_eos=True) for own in numbers]
        llm.generate([asked[own] for own in numbers], sampling, use_tqdm=False)
        assert main(["trace", "stop", *server]) == 0
        return read_trace(tmp_path / name)

    config = {"cache_fraction": 0.4, "prefetch": "off"}
    with open_engine(TINY_MODEL, config, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        together = record(llm, "together", (0, 1, 2))
        alone = [record(llm, f"alone{own}", (own,), "--weights") for own in range(3)]
    assert len(together) > max(lengths), "prompts come in parts, beside what decodes"
    assert ((together.prefilling > 0) & (together.decoding > 0)).any()
    assert together.requests.min() == 0
    assert together.requests.max() == 2
    assert together.weights == ()
    for own, trace in enumerate(alone):
        assert (trace.requests == 0).all()
        assert all(((weights > 0) & (weights <= 1)).all() for weights in trace.weights)
        is_mine = together.requests == own
        assert is_mine.sum() == len(trace.requests)
        same = [(together.routed(layer)[is_mine] == trace.routed(layer)).mean() for layer in range(8)]
        assert min(same) > 0.97, "another batch rounds otherwise, now and then"
