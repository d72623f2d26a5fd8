"""Look-ahead in a running engine: it changes how fast experts are there, and never which tokens come out."""

import pytest
import torch
from engines import TINY_MODEL, counters, greedy, layers, open_engine, prompts

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.prediction import Prediction, Predictor
from vllm_expert_prefetch.serving import lookahead
from vllm_expert_prefetch.serving.lookahead import why_not

pytestmark = pytest.mark.engine

LINK = {"cache_fraction": 0.5, "emulated_link_gbps": 0.5, "emulated_link_latency_us": 20}
PROMPTS = prompts(4)


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
    for layer in layers(llm):
        layer.cache.planner.check_integrity()
        header = layer.cache.planner.state[:24].tolist()
        issued += header[18]
        start = 24 + layer.num_experts
        pending += sum(bool(flag & 8) for flag in layer.cache.planner.state[start:][: layer.num_experts].tolist())
    assert issued == settled + pending
    return issued


@pytest.mark.parametrize("over_fetch", [0, 3])
def test_the_router_predictor_is_bit_equal_and_saves_stalls(stock, over_fetch):
    with open_engine(TINY_MODEL, LINK | {"prefetch": "on", "over_fetch": over_fetch}) as llm:
        assert generate(llm) == stock
        counted = counters(llm)
        assert check_conservation(counted, llm) > 100
    recall = counted["recall_found_total/top_k"] / counted["recall_routed_total"]
    assert 0.6 < recall <= counted["recall_found_total/fetched"] / counted["recall_routed_total"]
    assert counted["predictions_total/used"] > counted["predictions_total/unused"]
    assert counted["transfer_bytes_total/prefetch"] > 0
    assert 0 < counted["missing_gate_mass_total"] < counted["scored_tokens_total"]


def test_garbage_predictions_change_no_token(stock, monkeypatch):
    monkeypatch.setattr(lookahead, "create_predictor", lambda name, given: Garbage(len(given.gates), given.distance))
    with open_engine(TINY_MODEL, LINK | {"prefetch": "on"}) as llm:
        assert generate(llm) == stock
        counted = counters(llm)
        check_conservation(counted, llm)
    assert counted["predictions_total/unused"] > 0


def test_previous_and_a_distance_of_two_are_bit_equal(stock):
    config = LINK | {"prefetch": "auto", "predictor": "previous", "lookahead_layers": 2, "policy": "lfru"}
    with open_engine(TINY_MODEL, config) as llm:
        assert generate(llm) == stock
        check_conservation(counters(llm), llm)


def test_compiled_look_ahead_is_bit_equal_to_compiled_stock():
    results = []
    for config in (None, LINK | {"prefetch": "on"}):
        with open_engine(TINY_MODEL, config, enforce_eager=False) as llm:
            results.append(greedy(llm, PROMPTS))
            if config:
                assert counters(llm)["predictions_total/used"] > 0
    assert results[0] == results[1]


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
        assert layers(llm)[0].deployment._info()["prefetch"] == reason


def test_look_ahead_that_cannot_be_is_refused_when_it_was_asked_for_and_off_when_it_was_not():
    with pytest.raises(ConfigError, match="prefetch is on and cannot be: it needs native staging"):
        why_not(ExpertPrefetchConfig(prefetch="on"), [object()], has_link=True)
    assert "native staging" in (why_not(ExpertPrefetchConfig(), [object()], has_link=True) or "")


def test_looking_further_ahead_than_there_are_layers_is_refused():
    with pytest.raises(ConfigError, match="lookahead_layers is 3 and the model has 3 MoE layers: set it to 2 at most"):
        why_not(ExpertPrefetchConfig(lookahead_layers=3), [object()] * 3, has_link=True)


def test_an_artifact_that_is_not_there_leaves_exact_serving_and_says_so(stock, tmp_path):
    config = LINK | {"prefetch": "auto", "artifact": str(tmp_path / "missing")}
    with open_engine(TINY_MODEL, config) as llm:
        assert greedy(llm, PROMPTS) == stock[0]
        described = layers(llm)[0].deployment._info()["prefetch"]
    assert described.startswith("off: ")
    assert "missing" in described
