"""The cache of the CPU platform: whatever is routed and prefetched, a kernel reads the right records, and no others."""

import random
import time

import pytest
import torch
from expert_tensors import NUM_EXPERTS, bits, expert_tensors

from vllm_expert_prefetch.cache.create import create_shared_rows
from vllm_expert_prefetch.cache.host import HostCaches
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.native.library import host_library, why_not_host

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

CPU = torch.device("cpu")


class Model:
    """Layers with different experts that share their overflow rows."""

    def __init__(self, num_layers, num_slots, tensors_of, areas=1, link=None, policy="lru", top_k=2):
        self.caches = HostCaches(host_library(), num_layers, link)
        stores = [HostStore(tensors_of(number), HostMemoryOptions()) for number in range(num_layers)]
        self.shared = create_shared_rows(stores[0].views, num_slots, areas, CPU)
        for number, store in enumerate(stores):
            space = self.shared.row_space(number % areas)
            self.caches.add(number, store, space, num_slots, top_k, policy)

    def serve(self, number, topk_ids, num_real):
        """Serve a step, and compare every row that a kernel would read with the host store."""
        cache = self.caches.layers[number]
        row_ids = cache.serve(topk_ids, num_real)
        assert row_ids.shape == topk_ids.shape
        assert row_ids.dtype == topk_ids.dtype
        assert ((row_ids < 0) == (topk_ids < 0)).all()
        for expert, row in zip(
            topk_ids[:num_real].flatten().tolist(), row_ids[:num_real].flatten().tolist(), strict=True
        ):
            if expert >= 0:
                for name, view in cache.store.views.items():
                    assert torch.equal(bits(cache.tensors[name][row]), bits(view[expert])), (name, expert, row)
        return row_ids


@pytest.fixture
def make_model():
    made = []

    def make(*arguments, **named):
        made.append(Model(*arguments, **named))
        return made[-1]

    yield make
    for model in made:
        model.caches.close()


def large_tensors(seed):
    """Rows of several pages, of parts of one, and of a few bytes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w13": (16, 3000), "w2": (16, 1111), "scale": (16, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("areas", [1, 2])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru"])
@pytest.mark.parametrize("link", [None, EmulatedLink(20.0, 1.0)], ids=["no link", "link"])
def test_every_step_of_every_layer_reads_its_own_experts(make_model, areas, policy, link):
    rng = random.Random(7)
    model = make_model(3, 6, large_tensors, areas, link, policy)
    for _ in range(120):
        for number, cache in enumerate(model.caches.layers):
            num_rows, num_real = rng.choice([(1, 1), (2, 1), (3, 3), (12, 12), (40, 33)]), None
            num_rows, num_real = num_rows
            ids = torch.stack([torch.randperm(16)[:2] for _ in range(num_rows)]).to(
                rng.choice([torch.int32, torch.int64])
            )
            if rng.random() < 0.1:
                ids[rng.randrange(num_rows)] = -1
            model.serve(number, ids, num_real)
            following = (number + 1) % 3
            guess = torch.tensor(rng.sample(range(16), 4))
            model.caches.prefetch([(following, guess)], 1)
            cache.check_integrity()
    for cache in model.caches.layers:
        words = cache.words()
        assert words.lookups == words.hits + words.late + words.misses
        assert min(words.hits, words.misses, words.overflow, words.used, words.wide_steps) > 0
        assert words.demanded == words.misses + words.claimed
        pending = words.issued - words.used - words.unused - words.cancelled
        assert 0 <= pending <= cache.num_slots
        assert model.caches.mirror[cache_number(model, cache)].tolist() == list(words)


def cache_number(model, cache):
    return model.caches.layers.index(cache)


@pytest.mark.parametrize("num_slots", range(2, NUM_EXPERTS))
def test_records_of_odd_sizes_at_every_number_of_slots(make_model, num_slots):
    model = make_model(2, num_slots, expert_tensors)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        for number in range(2):
            ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:2] for _ in range(1 + seed % 5)])
            model.serve(number, ids, len(ids))


def test_overflow_rows_are_one_memory_for_all_layers(make_model):
    model = make_model(2, 4, large_tensors)
    first, second = model.caches.layers
    first.tensors["w13"][15] = 7.0
    assert (second.tensors["w13"][15] == 7.0).all()
    first.tensors["w13"][3] = 7.0
    assert (second.tensors["w13"][3] == 0.0).all()
    one = sum(view[0].nbytes for view in first.store.views.values())
    assert 10 * one < model.shared.num_bytes < 13 * one


def test_two_areas_are_apart(make_model):
    model = make_model(2, 4, large_tensors, areas=2)
    first, second = model.caches.layers
    first.tensors["w13"][15] = 7.0
    assert (second.tensors["w13"][15] == 0.0).all()


def test_a_prefetch_is_used_and_its_budget_is_kept(make_model):
    model = make_model(1, 6, large_tensors)
    cache = model.caches.layers[0]
    cache.set_budget(0, 3)
    assert not cache.takes_guesses
    cache.prefetch(torch.tensor([1, 2]), 1)
    assert cache.words().issued == 0
    cache.set_budget(1, 3)
    cache.prefetch(torch.tensor([1, 2]), 1)
    assert cache.words().issued == 1
    deadline = time.perf_counter() + 20
    while not bool((cache.tensors["w13"][0] == cache.store.views["w13"][1]).all()):
        assert time.perf_counter() < deadline
    model.serve(0, torch.tensor([[1, 2]]), 1)
    assert (cache.words().used, cache.words().misses) == (1, 1)


def test_time_over_a_slow_link_is_counted_as_stall(make_model):
    model = make_model(1, 6, large_tensors, link=EmulatedLink(16.0e-3, 0.0))
    cache = model.caches.layers[0]
    model.serve(0, torch.tensor([[1, 2]]), 1)
    expected = 2 * cache.record_bytes / 16.0e6
    assert expected <= cache.words().stall_ns / 1e9 < 3 * expected
    assert cache.words().late_ns == 0
    assert 0.5 * 16e6 < model.caches.measure_bandwidth() <= 16.1e6


def test_closed_caches_say_so(make_model):
    model = make_model(1, 6, large_tensors)
    model.caches.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.serve(0, torch.tensor([[1, 2]]), 1)
