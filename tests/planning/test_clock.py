"""Routing replayed against a clock, on steps small enough to follow by hand."""

import pytest

from vllm_expert_prefetch.planning.replay import Replay, belady_hits, bound
from vllm_expert_prefetch.residency import POLICIES

LRU = POLICIES["lru"]
STEP = [[0], [1], [2], [3]]
"""Four layers of four experts, each of which needs another one."""


def knows(step, layer, distance):
    return [layer]


def wrong(step, layer, distance):
    return [(layer + 1) % 4]


def test_without_look_ahead_every_miss_is_waited_for():
    sums = Replay(4, 4, 1, LRU, record_time=2).run([STEP, STEP])
    assert (sums.misses, sums.hits, sums.demanded, sums.prefetched) == (4, 4, 4, 0)
    assert (sums.stall, sums.time) == (8, 16)


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
    sums = Replay(4, 4, 1, LRU, record_time, knows, depth).run([STEP])
    assert sums.stall == pytest.approx(stall)
    assert (sums.used, sums.unused) == (3, 0)
    assert sums.demanded == 1


def test_an_idle_link_is_used_for_a_layer_farther_away():
    """Layers 1 and 2 need nothing: with a depth of 2 the last layer's record has two layers' time."""

    def guess(step, layer, distance):
        return [3] if layer == 3 else []

    stalls = [Replay(4, 4, 1, LRU, 2, guess, depth).run([[[0], [], [], [3]]]).stall for depth in (1, 2)]
    assert stalls == [2 + 1, 2 + 0]


def test_a_wrong_guess_that_has_begun_is_copied_and_one_that_has_not_is_cancelled():
    sums = Replay(4, 4, 1, LRU, 2, wrong).run([STEP])
    assert (sums.used, sums.misses) == (0, 4)
    assert sums.prefetched + sums.cancelled <= 3
    assert sums.stall == 8


def test_a_demand_goes_before_what_is_queued():
    """The guess for layer 1 is half copied when its layer comes and needs another expert."""
    sums = Replay(2, 4, 2, LRU, 2, wrong).run([[[0], [1]]])
    assert sums.stall == 4


def test_the_bound_is_computing_or_copying():
    assert (bound(48, 10, 2), bound(48, 30, 2)) == (48, 60)


def test_belady_keeps_what_is_needed_soonest():
    assert belady_hits([[0], [1], [2], [0], [1]], 2) == (1, 5)  # 2 takes the slot of 1, which is needed last
    assert belady_hits([[0], [1], [2], [0], [1]], 2, num_warm=3) == (1, 2)
    assert belady_hits([[0], [1], [0], [2], [0], [1]], 2) == (2, 6)
    assert belady_hits([[0, 1]] * 3, 1) == (2, 6)
