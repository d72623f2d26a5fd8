"""What the studies of look-ahead and of serving compute around their measurements, on rows that are made up."""

import plan_accuracy
import serving
import soak
from engines import TINY_MODEL
from lookahead_replay import summary

from vllm_expert_prefetch.bench.client import conversations


def row(share, prefetch, concurrency, tokens, tpot, **more):
    known = {"share": share, "copy_compute": 1.0, "prefetch": prefetch}
    return {**known, "concurrency": concurrency, "output_tokens_per_s": tokens, "tpot_ms_p50": tpot, **more}


def test_curves_are_held_against_what_stood_beside_them():
    copied = {"absent_records": 100, "record_mb": 0.2, "link_gbps": 1.0}  # 20 ms for all of them
    rows = [
        row(0.5, serving.PLAIN, 1, 100.0, 10.0),
        row(0.5, "off", 1, 50.0, 20.0, **copied),
        row(0.5, "auto", 1, 80.0, 12.0, **copied),
        row(0.5, serving.PLAIN, 32, 800.0, 40.0),
        row(0.5, "off", 32, 480.0, 60.0, **copied),
        row(0.5, "auto", 32, 400.0, 75.0, **copied),
        row(0.25, serving.PLAIN, 1, 50.0, 20.0),
        row(0.25, "off", 1, 20.0, 50.0, **copied),
        row(0.25, "auto", 1, 10.0, 40.0, **copied),
    ]
    found = serving.summary(rows)
    assert [one["share_of_resident"] for one in rows] == [1, 0.5, 0.8, 1, 0.6, 0.5, 1, 0.4, 0.2]
    assert found == {"share_of_resident": 0.5, "worst_over_off": 1.25, "worst_over_full_copy": 1.25}
    in_a_hurry = serving.summary([row(0.5, serving.PLAIN, 1, 100.0, 10.0), row(0.5, "auto", 1, 80.0, 12.0, **copied)])
    assert in_a_hurry == {"share_of_resident": 0.8, "worst_over_off": None, "worst_over_full_copy": None}


def test_a_plan_is_held_against_what_was_measured_at_the_hit_rate_that_was_measured():
    record, missed = 3 * 128 * 64 * 2, 8 * 2 * 0.25  # of 16 experts that a token needs
    copying = missed * record / 0.1e9 * 1e3
    measured = {"copy_compute": 1.0, "slots": 8, "compute_ms": 4.0, "link_gbps": 0.1, "hit_rate": 0.75}
    measured |= {"bytes_per_token": missed * record, "tpot_ms": 4.0 + copying, "tpot_auto_ms": 4.0}
    found = plan_accuracy.compare(str(TINY_MODEL), measured)
    assert (found["bytes_error"], found["tpot_error"]) == (0, 0)
    assert found["bound_ms"] < found["planned_tpot_ms"]
    assert not found["tpot_in_range"], "nothing is as fast as computing alone"
    assert plan_accuracy.compare(str(TINY_MODEL), {**measured, "tpot_ms": 8.0})["tpot_error"] < -0.2


def test_conversations_are_of_spread_lengths_and_the_same_each_time():
    made = conversations(40, 4)
    assert made == conversations(40, 4)
    assert made != conversations(40, 5)
    lengths = [[len(text["value"].split()) for text in one["conversations"]] for one in made]
    assert all(4 <= prompt <= 90 and 4 <= answer <= 45 for prompt, answer in lengths)
    assert len({prompt for prompt, _ in lengths}) > 15


def test_the_soak_asks_for_every_kind_of_request():
    made = soak.requests(60)
    assert sum(one.is_aborted for one in made) == 10
    assert sum(one.body.get("n") == 2 for one in made) == 10
    assert sum("seed" in one.body for one in made) == 20
    starts = [one.body["prompt"][:400] for one in made]
    assert max(map(starts.count, starts)) == 10, "a prefix that is shared"
    assert max(len(one.body["prompt"]) for one in made) > 500


def test_the_replays_figures_are_the_worst_of_the_traces_and_the_spread_of_the_policies():
    rows = [
        {"recording": name, "share": 0.5, "record_time": 1.0, "depth": depth, "over_bound": over}
        for name, overs in (("tiny", (1.5, 1.6)), ("one", (1.4, 1.1)), ("two", (1.3, 1.2)))
        for depth, over in zip((0, 4), overs, strict=True)
    ]
    policies = [{"lru": 50.0, "lfu": 40.0, "lfru": 51.0, "ewma": 53.0}, {"lru": 60, "lfu": 61, "lfru": 60, "ewma": 60}]
    found = summary(rows, policies, {"one", "two"})
    assert found["over_bound"]["0.5, 1"] == 1.2
    assert found["over_bound"]["0.25, 1"] is None
    assert found["worse_than_off"] == 1
    assert found["policy_gain"] == {"lfu": [-10, -4.5, 1], "lfru": [0, 0.5, 1], "ewma": [0, 1.5, 3]}
