"""Routing replayed against a clock, on steps small enough to follow by hand."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.planning.bounds import belady_hits, bound
from vllm_expert_prefetch.planning.clock import Clock, clock_of
from vllm_expert_prefetch.planning.guesses import drawn, oracle
from vllm_expert_prefetch.planning.replay import Replay, Setting
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.trace import trace_of_steps

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

STEP = [[0], [1], [2], [3]]
"""Four layers of four experts, each of which needs another one."""


def trace_of(steps, num_experts=4, top_k=1):
    """Steps of one token each."""
    layers = len(steps[0])
    card = TraceCard("m", (*"0123456"[:layers],), (num_experts,) * layers, (top_k,) * layers, (100,) * layers)
    return trace_of_steps(card, [[[ids] for ids in step] for step in steps])


def replayed(steps, num_slots, record_time, guess=None, depth=0, areas=1):
    trace = trace_of(steps)
    layers = trace.card.num_layers
    clock = Clock((record_time,) * layers, np.ones(len(trace)))
    replay = Replay(trace, Setting((num_slots,) * layers, "lru", depth, areas), clock, guess)
    replay.run(range(len(trace)))
    return replay


def knows(step, layer, distance):
    return [layer]


def wrong(step, layer, distance):
    return [(layer + 1) % 4]


def test_without_look_ahead_every_miss_is_waited_for():
    replay = replayed([STEP, STEP], 1, 2)
    assert (replay.words.misses, replay.words.hits, replay.demanded, replay.prefetched) == (4, 4, 4, 0)
    assert (replay.stall, replay.time, replay.num_bytes) == (8, 16, 400)


@pytest.mark.parametrize(
    ("record_time", "depth", "stall"),
    [
        (1, 1, 1),  # all but the first layer's hide behind the layer before
        (2, 1, 2 + 1 + 1 + 1),  # each is half done when its layer begins
        (2, 2, 2 + 1 + 1 + 1),  # while it is under way, the link has enough to do
        (0.5, 3, 0.5),
    ],
)
def test_what_is_guessed_right_hides_behind_the_layers_before(record_time, depth, stall):
    replay = replayed([STEP], 1, record_time, knows, depth)
    assert replay.stall == pytest.approx(stall)
    assert (replay.words.used, replay.words.unused) == (3, 0)
    assert (replay.demanded, replay.num_bytes) == (1, 400)


def test_an_idle_link_is_used_for_a_layer_farther_away():
    """Layers 1 and 2 need nothing: with a depth of 2 the last layer's record has two layers' time."""

    def guess(step, layer, distance):
        return [3] if layer == 3 else []

    stalls = [replayed([[[0], [], [], [3]]], 1, 2, guess, depth).stall for depth in (1, 2)]
    assert stalls == [2 + 1, 2 + 0]


def test_a_wrong_guess_that_has_begun_is_copied_and_one_that_has_not_is_cancelled():
    replay = replayed([STEP], 1, 2, wrong, 1)
    assert (replay.words.used, replay.words.misses) == (0, 4)
    assert (replay.words.issued, replay.prefetched, replay.words.cancelled) == (3, 2, 1)
    assert replay.stall == 8
    assert replay.num_bytes == 600


def test_a_demand_goes_before_what_is_queued():
    """The guess for layer 1 is half copied when its layer comes and needs another expert."""
    assert replayed([[[0], [1]]], 2, 2, wrong, 1).stall == 4


def test_with_two_areas_a_wide_step_is_copied_while_the_layer_before_computes():
    """Both layers need all four experts with two slots: two records each go into overflow rows, in a quarter each."""
    card = TraceCard("m", ("0", "1"), (4, 4), (1, 1), (100, 100))
    trace = trace_of_steps(card, [[[[e] for e in (0, 1, 2, 3, 0)]] * 2])
    clock = Clock((0.25, 0.25), np.ones(1))
    stalls = []
    for areas in (1, 2):
        replay = Replay(trace, Setting((2, 2), "lru", 0, areas), clock)
        replay.run([0])
        stalls.append(replay.stall)
    assert stalls == [2.0, 1.5]


def test_the_clock_is_that_of_the_recording_unless_it_is_given():
    trace = trace_of([STEP, STEP])
    assert clock_of(trace, None, None) is clock_of(trace, 100.0, None) is clock_of(trace, None, 1.0) is None
    clock = clock_of(trace, 50.0, 3.0)
    assert clock.record == (2.0,) * 4
    assert clock.compute.tolist() == [3.0, 3.0]
    timed = replace(trace, seconds=np.array([5.0, 9.0]), stalls=np.array([1.0, 1.0]))
    assert clock_of(timed, 50.0, None).compute.tolist() == [1.0, 2.0]


def test_the_bound_is_computing_or_copying():
    assert (bound(48, 10, 2), bound(48, 30, 2)) == (48, 60)


def kept_best(steps, num_slots):
    """Tries everything that a cache may keep: the most hits there can be."""
    best = {frozenset(): 0}
    for needed in map(frozenset, steps):
        after = {}
        for resident, hits in best.items():
            others = (resident | needed) if len(needed) > num_slots else (resident - needed)
            base = frozenset() if len(needed) > num_slots else needed
            for count in range(num_slots - len(base) + 1):
                for more in itertools.combinations(others, count):
                    kept = base | set(more)
                    after[kept] = max(after.get(kept, 0), hits + len(resident & needed))
        best = after
    return max(best.values())


def belady(steps, num_slots, counted=None):
    ids = np.array([[expert] for own in steps for expert in own], dtype=np.int32)
    return belady_hits(ids, np.array([*map(len, steps)], dtype=np.int32), num_slots, counted or [True] * len(steps))


def test_belady_keeps_what_is_needed_soonest():
    assert belady([[0], [1], [2], [0], [1]], 2) == (1, 5)  # 2 takes the slot of 1, which is needed last
    assert belady([[0], [1], [2], [0], [1]], 2, [False, False, False, True, True]) == (1, 2)
    assert belady([[0], [1], [0], [2], [0], [1]], 2) == (2, 6)
    assert belady([[0, 1]] * 3, 1) == (2, 6)


def test_belady_is_the_best_that_there_is():
    rng = random.Random(3)
    for _ in range(60):
        num_experts = rng.randint(3, 6)
        steps = [rng.sample(range(num_experts), rng.choice([1, 1, 2, 3])) for _ in range(rng.randint(2, 8))]
        num_slots = rng.randint(1, num_experts - 1)
        assert belady(steps, num_slots)[0] == kept_best(steps, num_slots)


@pytest.mark.parametrize("recall", [1.0, 0.8, 0.5])
def test_drawn_guesses_are_right_as_often_as_asked_and_near_ones_know_what_far_ones_do(recall):
    rng = random.Random(1)
    trace = trace_of([[rng.sample(range(64), 6) for _ in range(4)] for _ in range(200)], 64, 6)
    guess, true = drawn(trace, [recall, recall / 2]), oracle(trace)
    right = 0
    for step in range(200):
        for layer in range(4):
            near, far, needed = guess(step, layer, 1), guess(step, layer, 2), true(step, layer, 1)
            assert len(set(near)) == len(near) == len(needed) == 6
            assert set(far) & set(needed) <= set(near)
            right += len(set(near) & set(needed))
    assert right / (200 * 4 * 6) == pytest.approx(recall, abs=0.03)
    assert drawn(trace, [recall])(7, 2, 1) == guess(7, 2, 1), "the same in every process"
