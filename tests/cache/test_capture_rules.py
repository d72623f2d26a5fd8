"""Forks and joins under a model of CUDA's capture rules, in every order in which vLLM may capture, replay and step.

The rules: an event of a capture is never waited for outside of it; a stream that is captured waits for no event from
outside; a capture ends only when everything that was forked in it has been joined. vLLM's hooks call `join` before a
capture, before a replay, and before a capture ends.
"""

import itertools

import pytest
import torch
from noted_device import NUM_LAYERS, Library, make_caches

from vllm_expert_prefetch.native.library import host_library, why_not_host

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

ROWS, GUESS = torch.zeros(1, dtype=torch.int64), torch.tensor([[1, 2]])


class BrokenRule(Exception):
    """CUDA would refuse this."""


class World:
    """What is being captured, None for nothing; and the streams that were forked in it and are not joined."""

    def __init__(self):
        self.capture, self.forked, self.main = None, set(), None
        self.main = Stream(self)

    def begin(self, name):
        self.capture, self.main.capture = name, name

    def end(self):
        if self.forked:
            raise BrokenRule("a capture ends with work that nobody joined")
        self.capture = self.main.capture = None


class Stream:
    def __init__(self, world):
        self.world, self.capture, self.cuda_stream = world, None, id(self)

    def wait_event(self, event):
        if event.capture is not None and event.capture != self.world.capture:
            raise BrokenRule(f"an event of capture {event.capture} is waited for in {self.world.capture}")
        if event.capture is None and self.capture is not None:
            raise BrokenRule("a stream that is captured waits for an event from outside")
        if self is self.world.main:
            self.world.forked.discard(event.stream)
            if event.stream.capture is not None:
                event.stream.capture = None
        elif event.capture is not None:
            self.capture = event.capture
            self.world.forked.add(self)

    def synchronize(self):
        pass


class Event:
    capture, stream = None, None

    def record(self, stream):
        self.capture, self.stream = stream.capture, stream


@pytest.fixture
def made(monkeypatch):
    world = World()
    return world, make_caches(monkeypatch, Library(), world.main, [Stream(world), Stream(world)], Event, depth=2)


class Engine:
    """vLLM's hooks around what it does. With `crosses_tokens` the last layer guesses for the next token's first."""

    def __init__(self, world, caches, crosses_tokens):
        self.world, self.caches, self.crosses_tokens = world, caches, crosses_tokens

    def layer(self, number):
        self.caches.layers[number].serve(GUESS, ROWS)
        with self.caches.aside():
            for distance in (1, 2):
                target = (number + distance) % NUM_LAYERS
                if target > number or self.crosses_tokens:
                    self.caches.layers[target].prefetch(GUESS, ROWS, distance)

    def eager(self):
        for _ in range(2):
            for number in range(NUM_LAYERS):
                self.layer(number)

    def full_capture(self):
        self.eager()
        self.caches.join()
        self.world.begin("full")
        for number in range(NUM_LAYERS):
            self.layer(number)
        self.caches.join()
        self.world.end()

    def pieces_captured(self):
        self.eager()
        for number in range(NUM_LAYERS):
            self.caches.join()
            self.world.begin(f"piece {number}")
            self.layer(number)
            self.caches.join()
            self.world.end()

    def replay(self):
        self.caches.join()

    def pieces_replayed(self):
        for _ in range(NUM_LAYERS):
            self.caches.join()


@pytest.mark.parametrize("crosses_tokens", [False, True])
def test_every_order_of_steps_captures_and_replays_keeps_the_rules(made, crosses_tokens):
    engine = Engine(*made, crosses_tokens)
    acts = ("eager", "full_capture", "pieces_captured", "replay", "pieces_replayed")
    for order in itertools.permutations(acts):
        for act in order:
            getattr(engine, act)()
    assert engine.world.capture is None


@pytest.mark.parametrize("act", ["full_capture", "pieces_captured"])
def test_a_join_that_is_left_out_breaks_a_rule(made, monkeypatch, act):
    engine = Engine(*made, crosses_tokens=True)
    monkeypatch.setattr(engine.caches, "join", lambda: None)
    with pytest.raises(BrokenRule):
        getattr(engine, act)()
