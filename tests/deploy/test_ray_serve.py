"""Ray Serve as in deploy/: a local cluster with two replicas of the demo model, each with the plugin on."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml
from engines import TINY_MODEL, prompts
from observatory import has_prometheus, run_prometheus
from servers import free_port, serve

pytest.importorskip("ray.serve")

from vllm_expert_prefetch.ray_serve import Targets, build

SERVE_FILE = Path(__file__).resolve().parents[2] / "deploy" / "ray-serve" / "serve.yaml"
START_SECONDS = 240
FLAGS = ["--served-model-name", "demo", "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", "256M"]


def test_an_address_that_was_not_heard_of_for_long_is_forgotten(monkeypatch):
    targets, now = Targets(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    targets.hear("a", "host:1")
    now[0] = 20.0
    targets.hear("b", "host:2")
    assert [entry["labels"]["replica"] for entry in targets.all()] == ["a", "b"]
    now[0] = 40.0
    assert targets.all() == [{"targets": ["host:2"], "labels": {"replica": "b"}}]


@pytest.mark.parametrize(
    "settings", [{}, {"arguments": []}, {"arguments": ["m", "--port", "1"]}, {"arguments": ["m"], "model": "m"}]
)
def test_settings_that_cannot_work_are_refused_with_the_ones_that_can(settings):
    with pytest.raises(ValueError, match=r"`arguments`.*`environment`"):
        build(settings)


def local_config(port: int) -> dict:
    """The committed file, for the demo model, without a GPU, on one machine."""
    config = yaml.safe_load(SERVE_FILE.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    arguments = application["args"]["arguments"]
    assert arguments[1:3] == ["--plugin", "expert_prefetch"]
    application["args"]["arguments"] = [
        str(TINY_MODEL),
        *arguments[1:3],
        "--additional-config.expert_prefetch.cache_fraction",
        "0.5",
        *FLAGS,
    ]
    application["args"]["environment"] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    (deployment,) = application["deployments"]
    assert deployment["num_replicas"] == 2
    deployment["ray_actor_options"] = {"num_cpus": 1, "num_gpus": 0}
    deployment["health_check_period_s"] = 1
    return config


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Ray Serve of two replicas; the cluster is gone afterwards."""
    directory = tmp_path_factory.mktemp("ray")
    url = f"http://127.0.0.1:{free_port()}"
    path, log = directory / "serve.yaml", directory / "log"
    path.write_text(yaml.safe_dump(local_config(int(url.rsplit(":", 1)[1]))))
    command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_for(lambda: len(replicas(url)) == 2, log, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for pid in descendants_of_session(process.pid):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def replicas(url: str) -> dict[str, str]:
    """Address of the metrics by replica, as Prometheus is told."""
    try:
        answer = httpx.get(f"{url}/targets", timeout=10)
        found = answer.json() if answer.status_code == 200 else []
    except (httpx.TransportError, ValueError):
        return {}
    return {entry["labels"]["replica"]: entry["targets"][0] for entry in found}
