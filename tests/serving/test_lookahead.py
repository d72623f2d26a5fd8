"""Look-ahead in a running engine: it changes how fast experts are there, and never which tokens come out."""

import itertools

import pytest
import torch
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts
from toy_moe import make_gates

from vllm_expert_prefetch.cache.base import tables_of
from vllm_expert_prefetch.config import ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead import create
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.metrics.counters import read_counters
from vllm_expert_prefetch.metrics.publish import Publisher
from vllm_expert_prefetch.prediction import (
    PREDICTORS,
    Artifact,
    Card,
    Estimator,
    EstimatorShape,
    Ingredients,
    Prediction,
    Predictor,
    create_predictor,
    fingerprint,
    save_artifact,
    with_next_token,
)
from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.serving.sources import find_sources

pytestmark = pytest.mark.engine

LINK = {"cache_fraction": 0.5, "emulated_link_gbps": 0.5, "emulated_link_latency_us": 20}
PROMPTS = prompts(4)
UNTOUCHED = 8
"""A flag of csrc/residency.h: brought by a prefetch, and needed by no step yet."""


class Garbage(Predictor):
    """Guesses that have nothing to do with the tokens: the lowest-numbered experts, always others."""

    name = "garbage"
    calls = 0

    def predict(self, source, signals, count):
        target = self.target_of(source)
        if target is None:
            return None
        self.calls += 1
        rows = signals.topk_ids.shape[0]
        ids = (torch.arange(count) + 5 * self.calls) % 16
        return Prediction(ids.repeat(rows, 1), torch.rand(rows, count))


def generate(llm):
    """A batch, then single requests: steps of several rows, and of one."""
    return [greedy(llm, PROMPTS), *(greedy(llm, [prompt]) for prompt in PROMPTS[:2])]


@pytest.fixture(scope="module")
def stock():
    with open_engine(TINY_MODEL, None) as llm:
        return generate(llm)


def check_conservation(counted, llm):
    settled = sum(counted[f"predictions_total/{outcome}"] for outcome in ("used", "unused", "cancelled"))
    issued = pending = 0
    for cache in caches(llm):
        issued += cache.words().issued
        _, (_, flags, *_) = tables_of(cache.state)
        pending += sum(bool(flag & UNTOUCHED) for flag in flags)
    assert issued == settled + pending
    return issued


@pytest.mark.proves("looking ahead")
@pytest.mark.parametrize("setting", [{"over_fetch": 0}, {"over_fetch": 3, "lookahead_layers": 1}])
def test_the_router_predictor_is_bit_equal_and_brings_what_steps_use(stock, setting):
    config = LINK | {"prefetch": "on", "metrics_per_layer": True} | setting
    with open_engine(TINY_MODEL, config) as llm:
        assert generate(llm) == stock
        counted = counters(llm)
        assert check_conservation(counted, llm) > 100
        by_layer = read_counters(layers(llm)[0].worker.publisher.counters.path)
    for series in ("predictions_total/used", "recall_routed_total", "recall_found_total/fetched"):
        own = [by_layer.value(f"layer_{series}", layer) for layer in range(8)]
        assert sum(own) == counted[series]
        assert own[0] == 0, "nothing speaks of the first layer without an artifact"
        assert all(own[1:])
    recall = counted["recall_found_total/top_k"] / counted["recall_routed_total"]
    assert 0.6 < recall <= counted["recall_found_total/fetched"] / counted["recall_routed_total"]
    assert counted["predictions_total/used"] > counted["predictions_total/unused"]
    assert counted["transfer_bytes_total/prefetch"] > 0
    assert 0 < counted["missing_gate_mass_total"] < counted["scored_tokens_total"]


def untrained(gates):
    """An artifact as calibration makes it, but of random numbers: guesses need not be good to be harmless."""
    torch.manual_seed(0)
    num_layers, (num_experts, hidden) = len(gates), gates[0].weight.shape
    names = [gate.name for gate in gates]
    choices = [("router", "router_defaults", "estimator")[layer % 3] for layer in range(num_layers - 1)]
    estimator = {"m": 2, "n": 2, "default_vectors": True}
    card = Card("tiny", fingerprint(gates), names, 1, {}, {}, 1, {}, hybrid=[choices], estimator=estimator)
    network = Estimator(EstimatorShape(hidden, num_experts, num_layers - 1))
    defaults = DefaultVectors(torch.randn(num_layers, num_experts, hidden), torch.ones(num_layers))
    tables = torch.rand(num_layers, num_experts), torch.rand(num_layers, num_experts, num_experts)
    return Artifact(card, defaults, *tables, network)


def test_every_predictor_is_bit_equal_with_every_over_fetch(stock):
    names = [name for name in PREDICTORS if name != "oracle"]
    with open_engine(TINY_MODEL, LINK | {"prefetch": "on"}) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        gates = [source.gate for source in find_sources(model)]
        ingredients, worker = Ingredients(gates, untrained(gates)), layers(llm)[0].worker
        for name, over_fetch in itertools.product([*names, "hybrid across tokens"], (0, 1, 14)):
            predictor = create_predictor(name.split()[0], ingredients)
            if "across" in name:
                predictor = with_next_token(predictor, create_predictor("transition", ingredients))
            look_ahead = LookAhead([predictor], worker.caches, over_fetch, True, 0.5e9, torch.device("cpu"))
            worker.publisher = Publisher(worker.publisher.counters, worker.caches, look_ahead)
            for layer in layers(llm):
                layer.look_ahead = look_ahead
            assert greedy(llm, PROMPTS) == stock[0], (name, over_fetch)
        worker.publisher.publish()
        check_conservation(counters(llm), llm)


def test_garbage_predictions_change_no_token(stock, monkeypatch):
    monkeypatch.setattr(create, "create_predictor", lambda name, given: Garbage(len(given.gates), given.distance))
    with open_engine(TINY_MODEL, LINK | {"prefetch": "on"}) as llm:
        assert generate(llm) == stock
        counted = counters(llm)
        check_conservation(counted, llm)
    assert counted["predictions_total/unused"] > 0


def test_what_prompts_need_of_the_next_layer_is_copied_while_a_layer_computes(stock, monkeypatch):
    """Long prompts, a quarter of the experts resident: first with the router's guesses, then with garbage."""
    config = LINK | {"cache_fraction": 0.25, "prefetch": "on", "areas": 2}
    with open_engine(TINY_MODEL, config) as llm:
        assert generate(llm) == stock
        found = [cache.words() for cache in caches(llm)]
        assert check_conservation(counters(llm), llm) > 100
        worker = layers(llm)[0].worker
        first, *others = found
        for words in others:
            assert words.num_preloaded == 0 < words.wide_steps
            assert words.overflow < first.overflow / 2, "brought by the steps themselves"
        garbage = LookAhead([Garbage(8, 1)], worker.caches, 1, True, 0.5e9, torch.device("cpu"), preloads=True)
        for layer in layers(llm):
            layer.look_ahead = garbage
        assert generate(llm) == stock
        assert sum(cache.words().unused for cache in caches(llm)) > sum(words.unused for words in found) + 50


def test_previous_and_a_distance_of_two_are_bit_equal(stock):
    config = LINK | {"prefetch": "auto", "predictor": "previous", "lookahead_layers": 2, "policy": "lfru"}
    with open_engine(TINY_MODEL, config) as llm:
        assert generate(llm) == stock
        check_conservation(counters(llm), llm)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"prefetch": "auto"}, "off: there is no link to hide: records are copied within host memory"),
        ({"prefetch": "off", "emulated_link_gbps": 5}, "off"),
    ],
)
def test_the_info_metric_says_why_nothing_looks_ahead(config, reason):
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5} | config) as llm:
        greedy(llm, PROMPTS[:1], num_tokens=2)
        assert layers(llm)[0].look_ahead is None
        assert layers(llm)[0].worker.prefetch == reason


def test_with_an_artifact_the_last_layer_speaks_of_the_next_tokens_first(tmp_path):
    gates = make_gates()
    save_artifact(untrained(gates), tmp_path / "artifact")
    for config, name in (
        ({}, "router"),
        ({"artifact": str(tmp_path / "artifact")}, "hybrid, next token by transition"),
        ({"artifact": str(tmp_path / "artifact"), "predictor": "previous"}, "previous"),
    ):
        (near, far), _ = create.choose_predictors(ExpertPrefetchConfig(**config), gates, 2)
        assert near.name == name
        assert near.target_of(len(gates) - 1) == (None if name == "router" else 0)
        assert far.name == ("previous" if name == "previous" else "router"), "the artifact is for one layer ahead"
