"""The profile of what the slots hold: at the end, and while steps are served, by a clock that the test sets."""

import logging
import random
from types import SimpleNamespace

import pytest
import routed

from vllm_expert_prefetch.cache.base import tables_of
from vllm_expert_prefetch.tracing import profile_writer
from vllm_expert_prefetch.tracing.profile import read_profile
from vllm_expert_prefetch.tracing.profile_writer import SECONDS, ProfileWriter

LAYERS = ("0", "1", "2")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A writer, its caches, its file and its clock, which stands; what it does beside the steps is done at once."""
    caches = routed.make_caches()
    clock = SimpleNamespace(now=0.0)
    at_once = lambda target, args, daemon: SimpleNamespace(start=lambda: target(*args))  # noqa: E731
    monkeypatch.setattr(profile_writer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(profile_writer, "threading", SimpleNamespace(Thread=at_once))
    path = tmp_path / "p"
    return ProfileWriter(path, "m", dict(zip(LAYERS, caches.layers, strict=True))), caches, path, clock


def residents(cache):
    return {expert for expert in tables_of(cache.state)[1][4] if expert >= 0}


def test_it_names_the_residents_of_each_layer(made):
    writer, caches, path, _ = made
    routed.serve(caches, None, random.Random(0), 9)
    writer.close()
    profile = read_profile(path, "m")
    held = [residents(cache) for cache in caches.layers]
    assert [{*profile.hottest(layer, routed.EXPERTS, routed.SLOTS)} for layer in LAYERS] == held
    assert len({tuple(sorted(own)) for own in held}) > 1
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_is_written_once_a_minute_while_steps_are_served(made):
    writer, caches, path, clock = made
    routed.serve(caches, None, random.Random(0), 9)
    written = []
    for now in (1, SECONDS - 1, SECONDS, SECONDS + 1, 2 * SECONDS, 5 * SECONDS, 5 * SECONDS + 1):
        clock.now = now
        writer.step_ended()
        written.append(path.exists())
        path.unlink(missing_ok=True)
    assert written == [False, False, True, False, True, True, False]


def test_a_server_that_has_served_nothing_leaves_the_file_of_the_one_before_it(made):
    writer, _, path, _ = made
    writer.close()
    assert not path.exists()


def test_a_disk_that_fails_is_said_and_ends_nothing(made, caplog):
    writer, caches, path, _ = made
    routed.serve(caches, None, random.Random(0), 3)
    path.mkdir()
    with caplog.at_level(logging.WARNING, "vllm.expert_prefetch"):
        writer.close()
    assert [message.partition(str(path))[0] for message in caplog.messages] == ["expert_prefetch: write_profile: "]
