"""`make gpu-check`, rehearsed without a GPU: every step runs, says what it lacks, and is resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "gpu_check.py"
ENGINE_STEPS = ["exact", "side-50", "side-25"]
STEPS = [
    *("machine", "build", "link", "checkpoint", "gather", "plan", "tests", "decode", "fp8", "sanitizer"),
    *ENGINE_STEPS,
]
WITHOUT_ENGINES = ["--only", *(step for step in STEPS if step not in ENGINE_STEPS)]


def rehearse(out, *arguments):
    """What it prints, and the JSON of its last line."""
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu-check")
    return out, *rehearse(out, *WITHOUT_ENGINES)


@pytest.fixture(scope="module")
def served(rehearsed):
    """With the steps that start engines: two of the trained tiny model, and two of the random one."""
    return rehearse(rehearsed[0], "--only", *ENGINE_STEPS)


def test_every_step_writes_its_json(rehearsed):
    out, _, result = rehearsed
    for name in WITHOUT_ENGINES[1:]:
        assert json.loads((out / f"{name}.json").read_text()) == result[name]
        assert result[name]["status"] in ("ok", "needs a GPU", "not here")
    assert result["machine"]["status"] == "ok"
    assert result["link"]["status"] == result["decode"]["status"] == "needs a GPU"


def test_the_table_names_every_step_and_variant(rehearsed):
    _, printed, result = rehearsed
    first_words = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert set(WITHOUT_ENGINES[1:]) <= set(first_words)
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


def test_finished_steps_are_kept_and_failed_ones_repeated(rehearsed, tmp_path):
    _, _, before = rehearsed
    out = shutil.copytree(rehearsed[0], tmp_path / "again")
    broken = {**before["link"], "status": "failed"}
    (out / "link.json").write_text(json.dumps(broken))
    printed, after = rehearse(out, *WITHOUT_ENGINES)
    assert "== machine: kept from" in printed
    assert "== link\n" in printed
    assert after["link"]["status"] == "needs a GPU"
    assert after["machine"] == before["machine"]


def test_one_step_can_be_asked_for(tmp_path):
    _, result = rehearse(tmp_path, "--only", "plan", "--json")
    assert set(result) == {"device", "quick", "written", "plan"}


def test_a_step_that_would_end_too_late_is_left_for_the_next_call(tmp_path):
    printed, result = rehearse(tmp_path, "--only", "plan", "gather", "--minutes", "0.5")
    assert "== gather: for the next call" in printed
    assert "plan" in result
    assert "gather" not in result


def test_the_random_checkpoint_has_the_published_locality(rehearsed):
    """Qwen3-30B-A3B and its kind: 0.37 to 0.45 of a token's experts repeat, look-ahead finds 0.84 to 0.9."""
    made = rehearsed[2]["checkpoint"]
    routing, shape = made["routing"], made["shape"]
    assert routing["shared_with_previous_token"] == pytest.approx(0.41, abs=0.06)
    assert routing["recall_of_the_router_predictor"] == pytest.approx(0.87, abs=0.05)
    hits = list(routing["lru_hit_rate_by_residency"].values())
    assert hits == sorted(hits)
    experts = shape["num_layers"] * shape["num_experts"] * 3 * shape["hidden"] * shape["intermediate"] * 2
    assert experts < made["gb"] * 1e9 < 2 * experts


def test_fp8_weights_are_those_of_the_bfloat16_checkpoint(rehearsed):
    fp8 = rehearsed[2]["fp8"]
    assert 0 < fp8["largest_error"] < 2**-4, "three bits of mantissa"
    assert fp8["gb"] < 0.75 * fp8["bfloat16_gb"], "embeddings and norms stay as they are"


@pytest.mark.engine
def test_the_trained_model_gives_the_tokens_of_plain_vllm(served):
    rows = served[1]["exact"]["rows"]
    assert [row["batch"] for row in rows] == [1, 3, 4], "3 is a graph's padded size on a GPU"
    assert all(row["bit_equal"] and row["compared_tokens"] >= 64 for row in rows)


@pytest.mark.engine
def test_engines_side_by_side_give_the_same_tokens(served):
    side = served[1]["side-50"]
    assert side["at_once"] == [["all resident", "cache + look-ahead"]]
    for engine in side["engines"].values():
        assert engine["tokens_of_the_cycle"] == 1, "greedy decoding walks the cycle"
        assert engine["largest_logprob_deviation"] == 0
    resident, ahead = side["rows"]
    assert ahead["differing_tokens"] == 0
    assert resident["bound_ms"] == resident["tpot_ms"] == ahead["resident_ms"]
    assert side["link"] == "emulated"


@pytest.mark.engine
def test_the_engine_counts_the_locality_that_the_checkpoint_states(served):
    side = served[1]["side-50"]
    routing, row = side["routing"], side["rows"][1]
    assert side["engines"][row["variant"]]["info"]["prefetch"] == "auto: router"
    # Look-ahead only adds hits.
    assert row["hit_rate"] + row["late_rate"] > routing["lru_hit_rate_by_residency"]["0.5"] - 0.06
    assert row["recall"] == pytest.approx(routing["recall_of_the_router_predictor"], abs=0.12)
    assert row["missed_mb_per_token"] > 0


@pytest.mark.engine
def test_the_report_lists_every_number_to_reach(served, rehearsed):
    printed, result = served
    assert "met          tokens exact" in printed
    assert "not measured gather over memcpy's peak" in printed
    page = (rehearsed[0] / "report.md").read_text()
    assert page.count("| cache + look-ahead |") == 1
    assert "consecutive tokens share" in page
    assert [name for name in result["written"] if name.endswith(".png")] == [
        "tpot-by-batch.png",
        "tpot-by-residency.png",
    ]
