"""A model's worth of layers on a GPU that look ahead and share overflow rows, against tables that hold every expert.

Routing, guesses, padding and the width of steps change from replay to replay, and nothing of that is known at capture.
"""

import torch
from gpu_layer import GpuLayer, device, make_caches

from vllm_expert_prefetch.cache.words import Words

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, TOP_K, NUM_TOKENS, NUM_GUESSES = 4, 32, 12, 4, 12, 5
ROW_BYTES = (256 * 1024, 48)
"""32 rows of the first tensor take four pages of a GPU, two of them private; the other tensor is too small to share."""


class Model:
    """`run` is one forward pass, `route` gives it new routing, guesses and padding, `check` judges what it saw."""

    def __init__(self, policy="lru", depth=2, areas=1):
        """With two `areas`, the next layer is looked ahead to as for a wide step."""
        self.caches = make_caches(depth)
        self.areas = areas
        self.layers: list[GpuLayer] = []
        for _ in range(NUM_LAYERS):
            shared = self.layers[0].shared if self.layers else None
            layer = GpuLayer(ROW_BYTES, NUM_EXPERTS, NUM_SLOTS, self.caches, shared, TOP_K, policy, areas)
            self.layers.append(layer)
        self.generator = torch.Generator(device()).manual_seed(11)
        shape = (NUM_LAYERS, NUM_TOKENS)
        self.ids = torch.zeros(*shape, TOP_K, dtype=torch.int32, device=device())
        self.guesses = torch.zeros(*shape, NUM_GUESSES, dtype=torch.int64, device=device())
        self.rows = torch.zeros(NUM_TOKENS, dtype=torch.int64, device=device())
        self.row_ids = torch.zeros_like(self.ids)
        self.seen = [
            {name: torch.zeros(NUM_TOKENS * TOP_K, *t.shape[1:], dtype=t.dtype, device=device()) for name, t in tensors}
            for tensors in [list(layer.tensors.items()) for layer in self.layers]
        ]
        self.num_differing = torch.zeros((), dtype=torch.int64, device=device())

    def route(self, num_experts=NUM_EXPERTS, share_real=0.7):
        """Each layer asks for any of `num_experts` experts; some ids are -1, some rows padding, at times all."""
        scores = torch.rand(NUM_LAYERS, NUM_TOKENS, NUM_EXPERTS, device=device(), generator=self.generator)
        scores[..., num_experts:] = 0
        ids = scores.topk(TOP_K)[1]
        others = torch.rand(scores.shape, device=device(), generator=self.generator).topk(NUM_GUESSES)[1]
        self.guesses.copy_(others)
        self.guesses[:, :, :TOP_K] = torch.where(ids % 2 == 0, ids, others[:, :, :TOP_K])
        drawn = torch.rand(ids.shape, device=device(), generator=self.generator)
        self.ids.copy_(torch.where(drawn < 0.05, -1, ids))
        drawn = torch.rand(NUM_TOKENS, device=device(), generator=self.generator)
        self.rows.copy_(torch.where(drawn < share_real, 7, -1))

    def run(self, ahead=True):
        for number, layer in enumerate(self.layers):
            row_ids = layer.cache.serve(self.ids[number], self.rows)
            with self.caches.aside():
                for distance in range(1, self.caches.depth + 1) if ahead else ():
                    if number + distance < NUM_LAYERS:
                        guess, cache = self.guesses[number + distance], self.layers[number + distance].cache
                        if self.areas > 1 and distance == 1:
                            cache.preload(guess, self.rows)
                        else:
                            cache.prefetch(guess, self.rows, distance)
            self.row_ids[number].copy_(row_ids)
            chosen = row_ids.flatten().clamp(min=0)
            for name, tensor in layer.tensors.items():
                torch.index_select(tensor, 0, chosen, out=self.seen[number][name])

    def check(self):
        """Hold what the last step saw against the truth, without a look at it: padding saw the first real entry's."""
        is_row = (self.rows >= 0).repeat_interleave(TOP_K)
        for number, layer in enumerate(self.layers):
            ids, row_ids = self.ids[number].flatten().long(), self.row_ids[number].flatten()
            is_real = is_row & (ids >= 0)
            first = ids.gather(0, is_real.int().argmax(0, keepdim=True))
            wanted = torch.where(is_real, ids, first)
            counted = (ids >= 0) & is_real.any()
            self.num_differing += ((row_ids < 0) != (ids < 0)).sum()
            for name, truth in layer.truth.items():
                differs = (self.seen[number][name] != truth.index_select(0, wanted.clamp(min=0))).any(-1)
                self.num_differing += (differs & counted).sum()

    def step(self, graph=None, **routing):
        """A step with other routing, as a replay of `graph` when there is one."""
        self.route(**routing)
        if graph is None:
            self.run()
        else:
            graph.replay()
        self.check()

    def capture(self, ahead=True):
        """As vLLM does: a step of warm-up, join, capture, join before it ends."""
        self.run(ahead)
        self.caches.join()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(ahead)
            self.caches.join()
        return graph

    def words(self):
        """Of every layer, from the planner itself."""
        torch.cuda.synchronize()
        return [Words._make(layer.cache.state[: len(Words._fields)].tolist()) for layer in self.layers]

    def finish(self):
        """Every byte, every count. Returns the words."""
        self.caches.join()
        found = self.words()
        assert int(self.num_differing) == 0
        assert self.caches.num_errors() == 0
        assert int(self.caches.lane[1]) == 0, "nothing waits for its copy any more"
        for layer, words in zip(self.layers, found, strict=True):
            layer.cache.check_integrity()
            flags = layer.cache.state[len(words) + NUM_EXPERTS :][:NUM_EXPERTS]
            pending = int((flags & 8 != 0).sum())  # kUntouched
            assert words.issued == words.used + words.unused + words.cancelled + pending
            assert words.demanded == words.misses + words.claimed
        return found
