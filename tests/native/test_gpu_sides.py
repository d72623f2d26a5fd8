"""Who is compared with whom on a GPU, on whose terms, and what is made of the numbers."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def serving_plan():
    from shapes import ServingPlan

    return ServingPlan.of(on_gpu=True, quick=False)


def at(residency):
    from variants import variants

    return {variant.name: variant for variant in variants(serving_plan().shape, residency, {})}


@pytest.mark.parametrize("residency", [0.125, 0.25, 0.5, 0.75])
def test_the_offloaders_keep_at_least_the_plugins_bytes_on_the_gpu(residency):
    found, shape = at(residency), serving_plan().shape
    layer_bytes = shape.num_experts * shape.record_bytes
    room = found["cache only"].accelerator_bytes
    assert room == found["cache + look-ahead"].accelerator_bytes
    offloaded = found["vLLM UVA"].extra["cpu_offload_gb"] * 2**30
    assert shape.num_layers * layer_bytes - offloaded >= room
    extra = found["vLLM prefetch"].extra
    per_group = extra["offload_num_in_group"] / extra["offload_group_size"]
    kept = shape.num_layers * (1 - per_group) + extra["offload_prefetch_step"]
    assert room <= kept * layer_bytes < room + layer_bytes
    assert found["vLLM prefetch"].moved_bytes == pytest.approx(shape.num_layers * per_group * layer_bytes)


def test_the_configurations_say_what_their_names_say():
    found = at(0.5)
    assert found["cache only"].config["prefetch"] == "off"
    assert found["cache + look-ahead"].config["prefetch"] == "auto"
    assert found["on demand"].config["slots_per_layer"] == serving_plan().shape.top_k
    assert set(at(0.25)) == set(found) - {"on demand", "speculative"}
    assert set(at(1.0)) == {"all resident", "plugin, all resident"}


def test_engines_that_do_not_fit_at_once_form_groups_with_the_control_in_each():
    from variants import groups

    found = list(at(0.5).values())
    fitting = groups(found, 130e9, 116e9, 5e9)
    assert [len(group) for group in fitting] == [len(found)]
    apart = groups(found, 130e9, 40e9, 5e9)
    assert len(apart) > 1
    assert {group[0].name for group in apart} == {"all resident"}
    assert [variant for group in apart for variant in group[1:]] == found[1:]


def row(variant, tpot_ms, batch=1, resident_ms=2.0, missed_mb=0.0, link_gbps=50.0):
    bound = max(resident_ms, missed_mb * batch / link_gbps)
    named = {"variant": variant, "batch": batch, "tpot_ms": tpot_ms, "resident_ms": resident_ms}
    return {**named, "bound_ms": bound, "missed_mb_per_token": missed_mb, "differing_tokens": 0}


def judged(rows, looks="auto: router"):
    from goals import goals

    engines = {"cache + look-ahead": {"info": {"prefetch": looks}}}
    found = goals({"side-50": {"rows": rows, "link_gbps": 50.0, "engines": engines}})
    return {goal["goal"].split(":")[0]: goal for goal in found}


def test_numbers_to_reach_are_met_missed_or_not_measured():
    rows = [row("cache only", 4.0, missed_mb=100.0), row("cache + look-ahead", 3.0, missed_mb=100.0)]
    rows += [row("vLLM UVA", 20.0), row("vLLM prefetch", 9.0)]
    found = judged(rows)
    gain = found["look-ahead's gain on the same cache where copies take 0.5 to 2 x computation"]
    assert (gain["measured"], gain["met"]) == (0.25, True)
    assert found["vLLM UVA's TPOT over ours, 50 %, batch 1"]["met"] is True
    assert found["vLLM prefetch's TPOT over ours, 50 %, batch 1"]["met"] is False
    bound = found["TPOT over its bound, batch 1 to 8, every residency"]
    assert (bound["measured"], bound["met"]) == (1.5, False)
    assert found["all resident"]["met"] is None
    assert found["tokens exact"]["met"] is None


def test_an_engine_that_looks_nowhere_says_nothing_of_look_ahead():
    found = judged([row("cache only", 4.0, missed_mb=100.0), row("cache + look-ahead", 3.0)], looks="off on a GPU")
    assert found["look-ahead's TPOT over the same cache's, anywhere"]["met"] is None


def test_copies_far_from_the_computation_do_not_count_for_the_gain():
    found = judged([row("cache only", 9.0, missed_mb=450.0), row("cache + look-ahead", 9.0, missed_mb=450.0)])
    assert found["look-ahead's gain on the same cache where copies take 0.5 to 2 x computation"]["met"] is None
    assert found["look-ahead's TPOT over the same cache's, anywhere"]["met"] is True
