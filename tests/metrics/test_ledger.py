"""From words to series: what grows by how much, for all layers and for one, and what never falls."""

import random

import pytest
import torch
from counter_files import make_counters

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.metrics.counters import read_counters
from vllm_expert_prefetch.metrics.definitions import LAYER_SERIES, SERIES
from vllm_expert_prefetch.metrics.ledger import Ledger

RECORDS = (100, 7000, 30)
"""Bytes of one record, of each of three layers."""

RATE = 100.0
"""Of the link, bytes per second."""

GROWN = {
    "steps": 9,
    "wide_steps": 2,
    "hits": 50,
    "late": 6,
    "misses": 20,
    "speculated": 11,
    "overflow": 8,
    "evictions": 15,
    "used": 7,
    "unused": 5,
    "displaced": 3,
    "issued": 40,
    "cancelled": 10,
    "claimed": 4,
    "demanded": 24,
    "stall_ns": 3_000_000_000,
    "late_ns": 1_000_000_000,
}

EXPECTED = {
    "lookups_total/hit": 50,
    "lookups_total/late": 6,
    "lookups_total/miss": 20,
    "lookups_total/speculated": 11,
    "transfer_bytes_total/demand": 16 * 7000,
    "transfer_bytes_total/overflow": 8 * 7000,
    "transfer_bytes_total/prefetch": 26 * 7000,
    "transfer_seconds_total": 2,
    "stall_seconds_total": 3,
    "evictions_total": 15,
    "moe_steps_total/narrow": 7,
    "moe_steps_total/wide": 2,
    "predictions_total/used": 7,
    "predictions_total/unused": 5,
    "predictions_total/cancelled": 10,
    "displaced_lookups_total": 3,
    "saved_seconds_total": 7 * 7000 / RATE - 1,
}
"""What the counters hold after layer 1, whose record has 7000 bytes, has done what GROWN says; else they hold 0."""


@pytest.fixture
def mirror():
    """Words of three layers with six of eight slots filled, which have done something before they are counted."""
    words = torch.zeros(len(RECORDS), len(Words._fields), dtype=torch.int64)
    words[:, Words._fields.index("num_slots")] = 8
    words[:, Words._fields.index("num_free")] = 2
    words[:, Words._fields.index("hits")] = 1000
    return words


def grow(mirror, layer, **words):
    for name, amount in words.items():
        mirror[layer, Words._fields.index(name)] += amount


def shown(counters):
    """Series -> value, those of layers as (layer, series); zeros are left out."""
    snapshot = read_counters(counters.path)
    found = {series: snapshot.value(series) for series in SERIES}
    for layer in range(len(snapshot.layers)):
        found.update({(layer, series): snapshot.value(series, layer) for series in LAYER_SERIES})
    return {key: value for key, value in found.items() if value}


def test_each_series_grows_by_what_its_words_say(tmp_path, mirror):
    counters = make_counters(tmp_path)
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    grow(mirror, 1, **GROWN)
    ledger.publish()
    assert shown(counters) == pytest.approx({**EXPECTED, "resident_slots": 18})


def test_layers_are_counted_by_themselves_where_that_is_asked_for(tmp_path, mirror):
    counters = make_counters(tmp_path, layers=("0", "3", "4"))
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    grow(mirror, 1, **GROWN)
    ledger.publish()
    own = {(1, f"layer_{series}"): value for series, value in EXPECTED.items() if f"layer_{series}" in LAYER_SERIES}
    assert len(own) == 8
    assert shown(counters) == pytest.approx({**EXPECTED, **own, "resident_slots": 18})


def test_every_record_counts_with_its_own_size(tmp_path, mirror):
    counters = make_counters(tmp_path)
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    for layer in range(3):
        grow(mirror, layer, issued=1 + layer)
    ledger.publish()
    assert counters.get("transfer_bytes_total/prefetch") == 100 + 2 * 7000 + 3 * 30


def test_each_difference_is_returned_once_and_counted_once(tmp_path, mirror):
    counters = make_counters(tmp_path)
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    nothing = [Words._make([0] * len(Words._fields))] * 3
    assert ledger.publish() == nothing
    grow(mirror, 2, **GROWN)
    assert ledger.publish() == [*nothing[:2], nothing[2]._replace(**GROWN)]
    assert ledger.publish() == nothing
    assert counters.get("lookups_total/hit") == 50
    grow(mirror, 0, hits=1)
    assert [delta.hits for delta in ledger.publish()] == [1, 0, 0]
    assert counters.get("lookups_total/hit") == 51


def test_nothing_is_written_while_nothing_changes(tmp_path, mirror, monkeypatch):
    counters = make_counters(tmp_path)
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    grow(mirror, 0, **GROWN)
    ledger.publish()
    writes = []
    monkeypatch.setattr(counters, "add", lambda *call: writes.append(call))
    monkeypatch.setattr(counters, "set", lambda *call: writes.append(call))
    ledger.publish()
    assert writes == []


def test_slots_that_fill_and_empty_move_the_gauge(tmp_path, mirror):
    counters = make_counters(tmp_path)
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    grow(mirror, 0, num_free=-2, num_in_flight=1)
    ledger.publish()
    assert counters.get("resident_slots") == 7 + 6 + 6
    grow(mirror, 0, num_free=8, num_in_flight=-1)
    ledger.publish()
    assert counters.get("resident_slots") == 0 + 6 + 6


def test_no_counter_falls_when_a_gpu_is_seen_in_the_middle_of_a_step(tmp_path, mirror):
    """Ten copies queued, six of them cancelled: the cancellation is seen first."""
    counters = make_counters(tmp_path, layers=("0", "1", "2"))
    ledger = Ledger(counters, RECORDS, mirror, RATE)
    grow(mirror, 0, issued=5)
    ledger.publish()
    assert counters.get("transfer_bytes_total/prefetch") == 500
    grow(mirror, 0, cancelled=6, overflow=3)
    ledger.publish()
    assert counters.get("transfer_bytes_total/prefetch") == 500
    assert counters.get("transfer_bytes_total/demand") == 0
    grow(mirror, 0, issued=10, demanded=3)
    ledger.publish()
    assert counters.get("transfer_bytes_total/prefetch") == 900
    assert counters.get("transfer_bytes_total/demand") == 0
    assert counters.get("transfer_bytes_total/overflow") == 300


def test_ghost_caches_count_from_what_they_say_at_first(tmp_path, mirror):
    """Whatever the words of the caches that serve do: on a GPU a ghost's may come later."""
    ghosts = mirror.repeat(1, 2).view(len(RECORDS), 2, -1).clone()
    counters = make_counters(tmp_path)
    ledger = Ledger(counters, RECORDS, mirror, RATE, ghosts)
    ledger.publish()
    assert shown(counters) == {}
    for layer in range(3):
        grow(ghosts[:, 0], layer, hits=5, misses=2, speculated=9)
        grow(ghosts[:, 1], layer, hits=6, misses=1, evictions=3)
    ledger.publish()
    ledger.publish()
    assert shown(counters) == {
        "ghost_hits_total/1.5": 15,
        "ghost_lookups_total/1.5": 21,
        "ghost_hits_total/2": 18,
        "ghost_lookups_total/2": 21,
    }


@pytest.mark.parametrize("layers", [(), ("0", "1", "2")])
def test_a_random_walk_ends_where_one_look_at_its_end_does(tmp_path, mirror, layers):
    """However often the words are read between steps."""
    often, once = (make_counters(tmp_path, f"engine0-rank{rank}-000000", str(rank), layers) for rank in range(2))
    ledgers = [Ledger(counters, RECORDS, mirror, RATE) for counters in (often, once)]
    generator = random.Random(7)
    before = shown(often)
    for _ in range(60):
        times = generator.randrange(5)
        grow(mirror, generator.randrange(3), **{name: times * amount for name, amount in GROWN.items()})
        if generator.random() < 0.5:
            ledgers[0].publish()
        now = shown(often)
        assert {key: value for key, value in before.items() if now[key] < value} == {}
        before = now
    for ledger in ledgers:
        ledger.publish()
    assert shown(often) == pytest.approx(shown(once))
    assert shown(once)["lookups_total/hit"] == int(mirror[:, Words._fields.index("hits")].sum()) - 3 * 1000 > 0
