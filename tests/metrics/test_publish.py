"""The publisher: what it does when, what comes of words that tell of wrong tokens, and the counters' file."""

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


def caches_with(mirror, on_device, expert_map=None):
    cache = SimpleNamespace(record_bytes=1, expert_map=expert_map)
    return SimpleNamespace(layers=[cache] * len(mirror), mirror=mirror, ghost_mirror=None, on_device=on_device)


class Noted:
    """A look-ahead that notes what it is told."""

    def __init__(self):
        self.seconds = []

    def begin_step(self, num_one_token_each):
        pass

    def note(self, deltas, decode_step_seconds):
        self.seconds.append(decode_step_seconds)

    def publish(self, counters):
        pass


class Served:
    """A publisher over the words of two layers, by name; on a device its thread never comes."""

    def __init__(self, tmp_path, monkeypatch, on_device, expert_map=None):
        monkeypatch.setattr(publish, "_publish_now_and_then", lambda held: None)
        (tmp_path / "runtime").mkdir()
        self.mirror = torch.zeros(2, len(Words._fields), dtype=torch.int64)
        self.noted = Noted()
        caches = caches_with(self.mirror, on_device, expert_map)
        self.publisher = Publisher(make_counters(tmp_path / "runtime"), caches, self.noted, ("3", "7"))

    def count(self, layer, **words):
        for name, number in words.items():
            self.mirror[layer, Words._fields.index(name)] += number


@pytest.mark.parametrize("on_device", [True, False])
def test_steps_publish_on_the_host_alone(tmp_path, monkeypatch, on_device):
    served = Served(tmp_path, monkeypatch, on_device)
    for number in range(3):
        served.count(0, hits=1, steps=1)
        run_step(served.publisher)
        assert served.publisher.counters.get("lookups_total/hit") == (0 if on_device else number + 1)
    served.publisher.publish()
    assert served.publisher.counters.get("lookups_total/hit") == 3


def test_what_a_decode_step_takes_is_told_where_there_were_no_others(tmp_path, monkeypatch):
    served = Served(tmp_path, monkeypatch, True)
    clock = served.publisher.clock
    for totals in ((2, 2, 6.0), (2, 2, 6.0), (4, 3, 9.0), (5, 4, 11.0)):
        clock.totals = totals
        served.publisher.publish()
    assert served.noted.seconds == [3.0, None, None, 2.0]


@pytest.mark.parametrize("word", ["errors", "out_of_range"])
@pytest.mark.parametrize("on_device", [True, False])
def test_after_words_of_wrong_tokens_no_step_is_served(tmp_path, monkeypatch, caplog, on_device, word):
    served = Served(tmp_path, monkeypatch, on_device)
    served.count(0, steps=1)
    run_step(served.publisher)
    served.count(1, steps=1, **{word: 3})
    if on_device:
        run_step(served.publisher)
        served.publisher.publish()
    with pytest.raises(RuntimeError, match=r"layer 7: .*3 .*tokens since then may be wrong"):
        run_step(served.publisher)
    with pytest.raises(RuntimeError, match="layer 7"):
        served.publisher.step_begins(0, 1, True)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("on_device", "expert_map", "fails"), [(True, None, True), (False, None, False), (True, 1, False)]
)
def test_steps_that_no_layer_sees_end_the_serving_of_a_device(tmp_path, monkeypatch, on_device, expert_map, fails):
    """A rank that has a part of the experts may be asked for none; on the host layers see for themselves."""
    monkeypatch.setattr(publish, "_UNSEEN_STEPS", 6)
    served = Served(tmp_path, monkeypatch, on_device, expert_map)

    def run_steps(number):
        for _ in range(number):
            run_step(served.publisher)
        served.publisher.publish()

    run_steps(5)
    served.count(0, steps=1)
    for _ in range(3):
        run_steps(5)
    if fails:
        with pytest.raises(RuntimeError, match="no MoE layer has seen a token in 10 steps"):
            run_steps(1)
    else:
        run_steps(1)


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
    caches = caches_with(mirror, True)
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
