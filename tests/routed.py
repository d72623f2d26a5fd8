"""Layers that are served without a model, and recorded."""

import random

import torch

from vllm_expert_prefetch.cache.create import create_shared_rows
from vllm_expert_prefetch.cache.host import HostCaches
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.native.library import host_library
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.recorder import Recorder

EXPERTS, SLOTS, TOP_K, LAYERS = 12, 5, 2, 3
RECORD_BYTES = 64
CARD = TraceCard(
    "tiny",
    ("0", "1", "2"),
    (EXPERTS,) * LAYERS,
    (TOP_K,) * LAYERS,
    (RECORD_BYTES,) * LAYERS,
    (SLOTS,) * LAYERS,
    "ewma",
)


def make_caches(num_experts=EXPERTS):
    """The caches of LAYERS layers, whose records are 64 bytes."""
    caches = HostCaches(host_library(), LAYERS, None)
    for number in range(LAYERS):
        store = HostStore({"w13": torch.zeros(num_experts, RECORD_BYTES // 4)}, HostMemoryOptions())
        rows = create_shared_rows(store.views, SLOTS, 1, torch.device("cpu")).row_space(0)
        caches.add(number, store, rows, SLOTS, TOP_K, "ewma")
    return caches


def serve(caches, recorder: Recorder | None, rng: random.Random, num_steps, num_experts=EXPERTS):
    """Steps of one to four tokens, with padding behind them; every third one prefills, with many tokens.

    The weights of an expert are its number over 1000. The first half of the tokens is of `secret-1`.
    """
    for step in range(num_steps):
        prefills = step % 3 == 0
        num_tokens = rng.randint(6, 20) if prefills else rng.randint(1, 4)
        for number, cache in enumerate(caches.layers):
            ids = torch.tensor([rng.sample(range(num_experts), TOP_K) for _ in range(num_tokens + 2)])
            if recorder is not None:
                recorder.note(number, ids, num_tokens, ids / 1000)
            cache.serve(ids, num_tokens)
        if recorder is not None:
            first = num_tokens // 2
            tokens = [("secret-1", num_tokens - first), ("secret-0", first)][: 2 if first else 1]
            recorder.end_step(int(prefills), 0 if prefills else num_tokens, 0.25, tokens)
