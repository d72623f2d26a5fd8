"""Ray Serve as in deploy/: a local cluster with two replicas of the demo model, each with the plugin on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from engines import TINY_MODEL, greedy, open_engine, prompts
from observatory import has_prometheus, run_prometheus
from processes import is_running
from servers import descendants_of, free_port

from vllm_expert_prefetch.memory.shared_store import remove_dead_stores
from vllm_expert_prefetch.ray_serve import Targets, build

pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'ray[serve]'")

SERVE_FILE = Path(__file__).resolve().parents[2] / "deploy" / "ray-serve" / "serve.yaml"
START_SECONDS = 240
FLAGS = ["--enforce-eager", "--served-model-name", "demo", "--max-model-len", "512", "--kv-cache-memory-bytes", "256M"]


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
    arguments[0] = str(TINY_MODEL)
    arguments[arguments.index("--additional-config.expert_prefetch.shared_store") + 1] += f"-test-{os.getpid()}"
    arguments += ["--additional-config.expert_prefetch.cache_fraction", "0.5", *FLAGS]
    application["args"]["environment"] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    (deployment,) = application["deployments"]
    assert deployment["num_replicas"] == 2
    deployment["ray_actor_options"] = {"num_cpus": 0.5, "num_gpus": 0}
    deployment["health_check_period_s"] = 1
    return config


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Ray Serve of two replicas; the cluster is gone afterwards."""
    directory = tmp_path_factory.mktemp("ray")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    path, log = directory / "serve.yaml", directory / "log"
    path.write_text(yaml.safe_dump(local_config(port)))
    command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory), "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, preexec_fn=answer_to_interrupts
        )
    started: set[int] = set()
    try:
        wait_for(lambda: len(replicas(url)) == 2, log, process)
        yield url
    finally:
        started |= set(descendants_of(process.pid))
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for pid in {process.pid, *started}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        remove_dead_stores()


def answer_to_interrupts() -> None:
    """A background job of a shell ignores SIGINT, and so do its children; `serve run` ends by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, log: Path | None = None, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        said = log.read_text()[-4000:] if log else "it did not happen in time"
        assert process is None or process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.5)


def replicas(url: str) -> dict[str, str]:
    """Address of the metrics by replica, as Prometheus is told."""
    try:
        answer = httpx.get(f"{url}/targets", timeout=10)
        found = answer.json() if answer.status_code == 200 else []
    except (httpx.TransportError, ValueError):
        return {}
    return {entry["labels"]["replica"]: entry["targets"][0] for entry in found}


def complete(url: str, prompt: str) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def decode_steps(address: str) -> float:
    lines = httpx.get(f"http://{address}/metrics", timeout=30).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm_expert_prefetch_steps_total{") and 'phase="decode"' in line
    )


@pytest.mark.proves("Ray Serve, two replicas")
@pytest.mark.engine
def test_smoke_both_replicas_give_the_tokens_of_plain_vllm(cluster):
    """Asked one by one, so that both count every step of what they were asked."""
    before = {name: decode_steps(address) for name, address in replicas(cluster).items()}
    asked = prompts(8)
    texts = [complete(cluster, prompt) for prompt in asked]
    after = {name: decode_steps(address) for name, address in replicas(cluster).items()}
    with open_engine(TINY_MODEL, None) as stock:
        tokenizer = stock.get_tokenizer()
        expected = [tokenizer.decode(output.tokens) for output in greedy(stock, asked)]
    assert texts == expected
    assert sum(after.values()) - sum(before.values()) == 8 * 15
    assert len(after) == 2
    assert all(after[name] > before[name] for name in after), "one replica was never asked"


@pytest.mark.engine
def test_the_replicas_have_the_experts_in_host_memory_once(cluster):
    engines = [pid for address in replicas(cluster).values() for pid in descendants_of(server_on(port_of(address)))]
    inodes = [inodes_of_store(pid) for pid in engines]
    holders = [found for found in inodes if found]
    assert len(holders) == 2, "not every engine maps a store"
    assert len(holders[0]) == 8, "not every layer"
    assert holders[0] == holders[1]


@pytest.mark.engine
@pytest.mark.skipif(not has_prometheus(), reason="no prometheus in PATH: apt-get install prometheus")
def test_prometheus_finds_both_replicas_and_tells_them_apart(cluster):
    there = replicas(cluster)
    with run_prometheus(targets_url=f"{cluster}/targets", scrape_seconds=5) as prometheus:
        wait_for(lambda: len(prometheus.query("vllm_expert_prefetch_slots")) == 2)
        found = {
            s["metric"]["replica"]: s["metric"]["instance"] for s in prometheus.query("vllm_expert_prefetch_slots")
        }
        assert found == there
        steps = 'sum by (replica) (vllm_expert_prefetch_steps_total{phase="decode"})'
        expected = {name: decode_steps(address) for name, address in there.items()}
        wait_for(lambda: {s["metric"]["replica"]: float(s["value"][1]) for s in prometheus.query(steps)} == expected)


@pytest.mark.engine
def test_a_streamed_answer_comes_in_pieces(cluster):
    body = {"model": "demo", "prompt": "In the beginning", "max_tokens": 16, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster}/v1/completions", json=body, timeout=60) as answer:
        pieces = [piece for piece in answer.iter_text() if piece.startswith("data: ")]
    assert len(pieces) > 4


@pytest.mark.engine
def test_what_vllm_refuses_comes_back_as_it_is(cluster):
    answer = httpx.post(f"{cluster}/v1/completions", json={"model": "another", "prompt": "x"}, timeout=60)
    assert answer.status_code == 404
    assert "another" in answer.json()["error"]["message"]


@pytest.mark.engine
@pytest.mark.long
def test_a_killed_replica_comes_back(cluster):
    """The last one here in file order would wait for a start; in any order the others find two replicas again."""
    there = replicas(cluster)
    killed = sorted(there)[0]
    server = server_on(port_of(there[killed]))
    engines = descendants_of(server)
    assert engines
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: killed not in replicas(cluster) and len(replicas(cluster)) == 2)
    assert not any(is_running(pid) for pid in engines), "what it had started holds its memory"
    assert set(replicas(cluster)) & set(there) == set(there) - {killed}
    assert [complete(cluster, "In the beginning") for _ in range(4)] == [complete(cluster, "In the beginning")] * 4


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def inodes_of_store(pid: int) -> set[str]:
    """Of the memory of shared stores that a process maps."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line[4] for line in lines if len(line) > 5 and line[5].startswith("/memfd:expert_prefetch-")}


def server_on(port: int) -> int:
    """The process id of the `vllm serve` with this port on its command line."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and f"--port\0{port}\0" in (entry / "cmdline").read_text():
                return int(entry.name)
    raise AssertionError(f"nobody serves on {port}")
