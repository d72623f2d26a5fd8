"""Looking ahead, against caches that only note what they are asked: which layer's experts, how many, and when not."""

import time
from types import SimpleNamespace

import pytest
import torch
from toy_moe import EXPERTS, TOP_K, make_gates, tokens

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead.after import LookAhead, close_ones, most_wanted
from vllm_expert_prefetch.lookahead.create import choose_predictors, depth_of, why_not
from vllm_expert_prefetch.memory import host_memory
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.prediction import (
    Artifact,
    ArtifactError,
    Card,
    Ingredients,
    Prediction,
    Predictor,
    Signals,
    create_predictor,
    fingerprint,
    save_artifact,
)
from vllm_expert_prefetch.prediction.truth import score

CPU = torch.device("cpu")
NUM_SLOTS, RECORD_BYTES = 8, 1000


class NotedCache:
    """Notes what it is asked to prefetch, and how many of it may come. `link_is_busy`: too busy for far guesses."""

    num_experts = num_routed = EXPERTS
    num_slots, top_k, record_bytes = NUM_SLOTS, TOP_K, RECORD_BYTES

    def __init__(self, caches, number):
        self.caches, self.number = caches, number
        self.asked, self.budgets, self.link_is_busy = [], {}, False
        self.preloaded = []

    @property
    def records(self):
        return self.budgets[1][0]

    @property
    def guesses(self):
        return self.budgets[1][1]

    def local(self, ids):
        return ids

    def set_budget(self, num_records, num_guesses, distance=1):
        self.budgets[distance] = num_records, num_guesses

    def takes_guesses(self, distance=1):
        return self.budgets[distance][0] > 0 and not (distance > 1 and self.link_is_busy)

    def prefetch(self, predicted, rows, distance=1):
        self.caches.order.append((self.number, distance))
        self.asked.append((predicted.tolist(), rows))

    def preload(self, predicted, rows):
        self.preloaded.append((predicted.tolist(), rows))


class NotedCaches:
    on_device = False
    link: EmulatedLink | None = EmulatedLink(1.0, 0.0)

    def __init__(self, num_layers):
        self.layers = [NotedCache(self, number) for number in range(num_layers)]
        self.order = []
        """(layer, distance) of what was asked for."""


class Told(Predictor):
    """Guesses the experts 0, 1, 2... of each token of the layer so far ahead."""

    name = "told"

    def predict(self, source, signals, count):
        rows = len(signals.topk_ids)
        return Prediction(torch.arange(count).repeat(rows, 1), torch.linspace(1, 0.95, count).repeat(rows, 1))


def make(predictor=None, num_layers=4, over_fetch=1, forced=True, link=1e9, depth=1, **named):
    caches = NotedCaches(num_layers)
    predictors = [predictor] if predictor else [Told(num_layers, distance) for distance in range(1, depth + 1)]
    look_ahead = LookAhead(predictors, caches, over_fetch, forced, link, CPU, **named)
    return look_ahead, caches


def signals(num_tokens=1):
    return Signals(torch.ones(num_tokens, 4), torch.tensor([[0, 1]] * num_tokens), torch.ones(num_tokens, TOP_K))


def a_step(look_ahead, num_layers=4, num_tokens=1, num_rows=None):
    for layer in range(num_layers):
        look_ahead.after(layer, signals(num_rows or num_tokens), num_tokens)


def words(**named):
    return Words(*[0] * len(Words._fields))._replace(**named)


def test_every_layer_but_the_last_asks_for_the_next_ones_experts():
    look_ahead, caches = make()
    a_step(look_ahead)
    assert caches.order == [(1, 1), (2, 1), (3, 1)]
    assert caches.layers[1].asked == [([0, 1, 2], 1)]
    assert caches.layers[0].asked == []


def test_farther_layers_are_asked_for_after_the_next_one_and_with_top_k_alone():
    look_ahead, caches = make(depth=3)
    a_step(look_ahead)
    assert caches.order == [(1, 1), (2, 2), (3, 3), (2, 1), (3, 2), (3, 1)]
    assert [experts for experts, _ in caches.layers[3].asked] == [[0, 1], [0, 1], [0, 1, 2]]


def test_a_busy_link_saves_far_guesses():
    look_ahead, caches = make(depth=3)
    caches.layers[2].link_is_busy = True
    a_step(look_ahead)
    assert caches.order == [(1, 1), (3, 3), (2, 1), (3, 2), (3, 1)]


def test_a_valve_takes_distances_away():
    look_ahead, caches = make(depth=3)
    look_ahead.valves[3].depth = 1
    look_ahead.note([words()] * 4, None)
    a_step(look_ahead)
    assert caches.order == [(1, 1), (2, 2), (2, 1), (3, 1)]


def test_how_many_layers_are_open_at_each_distance_is_published():
    look_ahead, _ = make(depth=3)
    look_ahead.valves[3].depth = 1
    look_ahead.note([words()] * 4, None)
    published = {}
    look_ahead.publish(SimpleNamespace(set=published.__setitem__))
    assert published == {f"lookahead_open_layers/{distance}": number for distance, number in ((1, 3), (2, 1), (3, 0))}


def test_behind_a_wide_step_all_guesses_for_the_next_layer_are_preloaded_and_nothing_else_is_asked_for():
    look_ahead, caches = make(depth=3, preloads=True)
    wide = EXPERTS // TOP_K + 1
    a_step(look_ahead, num_tokens=wide)
    assert [len(cache.preloaded) for cache in caches.layers] == [0, 1, 1, 1]
    assert caches.layers[1].preloaded == [([[0, 1]] * wide, wide)], "top-k guesses of every token"
    assert caches.order == []
    a_step(look_ahead, num_tokens=wide - 1)
    assert [len(cache.preloaded) for cache in caches.layers] == [0, 1, 1, 1]
    assert (1, 1) in caches.order


def test_closed_valves_say_nothing_of_wide_steps():
    look_ahead, caches = make(preloads=True)
    for valve in look_ahead.valves:
        valve.depth = 0
    look_ahead.note([words()] * 4, None)
    a_step(look_ahead, num_tokens=EXPERTS)
    assert [len(cache.preloaded) for cache in caches.layers] == [0, 1, 1, 1]
    assert look_ahead._spent == [0.0] * 4, "what valves of narrow steps are told"


def test_with_one_area_nothing_is_fetched_behind_a_wide_step():
    look_ahead, caches = make(depth=3)
    a_step(look_ahead, num_tokens=EXPERTS)
    assert (caches.order, [cache.preloaded for cache in caches.layers]) == ([], [[]] * 4)


def test_what_is_guessed_across_tokens_is_not_preloaded():
    """The last layer's guess is for the next step, whose layers come first."""

    class NextToken(Told):
        crosses_tokens = True

        def target_of(self, source):
            return (source + 1) % 4

    look_ahead, caches = make(NextToken(4, 1), preloads=True)
    a_step(look_ahead, num_tokens=EXPERTS)
    assert [len(cache.preloaded) for cache in caches.layers] == [0, 1, 1, 1]


def test_recall_is_that_of_the_nearest_guess():
    look_ahead, _ = make(depth=3)
    look_ahead.recall.scored_every = 1
    look_ahead.predictors[2].predict = lambda *_: Prediction(torch.tensor([[6, 7]]), torch.ones(1, 2))
    a_step(look_ahead)
    assert look_ahead.recall._sums[3].tolist() == [1, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("asked", "num_layers", "on_gpu", "depth"),
    [("auto", 8, False, 4), ("auto", 8, True, 2), ("auto", 3, False, 2), ("auto", 1, False, 1), (3, 8, True, 3)],
)
def test_auto_looks_as_far_as_the_platform_and_the_model_allow(asked, num_layers, on_gpu, depth):
    assert depth_of(ExpertPrefetchConfig(lookahead_layers=asked), num_layers, on_gpu) == depth


@pytest.mark.parametrize("depth", [1, 2])
def test_there_is_a_predictor_for_each_distance(depth):
    predictors, _ = choose_predictors(ExpertPrefetchConfig(), make_gates(), depth)
    assert [predictor.distance for predictor in predictors] == [1, 2][:depth]
    assert predictors[-1].target_of(0) == depth


@pytest.mark.parametrize("name", ["router", "previous"])
def test_the_configured_predictor_is_made(name):
    predictors, _ = choose_predictors(ExpertPrefetchConfig(predictor=name), make_gates(), 2)
    assert [predictor.name for predictor in predictors] == [name, name]


@pytest.mark.parametrize("hybrid", [[], [["router"] * 3]])
def test_an_artifact_without_a_hybrid_is_refused_by_name_where_one_is_asked_for(tmp_path, hybrid):
    gates = make_gates()
    card = Card("toy", fingerprint(gates), [gate.name for gate in gates], 1, {}, {}, 2, {}, hybrid=hybrid)
    save_artifact(Artifact(card, None, torch.rand(4, 8), torch.rand(4, 8, 8)), tmp_path / "a")
    config = ExpertPrefetchConfig(artifact=str(tmp_path / "a"), predictor="hybrid")
    if hybrid:
        assert choose_predictors(config, gates, 1)[0][0].name.startswith("hybrid")
        return
    with pytest.raises(ArtifactError, match=r"artifact .*/a holds no hybrid: calibrate again"):
        choose_predictors(config, gates, 1)


def test_padding_is_neither_guessed_for_nor_scored():
    look_ahead, caches = make()
    look_ahead.recall.scored_every = 1
    a_step(look_ahead, num_tokens=2, num_rows=4)
    assert caches.layers[1].asked[0][1] == 2
    assert look_ahead.recall._sums[:, 0].tolist() == [0, 2, 2, 2]


def test_a_step_with_more_ids_than_experts_fetches_nothing_ahead():
    look_ahead, caches = make()
    a_step(look_ahead, num_tokens=EXPERTS // TOP_K + 1)
    assert caches.order == []
    a_step(look_ahead, num_tokens=EXPERTS // TOP_K)
    assert caches.order == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize("over_fetch", [0, 1, 3])
def test_over_fetch_asks_for_less_likely_experts_as_well(over_fetch):
    look_ahead, caches = make(over_fetch=over_fetch)
    a_step(look_ahead)
    assert len(caches.layers[1].asked[0][0]) == TOP_K + over_fetch
    assert caches.layers[1].guesses == TOP_K + over_fetch


@pytest.mark.parametrize(("window", "records"), [(2.1, 3), (0.2, 1)])
def test_the_budget_is_what_the_link_can_begin_until_the_next_layer(window, records):
    """A record takes a second; layers take `window`."""
    look_ahead, caches = make(depth=2, link=RECORD_BYTES)
    for _ in range(200):
        look_ahead.note([words(steps=1)] * 4, 4 * window)
    assert {own[0] for own in caches.layers[1].budgets.values()} == {records}
    assert caches.layers[1].budgets[2][1] == TOP_K
    assert caches.layers[1].guesses == (TOP_K + 1 if window >= 1 else TOP_K), "over_fetch only where a record fits"


@pytest.mark.parametrize(("forced", "window", "asked"), [(False, 0.12, 0), (False, 0.13, 3), (True, 0.12, 3)])
def test_a_link_that_is_far_slower_than_the_layers_is_left_to_demands_unless_forced(forced, window, asked):
    """A record takes a second; layers take `window`."""
    look_ahead, caches = make(link=RECORD_BYTES, forced=forced)
    for _ in range(8):
        look_ahead.note([words(steps=1)] * 4, 4 * window)
    a_step(look_ahead)
    assert len(caches.order) == asked
    assert (caches.layers[1].records > 0) == (asked > 0)


def test_time_that_steps_waited_is_no_time_to_copy_in():
    look_ahead, caches = make(link=RECORD_BYTES)
    for _ in range(200):
        look_ahead.note([words(steps=1, stall_ns=2 * 10**9)] * 4, 12.0)
    assert caches.layers[1].records == 1


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr(NotedCaches, "on_device", True)
    monkeypatch.setattr(host_memory, "_register_with_cuda", lambda memory, read_only: lambda: None)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("demanded", "records"), [(0, 3), (2, 1)])
def test_on_a_gpu_time_that_demands_take_is_no_time_to_copy_in(demanded, records):
    """A record takes a second; of each layer's three, two are spent on demands."""
    look_ahead, caches = make(link=RECORD_BYTES)
    for _ in range(200):
        look_ahead.note([words(steps=5, demanded=5 * demanded)] * 4, 12.0)
    assert caches.layers[1].records == records


def test_a_step_of_a_pipeline_is_that_of_all_its_layers():
    """Four of twelve are in this stage, and wait a second each. A record takes a second."""
    look_ahead, caches = make(link=RECORD_BYTES)
    look_ahead.num_layers = 12
    for _ in range(200):
        look_ahead.note([words(steps=1, stall_ns=10**9)] * 4, 12 * 4.0)
    assert caches.layers[1].records == 3


def test_a_closed_valve_stops_guessing_and_a_forced_one_never_closes():
    for forced, expected in ((False, 0), (True, NUM_SLOTS)):
        look_ahead, caches = make(forced=forced)
        for step in range(400):
            stall = 2 * 10**9 if caches.layers[1].records else 10**9
            look_ahead.note([words(steps=1, stall_ns=stall)] * 4, None)
            if step > 300 and not forced and caches.layers[1].records == 0:
                break
        assert caches.layers[1].records == expected
        before = len(caches.order)
        a_step(look_ahead)
        assert len(caches.order) - before == (3 if forced else 0)


def test_where_steps_are_longer_for_it_nothing_is_guessed_and_layers_learn_nothing():
    look_ahead, caches = make(forced=False)
    look_ahead.begin_step(3)
    noted = []
    look_ahead.step_valve.note = lambda seconds, sequences: noted.append((seconds, sequences))
    look_ahead.note([words(steps=1)] * 4, 0.5)
    look_ahead.note([words(steps=1)] * 4, None)
    assert noted == [(0.5, 3)]
    look_ahead.step_valve.is_open = False
    look_ahead.note([words(steps=1)] * 4, None)  # what it has just found closes every layer
    a_step(look_ahead)
    assert caches.order == []
    look_ahead.valves[1].note = None
    look_ahead.note([words(steps=1)] * 4, 0.5)
    del look_ahead.valves[1].note
    look_ahead.step_valve.is_open = True
    look_ahead.note([words(steps=1)] * 4, None)
    a_step(look_ahead)
    assert caches.order == [(1, 1), (2, 1), (3, 1)]


def test_steps_as_a_whole_are_compared_unless_look_ahead_is_forced():
    assert make(forced=True)[0].step_valve is None
    assert make(forced=False)[0].step_valve is not None


def test_what_guessing_took_is_told_to_the_valve():
    look_ahead, _ = make()
    noted = []
    look_ahead.valves[1].note = lambda delta, spent: noted.append(spent)
    a_step(look_ahead)
    look_ahead.note([words(steps=1)] * 4, None)
    look_ahead.note([words(steps=1)] * 4, None)
    assert noted[0] > 0
    assert noted[1] == 0


def test_the_nearest_guess_bears_what_is_done_for_all():
    class Observed(Told):
        observes = True

        def observe(self, layer, signals):
            time.sleep(0.01)

    look_ahead, _ = make(Observed(4))
    a_step(look_ahead)
    assert all(spent >= 0.01 for spent in look_ahead._spent[1:])
    assert look_ahead._spent[0] == 0


def test_recall_is_that_of_the_guesses():
    gates = make_gates()
    look_ahead, _ = make(create_predictor("router", Ingredients(gates)), num_layers=len(gates))
    look_ahead.recall.scored_every = 1
    hidden = tokens(3)
    guesses, expected = {}, torch.zeros(5, dtype=torch.float64)
    for layer in range(len(gates)):
        true = Signals(hidden + layer, torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, TOP_K))
        if layer in guesses:
            expected += torch.stack(list(score(guesses[layer], true)))
        look_ahead.after(layer, true, 3)
        guesses[layer + 1] = look_ahead._guesses[layer + 1] if layer + 1 < len(gates) else None
    assert torch.allclose(look_ahead.recall._sums.sum(0), expected)
    assert expected[0] == 3 * (len(gates) - 1)


def test_a_layer_executes_its_guess_where_every_sequence_gives_one_token():
    look_ahead, _ = make(speculated_layers=frozenset({2}))
    look_ahead.begin_step(3)
    a_step(look_ahead, num_layers=2, num_tokens=3)
    assert look_ahead.to_execute(2, 3) is not None
    assert look_ahead.to_execute(1, 3) is None, "not allowed there"
    assert look_ahead.to_execute(2, 2) is None
    look_ahead.begin_step(0)
    assert look_ahead.to_execute(2, 3) is None, "a prompt is in this step"


def prediction(rows):
    ids = torch.tensor([[expert for expert, _ in row] for row in rows])
    return Prediction(ids, torch.tensor([[weight for _, weight in row] for row in rows]))


def close(rows, on_host=True, top_k=2):
    return close_ones(prediction(rows), top_k, on_host).ids.tolist()


CLEAR = [(5, 0.5), (2, 0.3), (3, 0.28), (1, 0.26)]
UNSURE = [(1, 0.31), (0, 0.3), (4, 0.29), (7, 0.28)]


@pytest.mark.parametrize(("row", "kept"), [(CLEAR, [5, 2, 3]), (UNSURE, [1, 0, 4, 7])])
def test_of_further_guesses_those_stay_that_are_nearly_as_likely(row, kept):
    assert close([row]) == [kept]
    assert close([row], on_host=False) == [kept + [-1] * (4 - len(kept))]
    assert close([row, CLEAR])[0] == close([row, CLEAR], on_host=False)[0] == kept + [-1] * (4 - len(kept))


@pytest.mark.parametrize("on_host", [True, False])
def test_the_first_top_k_guesses_stay_whatever_their_weights(on_host):
    """A router with a correction bias does not choose by weight."""
    row = [(3, 0.2), (1, 0.6), (5, 0.3), (0, 0.1)]
    assert close([row], on_host)[0][:3] == [3, 1, 5]
    assert close([row, row], on_host)[0] == [3, 1, 5, -1]
    assert close([row[:2]], on_host) == [[3, 1]]


def test_what_is_clearly_less_likely_is_not_fetched():
    class Sure(Told):
        def predict(self, source, signals, count):
            guess = super().predict(source, signals, count)
            guess.weights[:, TOP_K:] = 0.5
            return guess

    look_ahead, caches = make(Sure(4), over_fetch=2)
    a_step(look_ahead)
    a_step(look_ahead, num_tokens=2)
    assert caches.layers[1].asked == [([0, 1], 1), ([0, 1], 2)]


def test_one_token_is_fetched_for_in_the_order_of_its_guesses():
    assert most_wanted(prediction([[(5, 0.1), (2, 0.7), (3, 0.2)]]), 8).tolist() == [5, 2, 3]


def test_a_batch_is_fetched_for_by_the_summed_weight_of_its_guesses():
    guesses = prediction([[(1, 0.5), (2, 0.3)], [(2, 0.4), (3, 0.45)], [(1, 0.1), (7, 0.2)]])
    assert most_wanted(guesses, 8).tolist() == [2, 1, 3, 7]


def test_a_guess_without_weight_comes_last_and_is_not_forgotten():
    guesses = prediction([[(4, 0.0), (6, 0.3)], [(6, 0.2), (0, 0.1)]])
    assert most_wanted(guesses, 8).tolist() == [6, 0, 4]


def test_experts_of_other_ranks_are_not_wanted():
    guesses = prediction([[(-1, 0.9), (2, 0.1)], [(3, 0.2), (-1, 0.8)]])
    assert most_wanted(guesses, 8).tolist() == [3, 2]


LINKED, WITHOUT_LINK = NotedCaches(3), NotedCaches(3)
WITHOUT_LINK.link = None


@pytest.mark.parametrize(
    ("config", "caches", "reason"),
    [
        ({}, LINKED, None),
        ({"prefetch": "off"}, LINKED, "off"),
        ({}, WITHOUT_LINK, "off: there is no link to hide: records are copied within host memory"),
        ({"prefetch": "on"}, WITHOUT_LINK, None),
        ({}, None, "off: every expert has a slot"),
        ({"prefetch": "on"}, None, "off: every expert has a slot"),
    ],
)
def test_why_nothing_looks_ahead(config, caches, reason):
    assert why_not(ExpertPrefetchConfig(**config), 3, caches, breaks_graphs=False) == reason


def test_graphs_that_break_are_a_reason_on_a_gpu():
    caches = NotedCaches(3)
    caches.on_device = True
    assert why_not(ExpertPrefetchConfig(), 3, caches, breaks_graphs=False) is None
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH=0" in why_not(ExpertPrefetchConfig(), 3, caches, breaks_graphs=True)
    with pytest.raises(ConfigError, match="prefetch is on and cannot be: vLLM interrupts"):
        why_not(ExpertPrefetchConfig(prefetch="on"), 3, caches, breaks_graphs=True)


def test_looking_further_ahead_than_there_are_layers_is_refused():
    with pytest.raises(ConfigError, match="lookahead_layers is 3 and the model has 3 MoE layers: set it to 2 at most"):
        why_not(ExpertPrefetchConfig(lookahead_layers=3), 3, LINKED, breaks_graphs=False)
