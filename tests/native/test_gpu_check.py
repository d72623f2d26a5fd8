"""`make gpu-check`, rehearsed without a GPU: every step runs, says what it lacks, and is resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "gpu_check.py"
STEPS = ["machine", "build", "link", "gather", "plan", "tests", "sanitizer", "decode"]


def rehearse(out, *arguments):
    """What it prints, and the JSON of its last line."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu-check")
    return out, *rehearse(out)


def test_every_step_writes_its_json(rehearsed):
    out, _, result = rehearsed
    for name in STEPS:
        assert json.loads((out / f"{name}.json").read_text()) == result[name]
        assert result[name]["status"] in ("ok", "needs a GPU", "not here")
    assert result["machine"]["status"] == "ok"
    assert result["link"]["status"] == result["decode"]["status"] == "needs a GPU"


def test_the_table_names_every_step_and_variant(rehearsed):
    _, printed, result = rehearsed
    first_words = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert set(STEPS) <= set(first_words)
    assert all(row["variant"] in printed for row in result["decode"]["rows"])


def test_bounds_follow_from_the_missed_bytes(rehearsed):
    decode = rehearsed[2]["decode"]
    link, compute = decode["assumed"]["link_gbps"], decode["assumed"]["compute_ms"]
    on_demand = decode["rows"][1]
    shape = decode["shape"]
    record_mb = 3 * shape["hidden"] * shape["intermediate"] * shape["dtype_bytes"] / 1e6
    assert on_demand["missed_mb_per_token"] == round(shape["num_layers"] * shape["top_k"] * record_mb, 2)
    for row in decode["rows"]:
        assert row["bound_ms"] == pytest.approx(max(compute, row["missed_mb_per_token"] / link), rel=1e-2)
    missed = [row["missed_mb_per_token"] for row in decode["rows"]]
    assert missed[0] == 0 < missed[2] < missed[1], "a cache lies between all and nothing"


def test_the_trace_has_the_stated_locality(rehearsed):
    trace = rehearsed[2]["decode"]["trace"]
    assert trace["measured_recall"] == pytest.approx(trace["recall"], abs=0.05)
    assert trace["shared_with_previous_token"] > trace["repeat"]


def test_finished_steps_are_kept_and_failed_ones_repeated(rehearsed):
    out, _, before = rehearsed
    broken = {**before["link"], "status": "failed"}
    (out / "link.json").write_text(json.dumps(broken))
    printed, after = rehearse(out)
    assert "== machine: kept from" in printed
    assert "== link\n" in printed
    assert after["link"]["status"] == "needs a GPU"
    assert after["machine"] == before["machine"]


def test_one_step_can_be_asked_for(tmp_path):
    _, result = rehearse(tmp_path, "--only", "plan", "--json")
    assert set(result) == {"device", "quick", "plan"}
