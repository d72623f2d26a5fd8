"""What a profile gains is what a cache with warm slots and one with free slots really miss of the same steps."""

import random

import pytest
import torch
from routed import LAYERS, RECORD_BYTES, SLOTS, TOP_K, make_caches, serve

from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.planning.warm_start import LayerStart, WarmStart

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))


class Watched:
    """A recorder's place, taken by `own`."""

    def __init__(self, own):
        self.own, self.ends = own, []

    def note(self, number, ids, num_tokens, weights):
        self.own.note(number, ids.numpy()[:num_tokens])

    def end_step(self, prefilling, decoding, seconds, tokens):
        self.ends.append(self.own.end_step(decoding))


def warmed(hot):
    caches = make_caches()
    for cache in caches.layers:
        cache.serve(torch.tensor([hot]), 1)
    states = [cache.state.numpy().copy() for cache in caches.layers]
    starts = {n: LayerStart(12, SLOTS, TOP_K, RECORD_BYTES, state) for n, state in enumerate(states)}
    return caches, WarmStart(starts, "ewma")


def misses(caches):
    return sum(cache.words().misses for cache in caches.layers)


def test_both_starts_are_counted_as_caches_count_them():
    warm, start = warmed([0, 1, 2, 3, 4])
    cold, before = make_caches(), misses(warm)
    watched = Watched(start)
    serve(warm, watched, random.Random(5), 7)
    serve(cold, None, random.Random(5), 7)
    own, other = misses(warm) - before, misses(cold)
    assert own < other
    num_bytes = (other - own) * RECORD_BYTES
    text = start.describe(num_bytes / 0.25)
    assert f"gave {own} misses instead of {other} (a cold start)" in text
    assert text.endswith(f"{num_bytes / 1e6:.1f} MB and 250.0 ms of link less")
    assert start.describe(0.0).endswith("MB of link less"), "a link that nobody measured"


def test_it_ends_after_a_hundred_tokens():
    _, start = warmed([0, 1, 2, 3, 4])
    assert [start.end_step(0), start.end_step(60), start.end_step(39), start.end_step(1)] == [False] * 3 + [True]


def test_a_profile_of_what_nobody_wants_gives_nothing():
    _, start = warmed([7, 8, 9, 10, 11])
    for number in range(LAYERS):
        start.note(number, torch.tensor([[0, 1], [-1, -1]]).numpy())
    assert "gave 6 misses instead of 6 " in start.describe(1e9)
