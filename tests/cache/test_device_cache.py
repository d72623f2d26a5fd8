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
    main, side = (Stream(library.calls, name) for name in ("main", "side"))
    event = lambda: SimpleNamespace(record=lambda _: None)  # noqa: E731
    caches = make_caches(monkeypatch, library, main, side, event)
    return library.calls, caches


def names(calls):
    return [name for name, _ in calls]


def look_ahead(caches, numbers=range(NUM_LAYERS)):
    guess = torch.tensor([[1, 2]]).expand(len(ROWS), -1)
    caches.prefetch([(number, guess) for number in numbers], ROWS)


def test_a_step_is_planned_and_then_copied(made):
    calls, caches = made
    ids = torch.zeros(5, TOP_K, dtype=torch.int32)
    row_ids = caches.layers[2].serve(ids, ROWS)
    assert names(calls) == ["plan_step", "gather_records"]
    arguments = calls[0][1]
    assert arguments[4] is row_ids
    assert (row_ids.shape, row_ids.dtype) == (ids.shape, ids.dtype)
    assert arguments[9] == caches.mirror[2].data_ptr()
    assert arguments[10:] == (False, "main")


def test_each_prefetch_is_planned_with_the_layers_own_budget_word_and_then_copied(made):
    calls, caches = made
    look_ahead(caches, [0, 1])
    assert names(calls) == ["plan_prefetch", "side waits", "prefetch_records"] * 2
    assert [arguments[4] for name, arguments in calls if name == "plan_prefetch"] == [
        caches.budgets[number:].data_ptr() for number in (0, 1)
    ]
    assert [arguments[-1] for name, arguments in calls if name == "prefetch_records"] == ["side", "side"]


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
    _, ids, real = calls[0][1][1:4]
    assert ids.tolist() == [[5, 6]]
    assert real.tolist() == [4]


def test_the_budget_is_two_words_that_later_prefetches_read(made):
    _, caches = made
    assert caches.layers[1].takes_guesses
    caches.layers[1].set_budget(0, 9)
    assert caches.budgets.tolist() == [[NUM_SLOTS, NUM_EXPERTS], [0, 9], *[[NUM_SLOTS, NUM_EXPERTS]] * 2]
    assert caches.layers[1].takes_guesses, "graphs that were captured before read the word"


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
