"""Looking ahead on a GPU, as far as a machine without one can tell: when, for whom, with what, how it is counted."""

from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.experts import DeviceLayerCache
from vllm_expert_prefetch.prediction import Prediction, Predictor, Signals
from vllm_expert_prefetch.prediction.count_gate import Outcomes
from vllm_expert_prefetch.prediction.truth import score
from vllm_expert_prefetch.serving import lookahead
from vllm_expert_prefetch.serving.device_lookahead import DeviceLookAhead

LINK_RATE = 1e6
NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, TOP_K = 4, 16, 8, 2


class Cache:
    """Notes what it is asked to prefetch."""

    def __init__(self, tokens_per_wave=NUM_SLOTS // TOP_K):
        self.num_slots = NUM_SLOTS
        self.staging = SimpleNamespace(record_bytes=1000)
        self.asked = []
        self.budgets = []
        self._tokens_per_wave = tokens_per_wave

    def num_waves(self, num_tokens):
        return -(-num_tokens // self._tokens_per_wave)

    def prefetch(self, predicted, real):
        self.asked.append((predicted, real))

    def set_prefetch_budget(self, num_records):
        self.budgets.append(num_records)


class Told(Predictor):
    """Guesses what it was told; remembers what it observed."""

    name = "told"
    observes = True
    crosses_tokens = True

    def __init__(self):
        super().__init__(NUM_LAYERS)
        self.guesses = {}
        self.seen = []

    def observe(self, layer, signals):
        self.seen.append(layer)

    def predict(self, source, signals, count):
        assert count == TOP_K + 1
        return self.guesses.get(self.target_of(source))


def make_layer(cache, is_fully_resident=False):
    return SimpleNamespace(
        device_cache=cache,
        is_fully_resident=is_fully_resident,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        accelerator=torch.device("cpu"),
    )


def make(*layers, forced=False):
    predictor = Told()
    layers = layers or [make_layer(Cache()) for _ in range(NUM_LAYERS)]
    return predictor, DeviceLookAhead(predictor, layers, 1, forced, LINK_RATE), [layer.device_cache for layer in layers]


def random_rows(num_rows, count, generator):
    weights, ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(count)
    return ids, weights


def signals(num_rows, generator):
    ids, weights = random_rows(num_rows, TOP_K, generator)
    return Signals(torch.zeros(num_rows, 4), ids.int(), weights)


def run_step(look_ahead, predictor, real, generator, layers=range(NUM_LAYERS)):
    """One forward pass; what each layer but the first was guessed and was."""
    predictor.guesses = {layer: Prediction(*random_rows(len(real), TOP_K + 1, generator)) for layer in layers}
    true = {layer: signals(len(real), generator) for layer in layers}
    for layer in layers:
        look_ahead.after_staging(layer, true[layer], real)
    return predictor.guesses, true


def test_each_layer_asks_for_the_next_ones_guesses_and_the_last_one_for_the_next_tokens_first():
    predictor, look_ahead, caches = make()
    generator = torch.Generator().manual_seed(1)
    guesses, _ = run_step(look_ahead, predictor, torch.zeros(1, dtype=torch.int64), generator)
    assert [[ids.tolist() for ids, _ in cache.asked] for cache in caches] == [
        [guesses[layer].ids.tolist()] for layer in range(NUM_LAYERS)
    ]
    assert predictor.seen == [0, 1, 2, 3]


@pytest.mark.parametrize("real", [[8, -1], [-1, -1], [3]])
def test_the_gpu_is_told_which_rows_are_padding(real):
    predictor, look_ahead, caches = make()
    real = torch.tensor(real)
    predictor.guesses[1] = Prediction(*random_rows(len(real), TOP_K + 1, torch.Generator()))
    look_ahead.after_staging(0, signals(len(real), torch.Generator()), real)
    (asked, told), *_ = caches[1].asked
    assert torch.equal(asked, predictor.guesses[1].ids)
    assert torch.equal(told, real)


@pytest.mark.parametrize(("real", "is_anyone"), [([-1, 4, -1], True), ([-1, -1], False)])
def test_one_guess_for_all_counts_where_any_row_is_real(real, is_anyone):
    predictor, look_ahead, caches = make()
    predictor.guesses[1] = Prediction(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))
    look_ahead.after_staging(0, signals(len(real), torch.Generator()), torch.tensor(real))
    (_, told), *_ = caches[1].asked
    assert told.shape == (1,)
    assert (int(told) >= 0) == is_anyone


def test_nobody_asks_for_a_layer_that_holds_everything_or_whose_step_is_wide():
    layers = [make_layer(Cache()), make_layer(Cache(), True), make_layer(Cache(1)), make_layer(Cache())]
    predictor, look_ahead, caches = make(*layers)
    run_step(look_ahead, predictor, torch.zeros(3, dtype=torch.int64), torch.Generator(), layers=(0, 1, 2, 3))
    assert [len(cache.asked) for cache in caches] == [1, 0, 0, 1]


def test_a_layer_without_a_guess_is_left_alone():
    _, look_ahead, caches = make()
    look_ahead.after_staging(0, signals(1, torch.Generator()), torch.zeros(1, dtype=torch.int64))
    assert caches[1].asked == []


def test_a_gate_that_closes_sets_the_budget_to_nothing_and_one_that_opens_gives_it_back():
    _, look_ahead, caches = make()
    look_ahead.note(2, Outcomes(64, saved=0, wasted=10, displaced=10), None)
    assert (look_ahead.num_closed, caches[2].budgets) == (1, [0])
    look_ahead.note(2, Outcomes(100_000, 0, 0, 0), None)
    assert (look_ahead.num_closed, caches[2].budgets) == (0, [0, NUM_SLOTS])
    assert caches[1].budgets == []


def test_forced_gates_stay_open():
    _, look_ahead, caches = make(forced=True)
    look_ahead.note(1, Outcomes(64, saved=0, wasted=10, displaced=10), None)
    assert (look_ahead.num_closed, caches[1].budgets) == (0, [NUM_SLOTS])


@pytest.mark.parametrize(("step_seconds", "records"), [(0.002, 1), (0.012, 3), (1.0, NUM_SLOTS)])
def test_the_budget_is_what_the_link_can_begin_within_a_layers_share_of_a_decode_step(step_seconds, records):
    _, look_ahead, caches = make()
    look_ahead.note(1, Outcomes(1, 1, 0, 0), step_seconds)
    assert caches[1].budgets == [records]


def expected_sums(steps):
    """Of the real rows, what `truth.score` gives layer by layer."""
    total = torch.zeros(5, dtype=torch.float64)
    for real, guesses, true in steps:
        keep = real >= 0
        for layer in range(1, NUM_LAYERS):
            prediction = Prediction(guesses[layer].ids[keep], guesses[layer].weights[keep])
            total += torch.stack(score(prediction, Signals(*(part[keep] for part in true[layer]))))
    return total


def test_guesses_are_held_against_the_routing_of_their_layer_padding_left_out():
    predictor, look_ahead, _ = make()
    generator = torch.Generator().manual_seed(3)
    steps = []
    for real in ([5], [1, -1, 2], [-1, -1], [7, 8, 9, -1]):
        real = torch.tensor(real)
        steps.append((real, *run_step(look_ahead, predictor, real, generator)))
    assert torch.allclose(torch.tensor(look_ahead.truth.totals(), dtype=torch.float64), expected_sums(steps))


def test_what_an_unfinished_step_has_left_is_not_compared_with_the_next_one():
    predictor, look_ahead, _ = make()
    generator = torch.Generator().manual_seed(4)
    run_step(look_ahead, predictor, torch.zeros(2, dtype=torch.int64), generator, layers=range(2))
    real = torch.zeros(3, dtype=torch.int64)
    steps = [(real, *run_step(look_ahead, predictor, real, generator))]
    assert torch.allclose(torch.tensor(look_ahead.truth.totals(), dtype=torch.float64), expected_sums(steps))


def test_one_guess_for_all_tokens_is_held_against_each():
    predictor, look_ahead, _ = make()
    real = torch.tensor([1, 2, -1])
    true = Signals(torch.zeros(3, 4), torch.tensor([[0, 1], [2, 3], [0, 2]]), torch.full((3, TOP_K), 0.5))
    for layer in range(NUM_LAYERS):
        predictor.guesses = {1: Prediction(torch.tensor([[0, 3, 2]]), torch.ones(1, 3))}
        look_ahead.after_staging(layer, true, real)
    assert look_ahead.truth.totals() == pytest.approx([2, 4, 2, 3, 1])


def gpu_layer(is_fully_resident=False):
    cache = object.__new__(DeviceLayerCache)  # its constructor needs a GPU
    cache.num_slots, cache.staging = NUM_SLOTS, SimpleNamespace(record_bytes=1000)
    return SimpleNamespace(**vars(make_layer(cache, is_fully_resident)), residence=cache)


@pytest.fixture
def on_gpu(monkeypatch):
    """A model of two MoE layers whose gates were found, and the predictors that were made for it."""
    names = []

    def create(name, ingredients):
        names.append((name, ingredients.distance))
        return Told()

    gate = SimpleNamespace(weight=torch.zeros(1), to=lambda device: gate)
    monkeypatch.setattr(lookahead, "create_predictor", create)
    monkeypatch.setattr(lookahead, "_sources_of", lambda model, layers: [SimpleNamespace(gate=gate)] * len(layers))
    return names


@pytest.mark.parametrize("prefetch", ["auto", "on"])
def test_a_gpu_that_decides_looks_ahead(on_gpu, prefetch):
    config = ExpertPrefetchConfig(staging="native", prefetch=prefetch, predictor="previous")
    made, described = lookahead.create_look_ahead(None, [gpu_layer(), gpu_layer()], config, True, LINK_RATE)
    assert isinstance(made, DeviceLookAhead)
    assert described == f"{prefetch}: told"
    assert on_gpu == [("previous", 1)]
    made.gates[0].note(Outcomes(64, saved=0, wasted=10, displaced=10))
    assert made.num_closed == (prefetch == "auto")


@pytest.mark.parametrize(
    ("config", "resident", "reason"),
    [({"prefetch": "off"}, False, "off"), ({}, True, "off: every expert has a slot")],
)
def test_a_gpu_with_nothing_to_fetch_or_told_not_to_does_not(on_gpu, config, resident, reason):
    layers = [gpu_layer(resident), gpu_layer(resident)]
    made = lookahead.create_look_ahead(None, layers, ExpertPrefetchConfig(**config), True, LINK_RATE)
    assert made == (None, reason)
    assert on_gpu == []


def test_graphs_that_are_interrupted_cannot_hold_a_side_stream(on_gpu, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    layers = [gpu_layer(), gpu_layer()]
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH=0" in (lookahead.why_not(ExpertPrefetchConfig(), layers, True) or "")
    with pytest.raises(ConfigError, match="prefetch is on and cannot be: vLLM interrupts"):
        lookahead.why_not(ExpertPrefetchConfig(prefetch="on"), layers, True)
