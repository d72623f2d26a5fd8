"""The rule file: what Prometheus' own tools say of it, and when each alert fires."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from monitoring.rules import ALERTS, RECORDINGS, RUNBOOK, Alert, rule_groups
from monitoring.series import is_declared, series_in
from observatory import alert_rules

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
SERVER = 'job="vllm-expert-prefetch", instance="a:8000"'
RANK = f'{SERVER}, model_name="m", engine="0", rank="0"'
P = "vllm_expert_prefetch_"

HEALTHY = {
    f"up{{{SERVER}}}": "1x40",
    f'{P}lookups_total{{outcome="hit", {RANK}}}': "0+900x40",
    f'{P}lookups_total{{outcome="miss", {RANK}}}': "0+100x40",
    f'{P}transfer_bytes_total{{kind="demand", {RANK}}}': "0+1000000x40",
    f"{P}transfer_seconds_total{{{RANK}}}": "0+1x40",
    f"{P}stall_seconds_total{{{RANK}}}": "0+1x40",
    f'{P}step_seconds_sum{{phase="decode", {RANK}}}': "0+50x40",
    f"{P}tpot_seconds_sum{{{RANK}}}": "0+50x40",
    f"{P}tpot_seconds_count{{{RANK}}}": "0+5000x40",
    f'{P}tpot_seconds_bucket{{le="0.01", {RANK}}}': "0+4000x40",
    f'{P}tpot_seconds_bucket{{le="+Inf", {RANK}}}': "0+5000x40",
    f"{P}slots{{{RANK}}}": "64x40",
    f"{P}lookahead_enabled{{{RANK}}}": "0x40",
    f"{P}experts{{{RANK}}}": "128x40",
    f"{P}planned_hit_ratio{{{RANK}}}": "0.8x40",
    f"{P}link_bytes_per_second{{{RANK}}}": "1000000x40",
    f'{P}info{{platform="cuda", pinned="true", prefetch="off: nothing to hide", {RANK}}}': "1x40",
}
INFO = f'{P}info{{platform="cuda", pinned="true", prefetch="off: nothing to hide", {RANK}}}'
HIT = f'{P}lookups_total{{outcome="hit", {RANK}}}'
STALL = f"{P}stall_seconds_total{{{RANK}}}"
COPYING = f"{P}transfer_seconds_total{{{RANK}}}"
PREFETCH_ON = f'{P}info{{platform="cuda", pinned="true", prefetch="on: router", {RANK}}}'

SICK = {
    "ExpertPrefetchNotActive": ({key: None for key in HEALTHY if not key.startswith("up")}, {}),
    "ExpertPrefetchNothingOffloaded": ({f"{P}slots{{{RANK}}}": "128x40"}, {}),
    "ExpertPrefetchHitRatioLow": ({HIT: "0+200x40"}, {}),
    "ExpertPrefetchStallsHigh/link_slow": (
        {STALL: "0+30x40", COPYING: "0+30x40"},
        {"ExpertPrefetchLinkSlow": ""},
    ),
    "ExpertPrefetchStallsHigh/cache_too_small": (
        {STALL: "0+30x40", HIT: "0+200x40"},
        {"ExpertPrefetchHitRatioLow": ""},
    ),
    "ExpertPrefetchStallsHigh/prefetch_off": ({STALL: "0+30x40"}, {}),
    "ExpertPrefetchLinkSlow": ({STALL: "0+5x40", COPYING: "0+5x40"}, {}),
    "ExpertPrefetchPrecisionLow": (
        {
            INFO: None,
            PREFETCH_ON: "1x40",
            f'{P}predictions_total{{outcome="used", {RANK}}}': "0+10x40",
            f'{P}predictions_total{{outcome="unused", {RANK}}}': "0+90x40",
        },
        {},
    ),
}
"""What to change of HEALTHY for each alert (None: the series is not there), and what else fires then."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool in PATH: apt-get install prometheus"
)


def key_of(alert: dict) -> str:
    cause = alert["labels"].get("cause")
    return alert["alert"] + (f"/{cause}" if cause else "")


def promtool_test(tmp_path, changes, firing, minute=39):
    """What promtool says of the claim that exactly `firing` fire at `minute`."""
    series = {key: value for key, value in {**HEALTHY, **changes}.items() if value is not None}
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": key, "values": values} for key, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname, cause) (ALERTS{alertstate="firing"})',
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": labels, "value": 1} for labels in map(labels_of, sorted(firing))],
                    }
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    return subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=60)


def labels_of(key):
    name, _, cause = key.partition("/")
    return f'{{alertname="{name}", cause="{cause}"}}' if cause else f'{{alertname="{name}"}}'


@needs_promtool
def test_promtool_accepts_the_rules():
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_promtool
def test_promtool_accepts_the_configuration():
    config = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_promtool
def test_a_healthy_server_fires_nothing(tmp_path):
    done = promtool_test(tmp_path, {}, set())
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_an_idle_server_fires_nothing(tmp_path):
    idle = {key: re.sub(r"0\+\d+x", "7x", value) for key, value in HEALTHY.items()}
    done = promtool_test(tmp_path, idle, set())
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", alert_rules(), ids=key_of)
def test_each_alert_fires_on_what_it_is_for_and_says_which_cause(tmp_path, alert):
    changes, others = SICK[key_of(alert)]
    done = promtool_test(tmp_path, changes, {key_of(alert), *others})
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize(("enabled", "cause"), [(0, "prefetch_off"), (1, "cache_too_small")])
def test_stalls_with_as_many_hits_as_planned_have_another_cause_where_prefetching_is_on(tmp_path, enabled, cause):
    changes = {STALL: "0+30x40", f"{P}lookahead_enabled{{{RANK}}}": f"{enabled}x40"}
    done = promtool_test(tmp_path, changes, {f"ExpertPrefetchStallsHigh/{cause}"})
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("alert", alert_rules(), ids=key_of)
def test_each_alert_waits_before_it_fires(tmp_path, alert):
    changes, _ = SICK[key_of(alert)]
    done = promtool_test(tmp_path, changes, set(), minute=2)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_test_of_alerts_can_fail(tmp_path):
    assert promtool_test(tmp_path, {}, {"ExpertPrefetchLinkSlow"}).returncode != 0
    changes, _ = SICK["ExpertPrefetchNothingOffloaded"]
    assert promtool_test(tmp_path, changes, set()).returncode != 0


def test_every_alert_has_a_case_here():
    assert SICK.keys() == {key_of(alert.as_rule()) for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: key_of(alert.as_rule()))
def test_every_alert_has_a_runbook(alert: Alert):
    text = (ROOT / RUNBOOK).read_text()
    section = re.search(rf"^### {alert.name}\n(?P<body>.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"{RUNBOOK} has no section {alert.name}"
    assert len(section["body"]) > 200, "a runbook says how to look and what to do"
    assert alert.as_rule()["annotations"]["runbook_url"].endswith(f"#{alert.name.lower()}")
    cause = alert.labels.get("cause")
    assert cause is None or f"`{cause}`" in section["body"]


def test_alerts_read_recorded_series_or_declared_ones():
    recorded = {rule["record"] for rule in rule_groups()[0]["rules"]}
    for alert in alert_rules():
        names = series_in(alert["expr"])
        assert {name for name in names if name.startswith("expert_prefetch:")} <= recorded


def test_what_reads_a_series_that_does_not_exist_is_left_out():
    shipped = RULES.read_text()
    for rule in RECORDINGS:
        assert (f"record: {rule.record}\n" in shipped) == is_declared(rule.expression)
    assert not is_declared("rate(vllm_expert_prefetch_no_such_series_total[5m])")
    assert is_declared("vllm_expert_prefetch_tpot_seconds_bucket + vllm:anything")
    assert not is_declared("vllm_expert_prefetch_tpot_seconds")
