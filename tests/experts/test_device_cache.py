"""A prefetch on a GPU, as far as a machine without one can tell: what is launched in which order, and who joins."""

from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.experts import DeviceLayerCache

NUM_LAYERS = 4


class Lane:
    """DeviceLane without streams."""

    def __init__(self, calls):
        self.device = torch.device("cuda", 0)
        self.num_joins = 0
        self.is_ahead = False
        self._calls = calls

    def join(self):
        if self.is_ahead:
            self._calls.append("join")
            self.num_joins += 1
            self.is_ahead = False


def make_cache(lane, calls, name):
    cache = object.__new__(DeviceLayerCache)  # its constructor needs a GPU

    def send(lists):
        calls.append(f"copy {name}")
        lane.is_ahead = True

    cache.staging = SimpleNamespace(slot_words="words", prefetch=send)
    cache._state, cache._lane = "state", lane
    cache._library = SimpleNamespace(plan_prefetch=lambda *args: calls.append(f"plan {name} {args[4]:#x}"))
    cache._ahead = SimpleNamespace(loads=None, num_loads=None, tickets=None)
    cache._budget_address, cache._budget = 0xB0, torch.zeros(1, dtype=torch.int32)
    cache._joins_when_sent = -1
    return cache


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    calls = []
    lane = Lane(calls)
    return calls, lane, [make_cache(lane, calls, name) for name in range(NUM_LAYERS)]


def step(caches):
    for cache in caches:
        cache.prefetch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_each_prefetch_is_planned_with_the_layers_own_budget_word_and_then_copied(made):
    calls, _, caches = made
    step(caches[:2])
    assert calls == ["plan 0 0xb0", "copy 0", "plan 1 0xb0", "copy 1"]


def test_in_eager_steps_the_first_layer_joins_for_all(made):
    calls, lane, caches = made
    for _ in range(3):
        step(caches)
    assert lane.num_joins == 2
    assert [index for index, call in enumerate(calls) if call == "join"] == [8, 17]


def test_eager_steps_that_begin_elsewhere_join_before_any_list_is_used_again(made):
    calls, lane, caches = made
    step(caches[2:])
    step(caches)
    assert calls.index("join") == calls.index("plan 2 0xb0", 1) - 1
    assert lane.num_joins == 1


def test_where_vllm_joins_no_layer_does(made):
    """Around a capture: what was sent before is joined before, what is sent in it, in it."""
    _, lane, caches = made
    for _ in range(3):
        lane.join()
        before = lane.num_joins
        step(caches)
        assert lane.num_joins == before
        lane.join()


def test_the_budget_is_one_word_that_later_prefetches_read(made):
    _, _, caches = made
    caches[1].set_prefetch_budget(5)
    assert [cache._budget.tolist() for cache in caches] == [[0], [5], [0], [0]]
