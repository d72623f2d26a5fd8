"""Prompts and the cache that decodes: what benchmarks/replay.py measures, on routing that is made up."""

import random

import pytest
from replay import load, measure

NUM_EXPERTS, TOP_K, LAYERS = 32, 4, 2


def routing(num_tokens, favourites, seed):
    """Tokens that mostly choose among a few experts, others in each layer."""
    rng = random.Random(seed)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(
            {layer: rng.sample([(layer * 7 + e) % NUM_EXPERTS for e in favourites], TOP_K) for layer in range(LAYERS)}
        )
    return tokens


PROMPT = routing(20, range(NUM_EXPERTS), 1) + routing(10, range(20, 30), 2)
DECODED = routing(150, range(20, 30), 3)


@pytest.mark.parametrize("policy", ["lru", "lfru"])
def test_after_a_prompt_decoding_finds_what_its_last_tokens_used(policy):
    found = measure(PROMPT, DECODED, NUM_EXPERTS, 0.35, policy)
    assert found["one_step"] >= found["by_token"] - 0.5
    assert found["one_step"] > found["untouched"]


def test_another_prompt_in_the_middle_leaves_the_experts_in_use():
    assert measure(PROMPT, DECODED, NUM_EXPERTS, 0.35, "lru")["foreign_cost"] <= 2


def test_a_recording_is_read_by_phase_step_and_layer(tmp_path):
    path = tmp_path / "model.route.csv"
    path.write_text("# header\nturn,phase,step,layer,slot,expert,weight\n0,0,0,0,0,5,1\n0,1,3,1,0,7,1\n0,1,3,1,1,8,1\n")
    assert load(path) == ([{0: [5]}], [{1: [7, 8]}])
