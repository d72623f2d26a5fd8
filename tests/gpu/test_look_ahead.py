"""Whole steps that look ahead, as DeviceStep runs them, in CUDA graphs and eagerly, against tables that hold every
expert: what is predicted, which rows are real and what may be fetched changes from replay to replay."""

from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.experts import DeviceLane, DeviceLayerCache, HostMemoryOptions, HostStore, SlotPool
from vllm_expert_prefetch.prediction import Prediction, Predictor, Signals
from vllm_expert_prefetch.prediction.truth import score
from vllm_expert_prefetch.serving.device_lookahead import DeviceLookAhead

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, TOP_K, NUM_TOKENS, OVER_FETCH = 4, 32, 20, 4, 3, 1
ROW_BYTES = (8192, 48)
USED, UNUSED, ISSUED, CANCELLED = 15, 16, 18, 19  # words of residency.h
FLAGS, UNTOUCHED = slice(24 + NUM_EXPERTS, 24 + 2 * NUM_EXPERTS), 8


class Told(Predictor):
    """Guesses what its tables hold at that moment; the last layer speaks of the next step's first one."""

    name = "told"
    crosses_tokens = True

    def __init__(self):
        super().__init__(NUM_LAYERS)
        shape = (NUM_LAYERS, NUM_TOKENS, TOP_K + OVER_FETCH)
        self.ids = torch.zeros(shape, dtype=torch.int64, device="cuda")
        self.weights = torch.ones(shape, device="cuda")

    def predict(self, source, signals, count):
        assert count == TOP_K + OVER_FETCH
        target = self.target_of(source)
        return Prediction(self.ids[target], self.weights[target])


class Layers:
    """All layers of one model; `run` is one forward pass, `route` gives it new routing, guesses and padding."""

    def __init__(self, policy):
        device = torch.device("cuda", torch.cuda.current_device())
        self.lane = DeviceLane(device)
        self.generator = torch.Generator("cuda").manual_seed(11)
        self.truth, self.pools, self.caches = [], [], []
        for layer in range(NUM_LAYERS):
            rows = torch.Generator().manual_seed(layer)
            tensors = {
                f"tensor{index}": torch.randint(0, 256, (NUM_EXPERTS, length), dtype=torch.uint8, generator=rows)
                for index, length in enumerate(ROW_BYTES)
            }
            self.truth.append({name: tensor.to(device) for name, tensor in tensors.items()})
            store = HostStore(tensors, HostMemoryOptions(pin=True, cuda=True))
            self.pools.append(SlotPool(store.views, NUM_SLOTS, device))
            self.caches.append(DeviceLayerCache(store, self.pools[-1], None, self.lane, TOP_K, policy))
        layers = [
            SimpleNamespace(
                device_cache=cache, is_fully_resident=False, num_experts=NUM_EXPERTS, top_k=TOP_K, accelerator=device
            )
            for cache in self.caches
        ]
        self.predictor = Told()
        self.look_ahead = DeviceLookAhead(self.predictor, layers, OVER_FETCH, forced=True)
        self.ids = torch.zeros(NUM_LAYERS, NUM_TOKENS, TOP_K, dtype=torch.int32, device=device)
        self.weights = torch.zeros(self.ids.shape, device=device)
        self.real = torch.zeros(NUM_TOKENS, dtype=torch.int64, device=device)
        self.seen = [
            {name: torch.zeros(NUM_TOKENS * TOP_K, length, dtype=torch.uint8, device=device) for name, length in sizes}
            for sizes in [[(f"tensor{index}", length) for index, length in enumerate(ROW_BYTES)]] * NUM_LAYERS
        ]
        self.num_differing = torch.zeros((), dtype=torch.int64, device=device)
        self.scored = torch.zeros(5, dtype=torch.float64, device=device)

    def route(self):
        """Half of the guesses are right; any rows are padding, at times all."""
        scores = torch.rand(NUM_LAYERS, NUM_TOKENS, NUM_EXPERTS, device="cuda", generator=self.generator)
        weights, ids = scores.topk(TOP_K)
        others = torch.rand(scores.shape, device="cuda", generator=self.generator).topk(TOP_K + OVER_FETCH)[1]
        self.ids.copy_(ids)
        self.weights.copy_(weights)
        self.predictor.ids.copy_(others)
        self.predictor.ids[:, :, :TOP_K] = torch.where(ids % 2 == 0, ids, others[:, :, :TOP_K])
        self.real.copy_(torch.randint(-1, 3, self.real.shape, device="cuda", generator=self.generator))

    def run(self):
        for layer, (cache, pool) in enumerate(zip(self.caches, self.pools, strict=True)):
            ids = self.ids[layer]
            slot_ids = cache.serve(ids, self.real)
            self.look_ahead.after_staging(layer, Signals(ids, ids, self.weights[layer]), self.real)
            for name, tensor in pool.tensors.items():
                torch.index_select(tensor, 0, slot_ids.flatten(), out=self.seen[layer][name])

    def check(self):
        """Hold what the last step saw, and how its guesses were scored, against the truth; without a look at it."""
        is_real = (self.real >= 0).repeat_interleave(TOP_K)
        for layer in range(NUM_LAYERS):
            wanted = self.ids[layer].flatten().long()
            for name, truth in self.truth[layer].items():
                self.num_differing += ((self.seen[layer][name] != truth[wanted]).any(-1) & is_real).sum()
        for layer in range(1, NUM_LAYERS):
            for row in range(NUM_TOKENS):
                one = slice(row, row + 1)
                guess = Prediction(self.predictor.ids[layer, one], self.predictor.weights[layer, one])
                true = Signals(self.ids[layer, one], self.ids[layer, one], self.weights[layer, one])
                self.scored += torch.stack(score(guess, true)) * (self.real[row] >= 0)

    def replay(self, graph, num_steps):
        for _ in range(num_steps):
            self.route()
            graph.replay()
            self.check()

    def capture(self):
        """As vLLM does: a step of warm-up, join, capture, join before it ends."""
        self.run()
        self.lane.join()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
            self.lane.join()
        return graph

    def totals(self, word):
        torch.cuda.synchronize()
        return [int(cache._state[word]) for cache in self.caches]

    def finish(self):
        """Every byte, every count."""
        self.lane.join()
        torch.cuda.synchronize()
        assert int(self.num_differing) == 0
        assert self.lane.num_errors() == 0
        for cache in self.caches:
            state = cache._state.tolist()
            pending = sum(bool(flags & UNTOUCHED) for flags in state[FLAGS])
            assert state[ISSUED] == state[USED] + state[UNUSED] + state[CANCELLED] + pending


@pytest.mark.parametrize("policy", ["lru", "lfru"])
def test_replays_fetch_for_their_own_guesses_and_every_layer_finds_its_experts(policy):
    layers = Layers(policy)
    layers.real.fill_(-1)
    graph = layers.capture()
    assert layers.totals(ISSUED) == [0] * NUM_LAYERS, "a step of padding has fetched"
    layers.replay(graph, 500)
    layers.finish()
    assert all(used > 0 for used in layers.totals(USED)), "no prefetch was of use"
    found = torch.tensor(layers.look_ahead.truth.totals(), dtype=torch.float64)
    torch.testing.assert_close(found, layers.scored.cpu(), rtol=1e-5, atol=1e-3)


def test_a_budget_that_changes_while_a_graph_is_replayed_is_obeyed():
    layers = Layers("lru")
    layers.route()
    graph = layers.capture()
    layers.replay(graph, 50)
    for cache in layers.caches:
        cache.set_prefetch_budget(0)
    before = layers.totals(ISSUED)
    layers.replay(graph, 50)
    assert layers.totals(ISSUED) == before, "something was fetched without a budget"
    for cache in layers.caches:
        cache.set_prefetch_budget(1)
    num_steps = 50
    layers.replay(graph, num_steps)
    after = layers.totals(ISSUED)
    assert all(0 < now - then <= num_steps for now, then in zip(after, before, strict=True))
    layers.finish()


def test_a_budget_that_changes_at_any_moment_does_no_harm():
    layers = Layers("lfru")
    layers.route()
    graph = layers.capture()
    for step in range(300):
        for number, cache in enumerate(layers.caches):  # while the step before may be running
            cache.set_prefetch_budget((step + number) % 7 - 1)
        layers.replay(graph, 1)
    layers.finish()


def test_eager_steps_and_replays_follow_each_other():
    layers = Layers("lru")
    layers.route()
    layers.run()
    graph = layers.capture()
    for _ in range(20):
        before = layers.lane.num_joins
        for _ in range(3):
            layers.route()
            layers.run()
            layers.check()
        assert layers.lane.num_joins == before + 2, "eager steps join once each, but for the first after a join"
        layers.lane.join()  # vLLM, before a replay
        layers.replay(graph, 3)
    layers.finish()


def test_nothing_waits_for_the_gpu():
    layers = Layers("lru")
    layers.route()
    layers.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers.run()
        layers.caches[0].set_prefetch_budget(3)
        layers.caches[0].totals()
        layers.look_ahead.truth.totals()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layers.finish()
