"""The publisher keeps the counters' file where somebody removes it, and complains once where it cannot."""

import shutil

import pytest
from counter_files import make_counters

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
