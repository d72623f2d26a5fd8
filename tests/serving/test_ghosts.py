"""Ghost caches inside vLLM count what `vllm-expert-prefetch simulate` finds in a recording of the same steps."""

import json

import pytest
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts
from test_growth import KV_BYTES, Measured

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.config import GHOST_SCALES

pytestmark = pytest.mark.engine
NUM_LAYERS, NUM_EXPERTS = 8, 16


@pytest.fixture(scope="module")
def expected():
    with open_engine(TINY_MODEL, None) as llm:
        return greedy(llm, prompts(6), 24)


def hit_rate(trace, slots, policy, capsys):
    """Of the recording, as the command prints it for so many slots."""
    capsys.readouterr()
    assert main(["simulate", str(trace), "--slots", str(slots), "--policies", policy, "--no-bounds", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    return row["hit_rate"]


def ghost_hits(found):
    return [found[f"ghost_hits_total/{scale}"] for scale in GHOST_SCALES]


@pytest.mark.parametrize(
    ("config", "slots", "policy"),
    [
        ({"slots_per_layer": 5}, (7, 10), "ewma"),
        ({"slots_per_layer": 9, "policy": "lru", "prefetch": "on", "emulated_link_gbps": 1}, (13, 16), "lru"),
    ],
)
def test_they_hit_what_a_simulation_of_the_same_steps_hits(tmp_path, capsys, expected, config, slots, policy):
    """Whatever the cache that serves prefetches: theirs is demand alone."""
    with open_engine(TINY_MODEL, config | {"ghost_caches": True, "trace": str(tmp_path)}) as llm:
        assert greedy(llm, prompts(6), 24) == expected
        found = counters(llm)
    lookups = sum(found[f"lookups_total/{outcome}"] for outcome in ("hit", "late", "miss"))
    assert [found[f"ghost_lookups_total/{scale}"] for scale in GHOST_SCALES] == [lookups] * 2
    assert [hits / lookups for hits in ghost_hits(found)] == [hit_rate(tmp_path, n, policy, capsys) for n in slots]
    assert 0 < ghost_hits(found)[0] < ghost_hits(found)[1] < lookups
    assert (found["predictions_total/used"] > 0) == ("prefetch" in config)


def test_a_cache_that_grows_has_ghosts_of_what_it_has_grown_to(monkeypatch, expected):
    Measured(monkeypatch, records=7 * 2.5)
    with open_engine(TINY_MODEL, {"ghost_caches": True}, kv_cache_memory_bytes=KV_BYTES) as llm:
        assert greedy(llm, prompts(6), 24) == expected
        assert [cache.num_slots for cache in caches(llm)] == [4] * NUM_LAYERS
        mirror = layers(llm)[0].worker.caches.ghost_mirror
        assert mirror[:, :, 1].tolist() == [[6, 8]] * NUM_LAYERS, "slots"
        assert 0 < counters(llm)["lookups_total/hit"] < ghost_hits(counters(llm))[0]


def test_without_the_key_there_are_none(expected):
    with open_engine(TINY_MODEL, {"slots_per_layer": 5}) as llm:
        assert greedy(llm, prompts(6), 24) == expected
        assert layers(llm)[0].worker.caches.ghost_mirror is None
        assert counters(llm)["lookups_total/hit"] > 0
        assert ghost_hits(counters(llm)) == [0, 0]
