"""Prompts and the cache that decodes: what benchmarks/replay.py measures, on routing that is made up."""

import random

import pytest
from replay import Replay, load, measure

NUM_EXPERTS, TOP_K, LAYERS = 32, 4, 2


def routing(num_tokens, favourites, seed):
    """Tokens that choose among a few experts, others in each layer."""
    rng = random.Random(seed)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(
            {layer: rng.sample([(layer * 7 + e) % NUM_EXPERTS for e in favourites], TOP_K) for layer in range(LAYERS)}
        )
    return tokens


PROMPT = routing(20, range(NUM_EXPERTS), 1) + routing(10, range(20, 30), 2)
DECODED = routing(150, range(20, 30), 3)
OTHER_PROMPT = routing(50, range(16), 4)
"""Needs no expert that decoding uses."""


@pytest.mark.parametrize("policy", ["lru", "lfru"])
def test_after_a_prompt_decoding_finds_what_its_last_tokens_used(policy):
    found = measure(PROMPT, DECODED, NUM_EXPERTS, 0.35, policy)
    assert found["one_step"] >= found["by_token"] - 0.5
    assert found["one_step"] > found["untouched"]


def test_a_prompt_in_the_middle_that_needs_every_expert_costs_next_to_nothing():
    found = measure(PROMPT, DECODED, NUM_EXPERTS, 0.35, "lru")
    assert found["foreign_cost"] <= 2
    assert found["foreign_cost"] == pytest.approx(found["undisturbed"] - found["after_foreign"])
    assert found["next_tokens"] == 100


def test_a_prompt_in_the_middle_leaves_the_experts_in_use_that_it_does_not_need():
    model = Replay(OTHER_PROMPT, DECODED, NUM_EXPERTS, 11, "lru")
    assert model.decode(0, 50) < 100, "its slots were free"
    assert model.decode(50, 100) == 100, "the ten experts in use fit"
    model.prefill(one_step=True)
    assert model.decode(100, 150) == 100, "and a wide step has not evicted them"
    model.prefill(one_step=False)
    assert model.decode(100, 101) == 0, "where the same tokens, decoded, have"


def test_what_a_prompt_brings_leaves_before_what_decoding_uses():
    model = Replay(OTHER_PROMPT, DECODED, NUM_EXPERTS, 14, "lru")
    model.decode(0, 50)  # ten experts in use
    model.prefill(one_step=True)  # four of its own into the free slots
    model.decoded = routing(1, range(16, 20), 5)
    assert model.decode(0, 1) == 0
    model.decoded = DECODED
    assert model.decode(50, 100) == 100


def test_a_prompt_that_needs_everything_keeps_the_order_of_use():
    older, newer, others = ([{0: list(range(first, first + 6))}] for first in (0, 6, 12))
    everything = [{0: [*range(6, 12), *range(6), *range(12, NUM_EXPERTS)]}]
    model = Replay(everything, older + newer + others + newer, NUM_EXPERTS, 12, "lru")
    model.decode(0, 2)
    model.prefill(one_step=True)
    assert model.decode(2, 3) == 0
    assert model.decode(3, 4) == 100, "the older ones have left"


def test_a_recording_is_read_by_phase_step_and_layer(tmp_path):
    path = tmp_path / "model.route.csv"
    path.write_text("# header\nturn,phase,step,layer,slot,expert,weight\n0,0,0,0,0,5,1\n0,1,3,1,0,7,1\n0,1,3,1,1,8,1\n")
    assert load(path) == ([{0: [5]}], [{1: [7, 8]}])
