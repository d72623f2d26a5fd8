"""What makes the soak fail."""

import pytest
import soak

FINE = {
    "requests": 100,
    "differing": 1,
    "errors": 0,
    "memory_growth_mb": 150.0,
    "descriptor_growth": -2,
    "exit_code": 0,
    "left_over": 0,
    "control_differing": 1,
    "control_memory_growth_mb": 100.0,
    "control_descriptor_growth": -5,
}


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("differing", 2),
        ("errors", 1),
        ("memory_growth_mb", 165.0),
        ("descriptor_growth", 1),
        ("exit_code", 1),
        ("exit_code", -9),
        ("left_over", 1),
    ],
)
def test_each_of_its_figures_makes_the_soak_fail(figure, value):
    assert soak.faults(FINE) == []
    assert soak.faults(FINE | {figure: value}) == [figure]


def test_what_plain_vllm_does_as_well_is_no_fault_of_the_plugin():
    assert soak.faults(FINE | {"descriptor_growth": 3, "control_descriptor_growth": 3}) == []
    assert soak.faults(FINE | {"memory_growth_mb": 65.0, "control_memory_growth_mb": -40.0}) == ["memory_growth_mb"]
    assert soak.faults(FINE | {"memory_growth_mb": 64.0, "control_memory_growth_mb": -40.0}) == []


def test_a_server_that_was_killed_is_not_hidden_by_one_that_ended_well(monkeypatch):
    reported = []
    monkeypatch.setattr(soak, "soak", lambda size, options: FINE | {"exit_code": -9 if size == 1 else 0})
    monkeypatch.setattr(soak, "finish", lambda name, result, options: reported.append(result))
    monkeypatch.setattr("sys.argv", ["soak.py"])
    assert soak.main() == 1
    assert (reported[0]["exit_code"], reported[0]["faults"]) == (-9, ["exit_code"])
