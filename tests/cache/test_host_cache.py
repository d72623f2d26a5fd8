"""The cache of the CPU platform: whatever is routed and prefetched, a kernel reads the right records, and no others."""

import random
import time

import pytest
import torch
from expert_tensors import NUM_EXPERTS, expert_tensors

from vllm_expert_prefetch.cache import create
from vllm_expert_prefetch.cache.base import check_state
from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import POLICIES

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

CPU = torch.device("cpu")


def large_tensors(seed):
    """Rows of several pages, of parts of one, and of a few bytes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w13": (16, 3000), "w2": (16, 1111), "scale": (16, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ids(*experts, dtype=torch.int32):
    """One token."""
    return torch.tensor([experts], dtype=dtype)


def until(condition, seconds=20):
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen"


@pytest.mark.parametrize("areas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("link", [None, EmulatedLink(0.2, 20.0)], ids=["no link", "link"])
def test_every_step_of_every_layer_reads_its_own_experts(make_model, areas, policy, link):
    rng = random.Random(7)
    torch.manual_seed(7)
    model = make_model(3, 6, large_tensors, areas, link, policy)
    for _ in range(120):
        for number, cache in enumerate(model.layers):
            num_rows, num_real = rng.choice([(1, 1), (1, 1), (2, 1), (3, 3), (12, 12), (40, 33)])
            dtype = rng.choice([torch.int32, torch.int64])
            topk_ids = torch.stack([torch.randperm(16)[:2] for _ in range(num_rows)]).to(dtype)
            if rng.random() < 0.1:
                topk_ids[rng.randrange(num_rows)] = -1
            model.serve(number, topk_ids, num_real)
            for distance in (1, 2):
                guess = torch.tensor(rng.sample(range(16), 4))
                model.layers[(number + distance) % 3].prefetch(guess, 1, distance)
            cache.check_integrity()
    for number, cache in enumerate(model.layers):
        words = cache.words()
        assert words.lookups == words.hits + words.late + words.misses
        assert min(words.hits, words.misses, words.overflow, words.used, words.wide_steps, words.displaced) > 0
        assert words.demanded == words.misses + words.claimed
        assert 0 <= words.issued - words.used - words.unused - words.cancelled <= cache.num_slots
        assert model.caches.mirror[number].tolist() == list(words)
    if link:  # without one, copies are mostly there in time
        assert sum(cache.words().late for cache in model.layers) > 0
    prefetched = sum(cache.words().prefetched for cache in model.layers)
    in_flight = sum(cache.words().num_in_flight for cache in model.layers)
    landed = host_library().engine_num_landed(model.caches.engine)
    assert prefetched - in_flight <= landed <= prefetched


@pytest.mark.parametrize("num_slots", range(2, NUM_EXPERTS))
def test_records_of_odd_sizes_at_every_number_of_slots(make_model, num_slots):
    model = make_model(2, num_slots, expert_tensors)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        for number in range(2):
            topk_ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(1 + seed % 5)])
            model.serve(number, topk_ids, len(topk_ids))


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (6, 1)])
def test_ids_that_are_not_contiguous_are_served_as_others(make_model, shape):
    model = make_model(1, 6, large_tensors, top_k=1)
    topk_ids = torch.arange(6).view(shape[1], shape[0]).t()
    model.serve(0, topk_ids, shape[0])


def test_overflow_rows_are_one_memory_for_all_layers(make_model):
    model = make_model(2, 4, large_tensors)
    first, second = model.layers
    first.tensors["w13"][15] = 7.0
    assert (second.tensors["w13"][15] == 7.0).all()
    first.tensors["w13"][3] = 7.0
    assert (second.tensors["w13"][3] == 0.0).all()
    one = sum(view[0].nbytes for view in first.store.views.values())
    assert 10 * one < model.shared.num_bytes < 13 * one


def test_two_areas_are_apart(make_model):
    model = make_model(2, 4, large_tensors, areas=2)
    first, second = model.layers
    first.tensors["w13"][15] = 7.0
    assert (second.tensors["w13"][15] == 0.0).all()


def test_a_wide_step_uses_overflow_rows_and_leaves_the_slots_to_what_is_hot(make_model):
    model = make_model(1, 4, large_tensors)
    model.serve(0, torch.tensor([[0, 1], [2, 3]]), 2)
    rows = model.serve(0, torch.arange(12).view(6, 2), 6)
    assert rows.flatten()[:4].tolist() == [0, 1, 2, 3]
    assert sorted(rows.flatten()[4:].tolist()) == list(range(4, 12))
    words = model.layers[0].words()
    assert (words.steps, words.wide_steps, words.hits, words.misses, words.overflow) == (2, 1, 4, 12, 8)


def test_padding_is_neither_brought_nor_counted(make_model):
    model = make_model(1, 4, large_tensors)
    rows = model.serve(0, torch.tensor([[5, 6], [9, -1], [10, 11]]), 1)
    assert rows.tolist() == [[0, 1], [0, -1], [0, 0]]
    assert model.layers[0].words().lookups == 2
    assert model.layers[0].serve(ids(7, -1), 0).tolist() == [[0, -1]]
    assert model.layers[0].words().steps == 1


def test_a_step_that_executes_a_guess_is_counted_as_speculated(make_model):
    model = make_model(1, 4, large_tensors)
    model.serve(0, ids(1, 2), 1, speculated=True)
    model.serve(0, ids(2, 3), 1)
    words = model.layers[0].words()
    assert (words.speculated, words.hits, words.misses, words.lookups, words.demanded) == (2, 1, 1, 4, 3)


@pytest.mark.parametrize(
    ("policy", "resident"), [("lru", [5, 6, 7]), ("lfu", [0, 1, 7]), ("lfru", [0, 6, 7]), ("ewma", [0, 1, 7])]
)
def test_who_stays_is_the_policys_choice(make_model, policy, resident):
    model = make_model(1, 3, large_tensors, policy=policy, top_k=1)
    for expert in [0] * 9 + [1] * 2 + [5, 6, 7]:
        model.serve(0, ids(expert), 1)
    words = model.layers[0].words()
    misses = words.misses
    for expert in resident:
        model.serve(0, ids(expert), 1)
    assert model.layers[0].words().misses == misses
    assert list(POLICIES)[words.policy] == policy


def test_a_prefetch_is_used_and_its_budget_is_kept(make_model):
    model = make_model(1, 6, large_tensors)
    (cache,) = model.layers
    assert cache.takes_guesses()
    cache.set_budget(0, 16)
    assert not cache.takes_guesses()
    cache.prefetch(torch.tensor([1, 2]), 1)
    assert cache.words().issued == 0
    cache.set_budget(1, 16)
    cache.prefetch(torch.tensor([1, 2]), 1)
    assert cache.words().issued == 1
    until(lambda: model.holds(0, 0, 1))
    model.serve(0, ids(1, 2), 1)
    words = cache.words()
    assert (words.used, words.misses, words.unused, words.num_in_flight) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    "guess", [ids(4, 5), ids(4, 5, dtype=torch.int64)[0], torch.tensor([[4, -1], [5, 4], [99, 5]])]
)
def test_guesses_of_any_shape_are_taken(make_model, guess):
    model = make_model(1, 6, large_tensors)
    model.layers[0].prefetch(guess, 1)
    assert model.layers[0].words().issued == 2
    model.serve(0, ids(4, 5), 1)
    assert model.layers[0].words().used == 2


@pytest.mark.parametrize("link", [None, EmulatedLink(0.2, 20.0)], ids=["no link", "link"])
def test_what_was_preloaded_is_read_by_the_next_layer_while_this_one_keeps_its_overflow_rows(make_model, link):
    torch.manual_seed(3)
    model = make_model(3, 6, large_tensors, 2, link)
    for number in range(120):
        num_tokens = 2 if number % 4 == 3 else 20
        for layer, cache in enumerate(model.layers):
            topk_ids = torch.stack([torch.randperm(16)[:2] for _ in range(num_tokens)])
            row_ids = model.serve(layer, topk_ids, num_tokens)
            if layer < 2:
                guess = torch.stack([torch.randperm(16 if number % 3 else 12)[:2] for _ in range(20)])
                model.layers[layer + 1].preload(guess, 20)
                model.layers[layer + 1].check_integrity()
            if number % 2:  # else the next layer comes while the copies run
                until(lambda: host_library().engine_num_queued(model.caches.engine) < 4)
                read = zip(row_ids.flatten().tolist(), topk_ids.flatten().tolist(), strict=True)
                assert all(model.holds(layer, row, expert) for row, expert in read), "overwritten before it was read"
            cache.check_integrity()
    first, *others = (cache.words() for cache in model.layers)
    assert first.issued == 0 < first.overflow
    for words in others:
        assert words.num_preloaded == words.num_in_flight == 0
        assert words.issued == words.used + words.unused + words.cancelled > 120 * 4
        assert min(words.unused, words.used) > 0
        assert words.overflow < first.overflow / 2
    if link:
        assert min(sum(words.late for words in others), sum(words.cancelled for words in others)) > 0


def test_a_guess_of_no_more_experts_than_slots_is_a_prefetch_with_its_budget(make_model):
    model = make_model(1, 6, large_tensors)
    (cache,) = model.layers
    cache.set_budget(2, 16)
    cache.preload(torch.tensor([[1, 3], [2, 4], [1, 5]]), 3)
    words = cache.words()
    assert (words.issued, words.num_preloaded) == (2, 0)
    until(lambda: model.holds(0, 0, 1) and model.holds(0, 1, 2))


def test_a_step_that_broke_off_leaves_nothing_on_its_way_to_overflow_rows(make_model):
    """Its next layer was preloaded for, and the next step begins with another one of the same area."""
    model = make_model(4, 6, large_tensors, 2, EmulatedLink(0.05, 0.0))
    every = torch.arange(16).view(8, 2)
    for _ in range(5):
        model.serve(0, every, 8)
        model.layers[1].preload(every, 8)
        row_ids = model.serve(3, every, 8)
        assert model.layers[1].words().num_preloaded == 0
        time.sleep(0.002)
        read = zip(row_ids.flatten().tolist(), range(16), strict=True)
        assert all(model.holds(3, row, expert) for row, expert in read)


def test_a_step_waits_for_what_is_under_way_into_rows_that_it_gives_back(make_model):
    model = make_model(3, 6, large_tensors, 2, EmulatedLink(1e-3, 0.0))
    held, others = torch.arange(6).view(3, 2), torch.arange(6, 16).view(5, 2)
    model.serve(1, held, 3)
    model.layers[1].preload(torch.cat([others, held]), 8)
    assert model.layers[1].words().num_preloaded == 10
    until(lambda: host_library().engine_num_queued(model.caches.engine) == 9)
    model.serve(1, held, 3)
    assert any(model.holds(1, row, expert) for row in range(6, 16) for expert in range(6, 16))


SLOW = EmulatedLink(1e-4, 0.0)
"""Nothing but what has begun gets anywhere within a test."""


def test_a_far_guess_brings_as_many_fewer_records_as_wait_for_the_link(make_model):
    model = make_model(3, 6, large_tensors, link=SLOW)
    near, other, far = model.layers
    near.prefetch(ids(1, 2, 3), 1)
    until(lambda: model.caches.library.engine_num_queued(model.caches.engine) == 2)
    far.set_budget(2, 16, distance=2)
    assert not far.takes_guesses(2)
    far.prefetch(ids(1, 2, 3), 1, 2)
    assert far.words().issued == 0
    far.set_budget(3, 16, distance=2)
    assert far.takes_guesses(2)
    far.prefetch(ids(1, 2, 3), 1, 2)
    assert far.words().issued == 1
    other.prefetch(ids(4, 5), 1)
    assert other.words().issued == 2, "the next layer's guesses do not look at the link"


def test_what_nearer_guesses_do_not_repeat_is_cancelled_unless_it_has_begun(make_model):
    model = make_model(2, 6, large_tensors, link=SLOW)
    model.layers[0].prefetch(ids(9), 1)
    until(lambda: model.caches.library.engine_num_queued(model.caches.engine) == 0)
    cache = model.layers[1]
    cache.prefetch(ids(1, 2, 3), 1, 2)
    cache.prefetch(ids(2, 4), 1, 1)
    words = cache.words()
    assert (words.issued, words.cancelled, words.num_in_flight, words.num_free) == (4, 2, 2, 4)
    assert model.caches.library.engine_num_queued(model.caches.engine) == 2
    model.layers[0].prefetch(ids(7), 1)
    assert model.layers[0].words().cancelled == 0, "its copy has begun"


def test_an_emulated_link_is_measured_as_what_it_is_and_nothing_is_counted(make_model):
    model = make_model(3, 6, large_tensors, link=EmulatedLink(16.0e-3, 0.0))
    model.serve(0, ids(1, 2), 1)
    before = [cache.words() for cache in model.layers]
    assert 0.5 * 16e6 < model.caches.measure_bandwidth() <= 16.1e6
    assert [cache.words() for cache in model.layers] == before
    assert model.holds(0, 0, 1)


def test_a_copy_that_was_disturbed_does_not_count_for_the_link(make_model, monkeypatch):
    model = make_model(3, 6, large_tensors)
    taken = [1.0, 9.0, 9.0, 9.0, 9.0, 2.0, 9.0, 3.0, 9.0]
    first, *_ = model.layers
    monkeypatch.setattr(type(first), "measure_copy", lambda self: taken.pop(0))
    assert model.caches.measure_bandwidth() == 3 * first.record_bytes / 6.0
    assert not taken


def test_without_a_cache_there_is_nothing_to_measure(make_model):
    model = make_model(1, 6, large_tensors)
    model.caches.layers[0] = None
    assert model.caches.measure_bandwidth() == 0.0


@pytest.mark.parametrize(
    ("topk_ids", "num_real", "error", "message"),
    [
        (torch.tensor([[1, 2]]), 2, ValueError, "ids has 2 items, needs 4"),
        (torch.tensor([[1.0, 2.0]]), 1, TypeError, "ids must be int"),
        (torch.tensor([[1, 2]], dtype=torch.int16), 1, TypeError, "ids must be int32"),
    ],
)
def test_ids_that_make_no_sense_are_refused_before_anything_changes(make_model, topk_ids, num_real, error, message):
    model = make_model(1, 6, large_tensors)
    before = model.layers[0].words()
    with pytest.raises(error, match=message):
        model.layers[0].serve(topk_ids, num_real)
    assert model.layers[0].words() == before


@pytest.mark.parametrize(("num_slots", "top_k", "message"), [(3, 4, "top-k 4"), (17, 2, "17 slots")])
def test_a_cache_whose_numbers_do_not_fit_is_refused(make_model, num_slots, top_k, message):
    model = make_model(2, 6, large_tensors)
    space = model.shared.row_space(0)
    with pytest.raises(ValueError, match=message):
        model.caches.add(1, model.layers[0].store, space, num_slots, top_k, "lru")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 0, "null address"),
        (2, 0, "null address"),
        (3, 0, "rows of 0 bytes"),
        (1, 100, "stride 100 of the store is below the row of 1024 bytes"),
        (1, 2**61, "more than an address space"),
        (2, None, "overlap"),
    ],
)
def test_segments_that_make_no_sense_are_refused(make_model, column, value, message):
    model = make_model(1, 6, large_tensors)
    library = host_library()
    store, rows = torch.zeros(16, 1024, dtype=torch.uint8), torch.zeros(16, 1024, dtype=torch.uint8)
    segment = [store.data_ptr(), 1024, rows.data_ptr(), 1024]
    segment[column] = segment[0] if value is None else value
    state, mirror = torch.zeros(library.planner_words(16, 6), dtype=torch.int64), model.caches.mirror[0]
    with pytest.raises(ValueError, match=message):
        library.cache_create(model.caches.engine, torch.tensor([segment]), 16, 6, 2, 0, 0, state, mirror)


@pytest.mark.parametrize(
    ("table", "index", "value", "message"),
    [
        ("row_of", 5, 0, "not inverse"),
        ("expert_in", 0, -1, "not inverse"),
        ("flags", 1, 0, "ranked or in flight are"),
        ("flags", 9, 1, "ranked or in flight are"),
        ("flags", 1, 5, "both ranked and in flight"),
        ("flags", 1, 4, "0 counted"),
        ("free", 0, 2, "free list"),
    ],
)
def test_check_state_sees_and_names_every_corruption(make_model, table, index, value, message):
    model = make_model(1, 4, large_tensors)
    model.serve(0, ids(1, 2), 1)
    (cache,) = model.layers
    state = cache.state.clone()
    check_state(state)
    starts = {"row_of": 0, "flags": 16, "last": 32, "count": 48, "expert_in": 64, "free": 80}
    state[len(cache.words()) + starts[table] + index] = value
    with pytest.raises(AssertionError, match=message):
        check_state(state)


def test_where_nothing_was_built_the_refusal_says_what_helps(monkeypatch):
    monkeypatch.setattr(create, "why_not_host", lambda: "not built: libvep_host.so needs a compiler")
    with pytest.raises(ConfigError, match=r"expert_prefetch: not built: libvep_host\.so needs a compiler"):
        create.create_caches(2, None, CPU)


def test_a_gpu_needs_the_cuda_library_as_well(monkeypatch):
    monkeypatch.setattr(create, "why_not_cuda", lambda: "not built: libvep_cuda.so needs nvcc")
    with pytest.raises(ConfigError, match=r"libvep_cuda\.so needs nvcc"):
        create.create_caches(2, None, torch.device("cuda"))
    assert create.why_no_cache(on_gpu=False) is None
    create.create_caches(2, None, CPU).close()


@pytest.mark.parametrize("num_rows", [1, 5])
def test_a_step_without_ids_computes_nothing_and_copies_nothing(make_model, num_rows):
    """A dummy run of vLLM may route every row to -1."""
    model = make_model(1, 6, large_tensors)
    cache = model.layers[0]
    before = cache.words()
    rows = model.caches.layers[0].serve(torch.full((num_rows, 2), -1, dtype=torch.int32), num_rows)
    assert rows.tolist() == [[-1, -1]] * num_rows
    assert cache.words()._replace(steps=0, tick=0) == before._replace(steps=0, tick=0)
    model.serve(0, torch.tensor([[3, 5]], dtype=torch.int32), 1)
