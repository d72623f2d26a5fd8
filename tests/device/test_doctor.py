"""`doctor --gpu` on the shim: what it measures has no meaning there, what it compares has."""

import json

import pytest

from device import shim
from vllm_expert_prefetch.cache.device import DeviceCache
from vllm_expert_prefetch.cli import doctor_gpu
from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.native import library
from vllm_expert_prefetch.serving import proof

pytestmark = pytest.mark.skipif(not shim.load_setup().find_compiler(), reason="no C++20 compiler (g++) is installed")


@pytest.fixture
def on_the_shim(monkeypatch):
    shim.install_caches(monkeypatch)
    monkeypatch.setattr(proof, "torch", shim.Torch())
    monkeypatch.setattr(doctor_gpu, "_torch", shim.Torch)
    monkeypatch.setattr(doctor_gpu, "_RECORDS", (64 << 10, 1 << 20))
    monkeypatch.setattr(library, "why_not_cuda", lambda: None)


@pytest.mark.usefixtures("on_the_shim")
def test_every_figure_is_there_and_replays_are_compared(capsys):
    assert main(["doctor", "--gpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["record_bytes"] for row in report["records"]] == [64 << 10, 1 << 20]
    assert all(min(row["gather_gbps"], row["engine_gbps"]) > 0 and row["blocks"] in (4, 8) for row in report["records"])
    assert report["plan_us"] > 0
    assert report["replays_compared"] == 20
    assert main(["doctor", "--gpu"]) == 0
    printed = capsys.readouterr().out
    assert "1.05 MB" in printed
    assert "20 replays with other routing: every byte where it belongs" in printed


@pytest.mark.usefixtures("on_the_shim")
def test_a_replay_that_is_wrong_is_named(monkeypatch, capsys):
    gather = DeviceCache.gather

    def gather_when_eager(self):
        if shim.Graph.current is None:
            gather(self)

    monkeypatch.setattr(DeviceCache, "gather", gather_when_eager)
    assert main(["doctor", "--gpu"]) == 1
    assert "PROBLEM: expert_prefetch: doctor: in a replayed CUDA graph of 3 tokens, row" in capsys.readouterr().err


def test_without_a_gpu_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(library, "why_not_cuda", lambda: "not built")
    assert main(["doctor", "--gpu"]) == 1
    assert capsys.readouterr().err == "no GPU to look at: not built\n"
