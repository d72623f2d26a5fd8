"""What doctor finds on this host."""

from counter_files import INFO, labels

from vllm_expert_prefetch.cli import doctor
from vllm_expert_prefetch.metrics.counters import SUFFIX, Counters
from vllm_expert_prefetch.metrics.runtime_dir import ENVIRONMENT_VARIABLE, ensure_runtime_dir


def test_workers_that_serve_now_are_shown_with_what_they_have_proved(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    folder = ensure_runtime_dir()
    alive = Counters(folder / f"engine0-rank0-000001{SUFFIX}", labels(), INFO | {"self_check": "passed"})
    (folder / f"engine0-rank1-000001{SUFFIX}").write_bytes(alive.path.read_bytes())  # nobody holds its lock
    report = doctor.examine()
    (worker,) = [found for found in report["workers"] if found["model_name"] == labels()["model_name"]]
    assert (worker["rank"], worker["self_check"]) == ("0", "passed")
    assert f"serves now             {worker['model_name']}, engine {worker['engine']}, rank 0: self_check passed" in (
        doctor._as_text(report)
    )
    del alive


def test_where_nobody_serves_nothing_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = doctor.examine()
    assert report["workers"] == []
    assert "serves now" not in doctor._as_text(report)
