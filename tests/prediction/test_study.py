"""How the look-ahead study sums up what it measured."""

import pytest
from lookahead import summary


def row(variant, tpot_ratio, model="tiny", batch=1, copy_compute=1.0, **more):
    where = {"model": model, "batch": batch, "residency": 0.5, "copy_compute": copy_compute}
    return {
        **where,
        "variant": variant,
        "tpot_ms": 10 * tpot_ratio,
        "tpot_ratio": tpot_ratio,
        "gain": 1 - tpot_ratio,
        "bound_ms": 5.0,
        "stall_ms": 10 * tpot_ratio - 4,
        "demand_mb": 2.0,
        "prefetch_mb": 0.0 if variant == "off" else 1.0,
        **more,
    }


def cell(router, oracle, auto, **where):
    return [
        row("off", 1.0, **where),
        row("router", router, **where, recall=0.8, recall_fetched=0.9),
        row("previous", 1.1, **where),
        row("oracle", oracle, **where),
        row("auto", auto, **where),
        row("speculative, as published", 0.1, **where),
    ]


def test_the_best_is_exact_and_knows_nothing_of_the_future_and_the_lowest_gain_counts():
    rows = [*cell(0.8, 0.6, 0.9), *cell(0.7, 0.65, 0.75, batch=4), {"variant": "replayed", "model": "tiny"}]
    found = summary(rows)
    assert found["tpot_gain_best"] == pytest.approx(0.2)
    assert found["oracle_share"] == pytest.approx(0.5)
    assert [(own["batch"], own["best"]) for own in found["gains"]] == [(1, "router"), (4, "router")]
    assert found["recall"] == {"tiny": {"router": [0.8, 0.9]}}


def test_depths_are_compared_at_one_request_where_a_record_takes_a_layer_and_more():
    rows = [*cell(0.8, 0.6, 0.9), *cell(0.7, 0.65, 0.75, batch=4), *cell(0.7, 0.6, 0.9, copy_compute=0.25)]
    rows.append(row("router, 4 layers", 0.7))
    found = {own["variant"]: own for own in summary(rows)["depths"]}
    assert list(found) == ["router", "previous", "oracle", "auto", "router, 4 layers"]
    numbers = {"hidden": 0.5, "over_bound": 1.4, "bytes_over_off": 1.5}
    assert found["router, 4 layers"] == {
        "model": "tiny",
        "residency": 0.5,
        "copy_compute": 1.0,
        "variant": "router, 4 layers",
        **numbers,
    }


def test_auto_is_judged_where_nothing_can_be_gained():
    rows = [*cell(0.8, 0.6, 1.5), *(row("auto", ratio, copy_compute=c) for ratio, c in ((1.01, 0.02), (0.99, 20.0)))]
    assert summary(rows)["auto_worst_ratio"] == 1.01
    assert summary(cell(0.8, 0.6, 1.5))["auto_worst_ratio"] is None
