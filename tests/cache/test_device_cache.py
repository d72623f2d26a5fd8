"""The cache of a GPU, as far as a machine without one can tell: what is launched in which order, and who joins."""

from types import SimpleNamespace

import pytest
import torch
from noted_device import NUM_EXPERTS, NUM_LAYERS, NUM_SLOTS, TOP_K, Library, make_caches

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.native.library import host_library, why_not_host

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

ROWS = torch.zeros(5, dtype=torch.int64)


class Stream:
    def __init__(self, calls, name):
        self.cuda_stream = name
        self._calls = calls

    def wait_event(self, _event):
        self._calls.append((f"{self.cuda_stream} waits", ()))

    def synchronize(self):
        pass


@pytest.fixture
def made(monkeypatch):
    """The calls so far, and the caches."""
    library = Library()
    main, side, planner = (Stream(library.calls, name) for name in ("main", "side", "planner"))
    event = lambda: SimpleNamespace(record=lambda _: None)  # noqa: E731
    caches = make_caches(monkeypatch, library, main, [side, planner], event, depth=2)
    return library.calls, caches


def names(calls):
    return [name for name, _ in calls]


def look_ahead(caches, numbers=range(NUM_LAYERS), distance=1):
    guess = torch.tensor([[1, 2]]).expand(len(ROWS), -1)
    for number in numbers:
        caches.layers[number].prefetch(guess, ROWS, distance)


def test_a_step_is_planned_and_then_copied(made):
    calls, caches = made
    ids = torch.zeros(5, TOP_K, dtype=torch.int32)
    row_ids = caches.layers[2].serve(ids, ROWS)
    assert names(calls) == ["plan_step", "gather_records"]
    arguments = calls[0][1]
    assert arguments[5] is row_ids
    assert (row_ids.shape, row_ids.dtype) == (ids.shape, ids.dtype)
    assert arguments[10] == caches.mirror[2].data_ptr()
    assert arguments[11:] == (False, None, None, 0, "main")


def test_each_prefetch_is_planned_with_the_layers_own_budget_word_and_then_copied(made):
    calls, caches = made
    look_ahead(caches, [0, 1])
    look_ahead(caches, [1], distance=2)
    assert names(calls) == ["plan_prefetch", "side waits", "prefetch_records"] * 3
    assert [arguments[5:8] for name, arguments in calls if name == "plan_prefetch"] == [
        (caches.budgets[0, 0:].data_ptr(), False, False),
        (caches.budgets[1, 0:].data_ptr(), False, False),
        (caches.budgets[1, 1:].data_ptr(), True, False),
    ]
    assert [arguments[-1] for name, arguments in calls if name == "prefetch_records"] == ["side"] * 3


def test_a_preload_is_a_plan_of_its_own_kind(made):
    calls, caches = made
    caches.layers[1].preload(torch.tensor([[1, 2]]).expand(len(ROWS), -1), ROWS)
    assert names(calls) == ["plan_prefetch", "side waits", "prefetch_records"]
    assert calls[0][1][5:8] == (caches.budgets[1, 0:].data_ptr(), False, True)


def test_a_layer_that_something_was_preloaded_for_and_that_is_not_next_plans_a_step_of_nothing(made):
    calls, caches = made
    ids = torch.zeros(5, TOP_K, dtype=torch.int32)
    for number in (1, 2):
        caches.layers[1].preload(torch.tensor([[1, 2]]).expand(len(ROWS), -1), ROWS)
        calls.clear()
        caches.layers[number].serve(ids, ROWS)
        steps = [
            (arguments[0] is caches.layers[1].state, len(arguments[3]))
            for name, arguments in calls
            if name == "plan_step"
        ]
        assert steps == ([(True, 5)] if number == 1 else [(True, 0), (False, 5)])


def test_in_eager_steps_the_first_layer_joins_for_all(made):
    calls, caches = made
    for _ in range(3):
        look_ahead(caches)
    assert names(calls).count("main waits") == 2
    plans = [name for name in names(calls) if name in ("plan_prefetch", "main waits")]
    assert [index for index, name in enumerate(plans) if name == "main waits"] == [4, 9]


def test_eager_steps_that_begin_elsewhere_join_before_any_orders_are_used_again(made):
    calls, caches = made
    look_ahead(caches, [2, 3])
    look_ahead(caches)
    plans = [name for name in names(calls) if name in ("plan_prefetch", "main waits")]
    assert plans == ["plan_prefetch"] * 4 + ["main waits"] + ["plan_prefetch"] * 2


def test_where_vllm_joins_no_layer_does(made):
    """Around a capture: what was sent before is joined before, what is sent in it, in it."""
    calls, caches = made
    for _ in range(3):
        caches.join()
        before = names(calls).count("main waits")
        look_ahead(caches)
        assert names(calls).count("main waits") == before
        caches.join()
    assert names(calls).count("main waits") == 3, "there is nothing to wait for before the first prefetch"


def test_one_guess_for_all_tokens_counts_when_any_row_is_a_token(made):
    calls, caches = made
    rows = torch.tensor([-1, 4, -1])
    caches.layers[0].prefetch(torch.tensor([5, 6]), rows)
    ids, real = calls[0][1][3:5]
    assert ids.tolist() == [[5, 6]]
    assert real.tolist() == [4]


def test_the_budget_is_two_words_that_later_prefetches_read(made):
    _, caches = made
    assert caches.layers[1].takes_guesses()
    caches.layers[1].set_budget(0, 9)
    caches.layers[1].set_budget(1, 2, distance=2)
    at_first = [[NUM_SLOTS, NUM_EXPERTS]] * 2
    assert caches.budgets.tolist() == [at_first, [[0, 9], [1, 2]], *[at_first] * 2]
    assert caches.layers[1].takes_guesses(), "graphs that were captured before read the word"


def test_prefetches_of_a_layer_from_two_distances_have_orders_of_their_own(made):
    calls, caches = made
    look_ahead(caches, [3], distance=2)
    look_ahead(caches, [3], distance=1)
    assert "main waits" not in names(calls)
    loads = [arguments[2].data_ptr() for name, arguments in calls if name == "prefetch_records"]
    assert len(set(loads)) == 2


def test_what_is_launched_aside_is_awaited_by_the_next_layer_and_no_copy_is(made):
    calls, caches = made
    with caches.aside():
        look_ahead(caches, [2])
    assert names(calls) == ["planner waits", "plan_prefetch", "side waits", "prefetch_records"]
    assert calls[1][1][-1] == "planner"
    for _ in range(2):
        caches.layers[1].serve(torch.zeros(5, TOP_K, dtype=torch.int32), ROWS)
    assert names(calls)[4:] == ["main waits", "plan_step", "gather_records", "plan_step", "gather_records"]
    caches.join()
    assert names(calls)[9:] == ["main waits"]


def test_before_the_first_step_every_slot_is_free(made):
    _, caches = made
    for cache in caches.layers:
        words = cache.words()
        assert words[:4] == (NUM_EXPERTS, NUM_SLOTS, TOP_K, 0)
        assert words.num_free == NUM_SLOTS
        assert cache.num_resident == 0
        cache.check_integrity()
    assert caches.mirror.shape == (NUM_LAYERS, len(Words._fields))


def test_a_closed_cache_serves_no_more(made):
    _, caches = made
    caches.close()
    with pytest.raises(RuntimeError, match="closed"):
        caches.layers[0].serve(torch.zeros(5, TOP_K, dtype=torch.int32), ROWS)
    with pytest.raises(RuntimeError, match="closed"):
        look_ahead(caches)
