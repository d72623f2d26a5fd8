"""The plugin as a user meets it: `vllm serve`, the OpenAI endpoint, /metrics, and signals."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import TINY_MODEL, prompts
from lora_adapters import ATTENTION, RANK, write_adapter
from processes import run_python
from servers import Server, serve

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.planning.simulate import as_recorded
from vllm_expert_prefetch.tracing.profile import profile_of, read_profile
from vllm_expert_prefetch.tracing.trace import read_trace

pytestmark = pytest.mark.engine

ASK = ["--plugin", "expert_prefetch", "--additional-config.expert_prefetch.cache_fraction", "0.5"]


@pytest.fixture(scope="module")
def server():
    """Adapters may be loaded: without one, its completions are those of a server where they may not."""
    lora = ["--enable-lora", "--max-lora-rank", str(RANK)]
    with serve(*ASK, *lora, environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def stock_texts():
    with serve() as running:
        running.wait_ready()
        assert running.metrics() == {}
        yield [running.complete(prompt) for prompt in prompts(4)]


def total(metrics: dict[str, float], name: str, **labels: str) -> float:
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for key, value in metrics.items()
        if key.startswith(f"vllm_expert_prefetch_{name}{{") and all(label in key for label in wanted)
    )


def test_smoke_server_gives_the_completions_of_plain_vllm(server, stock_texts):
    assert [server.complete(prompt) for prompt in prompts(4)] == stock_texts


def test_the_demo_model_answers_chat(server):
    assert server.chat("It is a truth universally acknowledged") == server.complete(
        "It is a truth universally acknowledged\n", 8
    )


def test_the_start_says_in_few_lines_what_is_offloaded_and_where_to_look(server):
    lines = [line for line in server.log.read_text().splitlines() if "] expert_prefetch: " in line]
    assert 3 <= len(lines) <= 5
    text = "\n".join(lines)
    sizes = (
        "0.003146 GB cache (50 % of the experts)",
        "0.0003932 GB overflow rows",
        "on the host 0.006291 GB, pageable",
    )
    ways = (
        "policy ewma, execution exact, prefetch off: ",
        "of UnquantizedFusedMoEMethod, engine cpu, link not emulated",
    )
    for part in ("8 MoE layers x 16 experts, 8 slots each", *sizes, *ways, "proved: all 8 MoE layers", "/metrics"):
        assert part in text


def test_an_adapter_of_experts_is_refused_by_its_name_and_the_server_goes_on(server, tmp_path):
    def load(name: str, *modules: str) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(write_adapter(tmp_path / name, modules))}
        return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)

    text = "It is a truth universally acknowledged"
    before = server.complete(text)
    refused = load("mine", *ATTENTION, "mlp.experts.3.up_proj")
    assert refused.status_code >= 400
    assert "the LoRA adapter 'mine'" in refused.text
    assert "merge this one into the checkpoint" in refused.text
    assert load("attention", *ATTENTION).status_code == 200
    assert server.complete(text) == before != server.complete(text, model="attention")


def test_metrics_of_the_worker_process_appear_on_vllms_endpoint(server):
    before = server.metrics()
    server.complete("It is a truth universally acknowledged", 8)
    after = server.metrics()
    moved = total(after, "transfer_bytes_total") - total(before, "transfer_bytes_total")
    misses = total(after, "lookups_total", outcome="miss") - total(before, "lookups_total", outcome="miss")
    lookups = total(after, "lookups_total") - total(before, "lookups_total")
    assert moved == misses * 49152
    # one prompt step and 7 decode steps of one request, 8 layers, top-2
    assert lookups >= 7 * 8 * 2
    assert total(after, "moe_steps_total") - total(before, "moe_steps_total") == 8 * 8
    assert total(after, "slots") == 64
    assert total(after, "experts") == 128
    assert total(after, "cache_bytes") == total(after, "host_store_bytes") / 2
    assert total(after, "overflow_bytes") == 8 * 49152
    info = next(key for key in after if key.startswith("vllm_expert_prefetch_info"))
    for label in (
        'execution="exact"',
        'policy="ewma"',
        'platform="cpu"',
        'quant_method="UnquantizedFusedMoEMethod"',
        'prefetch="off: ',
        'model_name="demo"',
        'rank="0"',
        'engine="0"',
    ):
        assert label in info


def test_files_of_the_metrics_are_private(server):
    (directory,) = server.runtime.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    files = {path.suffix: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert files == {".counters": 0o600, ".trace": 0o600}


def test_a_recording_of_a_running_server_has_what_was_served_meanwhile(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(server.runtime))

    def trace(*arguments: str) -> dict[str, Any]:
        assert main(["trace", *arguments, "--server", str(server.process.pid)]) == 0
        return json.loads(capsys.readouterr().out)

    texts = [server.complete(prompt, 8) for prompt in prompts(3)]
    assert trace("status") == {"recording": None}
    assert trace("start", str(tmp_path))["steps"] == 0
    answers = [server.answer(prompt, 8) for prompt in prompts(3)]
    assert trace("status")["steps"] == 3 * 8
    profile = tmp_path / "hot.json"
    stopped = trace("stop", "--write-profile", str(profile))
    assert trace("status") == {"recording": None}
    assert [answer["choices"][0]["text"] for answer in answers] == texts
    assert [server.complete(prompt, 8) for prompt in prompts(3)] == texts

    recorded = read_trace(Path(stopped["recording"]))
    assert (len(recorded), stopped["steps"], stopped["dropped_steps"]) == (3 * 8, 3 * 8, 0)
    lengths = [answer["usage"]["prompt_tokens"] for answer in answers]
    assert recorded.tokens.tolist() == [tokens for length in lengths for tokens in (length, *[1] * 7)]
    assert recorded.requests.tolist() == [own for own, length in enumerate(lengths) for _ in range(length + 7)]
    assert recorded.prefilling.tolist() == [1, *[0] * 7] * 3
    assert as_recorded(recorded)
    assert read_profile(profile, str(TINY_MODEL)) == profile_of(recorded)
    (file,) = Path(stopped["recording"]).iterdir()
    assert {path.stat().st_mode & 0o777 for path in (file, profile)} == {0o600}


LONG = ["--max-model-len", "2048"]
"""Of servers that are ended amid a generation: on a busy machine a signal has come seconds after it was sent."""


def generation(num_choices: int) -> dict[str, object]:
    """The body of a request to a LONG server that takes half a minute and more."""
    body = {"model": "demo", "prompt": "In the beginning", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    return body | {"n": num_choices}


def assert_ends_cleanly(running: Server) -> None:
    started = time.monotonic()
    running.stop(10)
    assert running.all_gone(10 - (time.monotonic() - started))
    assert list(running.runtime.iterdir()) == []


@pytest.mark.alone
def test_sigterm_during_generation_ends_everything_within_ten_seconds():
    with serve(*ASK, *LONG) as running:
        running.wait_ready()
        running.complete("In the beginning", 2)  # the first request compiles the sampler: seconds in which nothing ends
        with httpx.stream("POST", f"{running.url}/v1/completions", json=generation(16), timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert_ends_cleanly(running)
            with contextlib.suppress(httpx.HTTPError):
                assert not any('"finish_reason":"length"' in line for line in lines), "it was not amid a generation"


@pytest.mark.alone
def test_sigterm_during_load_ends_everything_within_ten_seconds():
    with serve(*ASK) as running:
        wait_for_line(running, "Starting to load model")
        assert_ends_cleanly(running)


@pytest.mark.long
def test_a_server_that_is_given_time_to_end_writes_its_profile(tmp_path):
    asked = ["--additional-config.expert_prefetch.write_profile", str(tmp_path / "hot.json")]
    with serve(*ASK, *asked, "--shutdown-timeout", "10") as running:
        running.wait_ready()
        running.complete("In the beginning", 8)
        assert [*tmp_path.iterdir()] == []
        running.stop(20)
    assert len(read_profile(tmp_path / "hot.json", str(TINY_MODEL)).uses) == 8


@pytest.mark.long
@pytest.mark.proves("several API servers")
def test_several_api_servers_show_the_same_workers():
    with serve(*ASK, "--api-server-count", "2") as running:
        running.wait_ready()
        running.complete("In the beginning", 8)
        pages = [running.metrics() for _ in range(6)]
    for name in ("lookups_total", "steps_total", "tpot_seconds_count"):
        seen = [total(page, name) for page in pages]
        assert min(seen) == max(seen) > 0, name


def test_a_killed_server_leaves_nothing_that_the_next_one_does_not_clean():
    with serve(*ASK) as running:
        wait_for_line(running, "vllm_expert_prefetch_* on the server's /metrics")
        (killed,) = running.runtime.iterdir()
        for pid in running.descendants():
            os.kill(pid, signal.SIGKILL)
        running.process.wait(10)
        assert killed.exists()
        check_config = f"""
            from vllm.engine.arg_utils import EngineArgs
            EngineArgs({str(TINY_MODEL)!r}, additional_config={{"expert_prefetch": True}}).create_engine_config()
        """
        run_python(check_config, {"XDG_RUNTIME_DIR": str(running.runtime)})
        assert not killed.exists()


def wait_for_line(running: Server, text: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not re.search(re.escape(text), running.log.read_text()):
        assert time.monotonic() < deadline
        assert running.process.poll() is None, running.log.read_text()[-2000:]
        time.sleep(0.05)


def left_by_a_killed_rank(running: Server) -> set[str]:
    """SIGKILL one of the two ranks amid a generation: once that has failed, /health says so until nobody listens, no
    completion is given, and within 30 s no process is left of the server, nor a folder of counters. Of the files in
    /dev/shm that its processes had mapped, the names of those that are left, without what differs from run to run; they
    are removed."""
    shared = shared_memory_of(running)
    (worker,) = [pid for pid in running.descendants() if "Worker_TP1" in title(pid)]
    with httpx.stream("POST", f"{running.url}/v1/completions", json=generation(8), timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 30
        with contextlib.suppress(httpx.HTTPError):
            assert not any('"finish_reason":"length"' in line for line in lines), "it was not amid a generation"
    asked = {"model": "demo", "prompt": "In the beginning", "max_tokens": 1}
    is_running = True
    while is_running and time.monotonic() < deadline:
        assert status(running, "/health") in (503, NOBODY_ANSWERS)
        assert status(running, "/v1/completions", asked) != 200
        is_running = running.process.poll() is None
    assert running.all_gone(deadline - time.monotonic()), "orphans"
    assert list(running.runtime.iterdir()) == []
    left = [path for path in shared if path.exists()]
    for path in left:
        path.unlink()
    return {re.sub(r"[0-9a-f]{8,}", "", path.name) for path in left}


NOBODY_ANSWERS = 0


def status(running: Server, path: str, body: dict[str, object] | None = None) -> int:
    """Of the answer of a server that may be ending."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.request("POST" if body else "GET", f"{running.url}{path}", json=body, timeout=10).status_code
    return NOBODY_ANSWERS


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def shared_memory_of(running: Server) -> set[Path]:
    """The files in /dev/shm that its processes have mapped. While they compute, reading this can take seconds."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in running.descendants())
    return {Path(found) for found in re.findall(r"/dev/shm/\S+$", maps, re.MULTILINE)}


@pytest.mark.proves(
    "a rank that is killed",
    says="the server ends, and leaves what plain vLLM leaves, and nothing of the plugin's",
)
@pytest.mark.proves("tensor parallelism")
def test_tensor_parallel_workers_give_the_same_text_and_are_told_apart(stock_texts):
    """When a rank is killed amid a generation, all of the server ends, as plain vLLM's does."""
    store = ["--additional-config.expert_prefetch.shared_store", f"test-{os.getpid()}"]
    two = [*LONG, "--tensor-parallel-size", "2"]
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serve(*two, environment=bind) as stock:
        stock.wait_ready()
        expected = [stock.complete(prompt) for prompt in prompts(4)]
        left_by_vllm = left_by_a_killed_rank(stock)
    with serve(*ASK, *store, *two, environment=bind) as running:
        running.wait_ready()
        assert [running.complete(prompt) for prompt in prompts(4)] == expected
        metrics = running.metrics()
        assert left_by_a_killed_rank(running) <= left_by_vllm
    assert not [*Path("/dev/shm").glob(f"expert-prefetch-store-*-{store[1]}")]
    by_rank = [total(metrics, "lookups_total", rank=rank) for rank in ("0", "1")]
    assert by_rank[0] == by_rank[1] > 0
    assert total(metrics, "experts", rank="1") == 128
    assert total(metrics, "info", store="shared") == 2, "each rank in memory of its own"
