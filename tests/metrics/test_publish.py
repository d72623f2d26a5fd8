"""The publisher keeps the counters' file where somebody removes it, and complains once where it cannot."""

import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from counter_files import make_counters

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.metrics import publish
from vllm_expert_prefetch.metrics.publish import Publisher


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_LOOK_SECONDS", -1.0)  # at every step
    (tmp_path / "runtime").mkdir()
    return Publisher(make_counters(tmp_path / "runtime"), None, None)


def run_step(publisher):
    publisher.step_begins(0, 1, True)
    publisher.step_ended()


def test_a_removed_file_is_back_after_the_next_step_and_said_once(publisher, caplog):
    shutil.rmtree(publisher.counters.path.parent)
    run_step(publisher)
    run_step(publisher)
    assert publisher.counters.path.exists()
    assert len(caplog.messages) == 1
    assert "was removed" in caplog.text


def test_a_place_that_is_gone_is_said_once_and_serving_goes_on(publisher, caplog):
    folder = publisher.counters.path.parent
    shutil.rmtree(folder)
    folder.write_text("in the way")
    run_step(publisher)
    run_step(publisher)
    assert len(caplog.messages) == 1
    assert "shows nothing" in caplog.text


def test_counters_of_a_device_are_published_without_steps_until_their_engine_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_PERIOD_SECONDS", 0.01)
    (tmp_path / "runtime").mkdir()
    mirror = torch.zeros(1, len(Words._fields), dtype=torch.int64)
    caches = SimpleNamespace(layers=[None], mirror=mirror, ghost_mirror=None, on_device=True)
    before = set(threading.enumerate())
    publisher = Publisher(make_counters(tmp_path / "runtime"), caches, None)
    (thread,) = set(threading.enumerate()) - before
    mirror[0, Words._fields.index("hits")] = 3
    deadline = time.monotonic() + 10
    while publisher.counters.get("lookups_total/hit") != 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    del publisher
    thread.join(10)
    assert not thread.is_alive()
