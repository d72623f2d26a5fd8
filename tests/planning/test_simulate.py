"""What `simulate` says of a trace: figures of the planner that serves, and those that are known of recorded routing."""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.cli.simulate_table import describe_more
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.replay import Replay, Setting
from vllm_expert_prefetch.planning.simulate import (
    Sums,
    belady,
    look_ahead,
    simulate_all,
    simulate_layer,
    slots_of_share,
    tpot,
)
from vllm_expert_prefetch.planning.sweep import Sweep
from vllm_expert_prefetch.residency import POLICIES, ExpertCache
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.imports import read_csv
from vllm_expert_prefetch.tracing.trace import trace_of_steps, write_trace

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

EXPERTS, LAYERS = 16, 4
CARD = TraceCard("tiny", (*"0123",), (EXPERTS,) * LAYERS, (2,) * LAYERS, (10, 10, 20, 20), (6,) * LAYERS, "lru")


def made_trace(num_steps=60, seed=1):
    """Prompts of twelve tokens, each followed by steps of one to three sequences that prefer some experts."""
    rng = random.Random(seed)
    steps, prompts = [], []
    for step in range(num_steps):
        prompts.append(step % 20 == 0)
        tokens = 12 if prompts[-1] else rng.randint(1, 3)
        likely = EXPERTS if prompts[-1] or rng.random() < 0.2 else 8
        steps.append([[rng.sample(range(likely), 2) for _ in range(tokens)] for _ in range(LAYERS)])
    trace = trace_of_steps(CARD, steps)
    prefilling = np.array(prompts, dtype=np.int32)
    return steps, replace(trace, prefilling=prefilling, decoding=np.where(prefilling, 0, trace.tokens))


STEPS, TRACE = made_trace()
CLOCK = Clock((1.0, 1.0, 2.0, 2.0), np.linspace(0.5, 1.5, len(TRACE)))


@pytest.mark.parametrize("policy", POLICIES)
def test_it_counts_what_the_specification_counts(policy):
    expected = Sums()
    for layer in range(LAYERS):
        cache = ExpertCache(EXPERTS, 6, POLICIES[policy])
        for number, step in enumerate(STEPS):
            plan = cache.plan([expert for token in step[layer] for expert in token])
            decodes = number % 20 != 0
            stall = len(plan.loads) * CLOCK.record[layer]
            expected += Sums(
                *(len(plan.rows), plan.num_hits, len(plan.loads), plan.num_evictions),
                len(plan.loads) * CARD.record_bytes[layer],
                *(decodes * len(plan.rows), decodes * plan.num_hits, stall),
                stall * int(TRACE.decoding[number]),
            )
    assert simulate_all(TRACE, Setting((6,) * LAYERS, policy), CLOCK) == expected


@pytest.mark.parametrize("areas", [1, 2])
def test_a_layer_alone_and_all_layers_against_the_clock_agree(areas):
    setting = Setting((6,) * LAYERS, "ewma", 0, areas)
    alone = simulate_all(TRACE, setting, CLOCK)
    together = look_ahead(TRACE, setting, CLOCK, None)
    assert together == replace(alone, stall=pytest.approx(alone.stall), token_stall=pytest.approx(alone.token_stall))


def test_two_areas_hide_what_wide_steps_bring():
    one, two = (simulate_all(TRACE, Setting((6,) * LAYERS, "lru", 0, areas), CLOCK) for areas in (1, 2))
    assert two.stall < one.stall
    assert two.token_stall == one.token_stall, "decode steps are narrow here"


def test_time_per_token_is_that_of_steps_weighed_by_their_sequences():
    replay = Replay(TRACE, Setting((6,) * LAYERS, "lru"), CLOCK)
    weighed = 0.0
    for step in range(len(TRACE)):
        before = replay.time
        replay.run([step])
        weighed += (replay.time - before) * TRACE.decoding[step]
    sums = simulate_all(TRACE, Setting((6,) * LAYERS, "lru"), CLOCK)
    assert tpot(TRACE, CLOCK, sums) == pytest.approx(weighed / TRACE.decoding.sum())


def test_look_ahead_lies_between_none_and_guesses_that_are_always_right():
    off, ahead, oracle = (
        look_ahead(TRACE, Setting((6,) * LAYERS, "ewma", depth), CLOCK, recall)
        for depth, recall in ((0, None), (2, (0.8, 0.6)), (2, None))
    )
    assert oracle.token_stall < ahead.token_stall < off.token_stall
    assert oracle.hits > off.hits
    assert ahead.num_bytes > oracle.num_bytes


def test_belady_is_above_every_policy_and_a_slot_for_each_misses_once():
    for policy in POLICIES:
        sums = simulate_all(TRACE, Setting((6,) * LAYERS, policy))
        best = sum((belady(TRACE, layer, 6) for layer in range(LAYERS)), Sums())
        assert best.decode_lookups == sums.decode_lookups
        assert best.decode_hits > sums.decode_hits
    full = simulate_layer(TRACE, 0, Setting((EXPERTS,) * LAYERS, "lru"), None)
    assert (full.misses, full.evictions) == (EXPERTS, 0)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_do_not_depend_on_how_many_work_on_them(num_processes):
    shown = []
    settings = [Setting((slots,) * LAYERS, "lru", depth) for slots in (4, 6) for depth in (0, 1)]
    rows = Sweep(TRACE, CLOCK, (0.8,)).run(settings, True, num_processes, lambda *counts: shown.append(counts))
    assert [(row["slots"], row["depth"]) for row in rows] == [(4, 0), (4, 1), (6, 0), (6, 1)]
    sums = simulate_all(TRACE, settings[2], CLOCK)
    assert (rows[2]["hits"], rows[2]["bytes"], rows[2]["as_recorded"]) == (sums.hits, sums.num_bytes, True)
    assert rows[2]["cache_gb"] == 6 * 60 / 1e9
    assert rows[2]["tpot_seconds"] == tpot(TRACE, CLOCK, sums)
    assert rows[3]["oracle_tpot_seconds"] <= rows[3]["tpot_seconds"] < rows[2]["tpot_seconds"]
    assert shown == [(done + 1, 20) for done in range(20)]


@pytest.fixture
def path(tmp_path):
    timed = replace(TRACE, seconds=np.full(len(TRACE), 0.02, dtype=np.float32))
    write_trace(tmp_path / "t.safetensors", replace(timed, card=replace(CARD, link_bytes_per_second=1e5)))
    return tmp_path / "t.safetensors"


def report(capsys, *arguments):
    assert main(["simulate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_takes_capacities_policies_and_depths(path, capsys):
    found = report(capsys, path, "--slots", "4,6", "--policies", "lru,ewma", "--depths", "0,1")
    keys = [(row["slots"], row["policy"], row["depth"]) for row in found["rows"]]
    assert keys == [(slots, name, depth) for slots in (4, 6) for name in ("lru", "ewma") for depth in (0, 1)]
    assert (found["steps"], found["decode_steps"], found["replayed_as_recorded"]) == (60, 57, None)
    assert [row["as_recorded"] for row in found["rows"]] == [False] * 4 + [True] * 2 + [False] * 2
    default = report(capsys, path, "--policies", "lru", "--no-bounds")
    assert [row["slots"] for row in default["rows"]] == [2, 4, 6, 8, 12]
    assert {row["belady_decode_hit_rate"] for row in default["rows"]} == {None}
    shares = report(capsys, path, "--shares", "25%,0.5", "--steps", "10")
    assert {row["slots"] for row in shares["rows"]} == {4, 8}
    assert shares["steps"] == 10


def test_the_times_are_those_of_the_recording_unless_they_are_given(path, capsys):
    recorded, faster, slower = (
        report(capsys, path, "--slots", "6", "--policies", "lru", *given)["rows"][0]
        for given in ((), ("--link-gbps", "1"), ("--layer-us", "9000"))
    )
    assert recorded["tpot_seconds"] > 0.0201
    assert faster["tpot_seconds"] == pytest.approx(0.02, rel=1e-3)
    assert slower["tpot_seconds"] - recorded["tpot_seconds"] == pytest.approx(4 * 0.009 - 0.02)


def test_more_gb_are_so_many_slots_more_in_every_layer(path, capsys):
    """A slot more is 60 bytes less an overflow row of 20."""
    more = report(capsys, path, "--policies", "lru,ewma", "--more-gb", 85e-9)["more_gb"]
    assert (more["row"]["slots"], more["more"]["slots"], more["row"]["policy"]) == (6, 8, "lru")
    assert more["more"]["decode_hit_rate"] > more["row"]["decode_hit_rate"]
    text = describe_more(more)
    assert text.startswith("8.5e-08 GB more: 8 slots in place of 6")
    assert "TPOT" in text


def test_it_prints_a_table_and_draws_a_picture(path, tmp_path, capsys):
    picture = tmp_path / "p.png"
    assert main(["simulate", str(path), "--depths", "0,1", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "Belady" in printed
    assert "oracle" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "fifo"], "no policy fifo"),
        (["--slots", "1"], r"--slots: 1, and a layer takes 2 \(top-k\) to 16"),
        (["--slots", "17"], "--slots: 17"),
        (["--depths", "5"], "--depths: 4 layers at most"),
        (["--areas", "3"], "--areas: 1 or 2"),
        (["--depths", "2", "--recall", "0.9"], "--recall has 1 numbers"),
        (["--more-gb", "1e-9"], "is no slot more"),
    ],
)
def test_what_cannot_be_replayed_is_said_with_its_flag(path, capsys, arguments, message):
    assert main(["simulate", str(path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--slots", "x"], ["--shares", "2"], ["--link-gbps", "0"], ["--steps", "0"]])
def test_what_is_no_number_is_said_with_its_flag(path, capsys, arguments):
    with pytest.raises(SystemExit):
        main(["simulate", str(path), *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_look_ahead_needs_times(tmp_path, capsys):
    write_trace(tmp_path / "t.safetensors", TRACE)
    assert main(["simulate", str(tmp_path / "t.safetensors"), "--depths", "1"]) == 2
    assert "give --link-gbps and --layer-us" in capsys.readouterr().err


TRACES = Path(os.environ.get("EXPERT_PREFETCH_ROUTES", "/nowhere"))
RECORDED = {
    "qwen3-30b-a3b": {
        0.125: (61.1, 64.1, 75.8),
        0.25: (81.7, 83.2, 91.2),
        0.4: (92.9, 93.3, 96.4),
        0.5: (95.8, 95.9, 96.9),
    },
    "gpt-oss-120b": {
        0.125: (65.7, 66.6, 79.8),
        0.25: (80.3, 79.8, 88.3),
        0.4: (86.6, 86.7, 89.1),
        0.5: (88.6, 88.5, 89.1),
    },
}
"""Share of slots: decode hits in per cent with lru, with lfru, and with Belady per layer."""


@pytest.mark.skipif(not TRACES.is_dir(), reason="EXPERT_PREFETCH_ROUTES names no folder with recorded routing")
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_routing_of_large_models_gives_the_figures_that_are_known(name):
    trace = read_csv(TRACES / f"{name}.route.csv", by_token=True)
    for share, expected in RECORDED[name].items():
        slots = slots_of_share(trace, share)
        sums = [simulate_all(trace, Setting(slots, policy)) for policy in ("lru", "lfru")]
        sums.append(sum((belady(trace, layer, num) for layer, num in enumerate(slots)), Sums()))
        assert [100 * own.decode_hit_rate for own in sums] == pytest.approx(expected, abs=0.2)


@pytest.mark.skipif(not TRACES.is_dir(), reason="EXPERT_PREFETCH_ROUTES names no folder with recorded routing")
def test_the_published_curve_of_another_simulator():
    """Helldez/BigMoeOnEdge, docs/bench-data/2026-07-15-route-trace: lru per layer, Qwen3-30B-A3B."""
    trace = read_csv(TRACES / "qwen3-30b-a3b.route.csv", by_token=True)
    for mib, published in ((1500, 50.5), (3000, 71.1), (6000, 90.3)):
        each = int(mib * 2**20 / sum(trace.card.record_bytes))
        sums = simulate_all(trace, Setting((each,) * trace.card.num_layers, "lru"))
        assert 100 * sums.decode_hit_rate == pytest.approx(published, abs=1.2)
