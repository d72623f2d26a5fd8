"""Ghost caches count what a larger cache would find, and change nothing of the one that serves."""

import random

import pytest
import torch
from expert_tensors import NUM_EXPERTS, expert_tensors

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.residency import POLICIES, ExpertCache

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

NUM_SLOTS, SCALES = 3, (1.5, 9.0)
GHOST_SLOTS = (4, NUM_EXPERTS)
"""Rounded down, and no more than there are experts."""


def steps(num_layers, seed=3, count=150):
    """(layer, ids, tokens among the rows, whether a guess is executed, guess), narrow ones and wide ones."""
    rng = random.Random(seed)
    for _ in range(count):
        for layer in range(num_layers):
            num_rows, num_real = rng.choice([(1, 1), (1, 1), (2, 1), (3, 3), (12, 9)])
            pool = rng.sample(range(NUM_EXPERTS), rng.choice([4, NUM_EXPERTS]))
            ids = torch.tensor(
                [rng.sample(pool, 2) for _ in range(num_rows)], dtype=rng.choice([torch.int32, torch.int64])
            )
            if rng.random() < 0.1:
                ids[rng.randrange(num_rows)] = -1
            yield layer, ids, num_real, rng.random() < 0.1, torch.tensor(rng.sample(range(NUM_EXPERTS), 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_they_count_what_the_specification_counts_at_their_size_whatever_is_prefetched(make_model, policy):
    model = make_model(2, NUM_SLOTS, expert_tensors, 1, EmulatedLink(0.5, 5.0), policy)
    model.caches.add_ghosts(SCALES)
    specified = [[ExpertCache(NUM_EXPERTS, slots, POLICIES[policy]) for slots in GHOST_SLOTS] for _ in range(2)]
    expected = torch.zeros(2, len(SCALES), 4, dtype=torch.int64)
    for layer, ids, num_real, speculated, guess in steps(2):
        model.serve(layer, ids, num_real, speculated)
        model.layers[1 - layer].prefetch(guess, 1)
        for ghost, cache in enumerate(specified[layer]):
            plan = cache.plan(ids[:num_real].flatten().tolist())
            hits, misses = plan.num_hits, len(plan.loads)
            counted = [0, 0, hits + misses] if speculated else [hits, misses, 0]
            expected[layer, ghost] += torch.tensor([*counted, plan.num_evictions])
    names = ("hits", "misses", "speculated", "evictions")
    found = model.caches.ghost_mirror[:, :, [Words._fields.index(name) for name in names]]
    assert found.tolist() == expected.tolist()
    slots = model.caches.ghost_mirror[:, :, Words._fields.index("num_slots")]
    assert slots.tolist() == [[*GHOST_SLOTS]] * 2
    assert 0 < expected[:, 0, 0].sum() < expected[:, 1, 0].sum(), "more slots, more hits"
    assert sum(cache.words().used for cache in model.layers) > 0


def test_the_cache_that_serves_does_what_it_does_without_them(make_model):
    with_ghosts, without = (make_model(2, NUM_SLOTS, expert_tensors, 1, None, "ewma") for _ in range(2))
    with_ghosts.caches.add_ghosts(SCALES)
    for layer, ids, num_real, speculated, _ in steps(2):
        rows = [model.serve(layer, ids, num_real, speculated) for model in (with_ghosts, without)]
        assert torch.equal(*rows)
    for one, other in zip(with_ghosts.layers, without.layers, strict=True):
        assert one.words()._replace(stall_ns=0, late_ns=0) == other.words()._replace(stall_ns=0, late_ns=0)
        one.check_integrity()
    assert without.caches.ghost_mirror is None


def test_states_that_are_not_those_of_the_ghosts_are_refused(make_model):
    (cache,) = make_model(1, NUM_SLOTS, expert_tensors).layers
    with pytest.raises(ValueError, match="are not those of 3 caches"):
        cache.add_ghosts([4, 6], torch.zeros(3, len(Words._fields), dtype=torch.int64))
    with pytest.raises(ValueError, match="slots"):
        cache.add_ghosts([NUM_EXPERTS + 1], torch.zeros(1, len(Words._fields), dtype=torch.int64))
