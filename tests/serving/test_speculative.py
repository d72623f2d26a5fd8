"""Speculative execution: where it acts, what it counts, and that nothing else changes."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from engines import TINY_MODEL, counters, greedy, layers, open_engine, prompts

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead.create import allowed_layers, why_not
from vllm_expert_prefetch.metrics.counters import read_counters
from vllm_expert_prefetch.metrics.definitions import OUTCOMES, PHASES
from vllm_expert_prefetch.prediction import Artifact, Card, Prediction, Predictor, fingerprint, save_artifact
from vllm_expert_prefetch.serving.speculation import describe_execution

NUM_LAYERS, NUM_EXPERTS, TOP_K = 8, 16, 2
ALLOWED = frozenset({2, 3, 5})
PROMPTS = prompts(4)
SERVED = {"cache_fraction": 0.5, "metrics_per_layer": True}


class Garbage(Predictor):
    """Always the same experts, with weights of its own."""

    name = "garbage"

    def predict(self, source, signals, count):
        rows = len(signals.topk_ids)
        return Prediction(torch.arange(count).repeat(rows, 1), torch.full((rows, count), 0.5))


class Replay(Predictor):
    """What the router chose in an earlier run of the same requests: `trace[layer]`, one (ids, weights) per step."""

    name = "replay"
    observes = True

    def __init__(self, trace):
        super().__init__(NUM_LAYERS)
        self._trace = trace
        self._step = 0

    def observe(self, layer, signals):
        self._step += layer == NUM_LAYERS - 1

    def predict(self, source, signals, count):
        ids, weights = self._trace[source + 1][self._step]
        return Prediction(ids.long(), weights)


def look_ahead_of(llm):
    return layers(llm)[0].look_ahead


def use(llm, predictor, speculated=None):
    """`predictor` from now on; `speculated` layers in place of the artifact's."""
    look_ahead = look_ahead_of(llm)
    if speculated is not None:
        look_ahead.speculated_layers = frozenset(speculated)
    look_ahead.use([predictor])


def recorded(llm, run):
    """`run(llm)`, and the router's choices in it, per layer and step."""
    trace = [[] for _ in range(NUM_LAYERS)]
    look_ahead = look_ahead_of(llm)
    after = look_ahead.after

    def note(layer, signals, rows, routed=None):
        trace[layer].append((signals.topk_ids[:rows].clone(), signals.topk_weights[:rows].clone()))
        after(layer, signals, rows, routed)

    look_ahead.after = note
    try:
        return run(llm), trace
    finally:
        del look_ahead.after


def run_batch(llm):
    return greedy(llm, PROMPTS, 12)


def speculated_by_layer(llm):
    snapshot = read_counters(layers(llm)[0].worker.publisher.counters.path)
    return [snapshot.value("layer_lookups_total/speculated", layer) for layer in range(NUM_LAYERS)]


def artifact_for(model, allow_list):
    from vllm_expert_prefetch.serving.sources import find_sources

    gates = [source.gate for source in find_sources(model)]
    card = Card(
        model="tiny",
        fingerprint=fingerprint(gates),
        layers=[gate.name for gate in gates],
        depth=1,
        versions={},
        data={},
        over_fetch=1,
        recall={},
        hybrid=[["router"] * (NUM_LAYERS - 1)],
        allow_list=allow_list,
    )
    shape = (NUM_LAYERS, NUM_EXPERTS)
    return Artifact(card, None, torch.zeros(shape), torch.zeros(*shape, NUM_EXPERTS))


@dataclasses.dataclass
class Reference:
    outputs: list
    with_garbage: list
    trace: list
    artifact: str


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An engine in exact mode that looks ahead: what it says, what it routed, and an artifact for its model."""
    with open_engine(TINY_MODEL, SERVED | {"prefetch": "on"}) as llm:
        outputs, trace = recorded(llm, run_batch)
        use(llm, Garbage(NUM_LAYERS))
        with_garbage = run_batch(llm)
        assert counters(llm)["lookups_total/speculated"] == 0
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        directory = tmp_path_factory.mktemp("speculative") / "artifact"
        save_artifact(artifact_for(model, [0, *sorted(ALLOWED), NUM_LAYERS - 1]), directory)
    return Reference(outputs, with_garbage, trace, str(directory))


@dataclasses.dataclass
class Served:
    """What one engine in speculative mode did, scenario by scenario."""

    layers: frozenset
    line: str
    replayed: list
    with_garbage: list
    not_allowed: list
    gained: dict
    by_layer: list
    mass: dict
    single_steps: list


@pytest.fixture(scope="module")
def served(reference):
    config = SERVED | {"execution": "speculative", "artifact": reference.artifact}
    with open_engine(TINY_MODEL, config) as llm:
        allowed, line = look_ahead_of(llm).speculated_layers, "; ".join(layers(llm)[0].worker.describe())
        use(llm, Replay(reference.trace))
        before = speculated_by_layer(llm)
        _, gained = gains(llm, lambda: run_batch(llm))
        by_layer = [now - then for now, then in zip(speculated_by_layer(llm), before, strict=True)]
        use(llm, Replay(reference.trace), range(1, NUM_LAYERS))
        replayed = run_batch(llm)
        use(llm, Garbage(NUM_LAYERS), allowed)
        with_garbage = run_batch(llm)
        _, mass = gains(llm, lambda: greedy(llm, PROMPTS, 40))
        single_steps = [mixed_run(llm, length) for length in (1, 30)]
        use(llm, Garbage(NUM_LAYERS), ())
        not_allowed = run_batch(llm)
    return Served(allowed, line, replayed, with_garbage, not_allowed, gained, by_layer, mass, single_steps)


def gains(llm, run):
    """`run()`, and what it added to the counters."""
    before = counters(llm)
    result = run()
    return result, {name: value - before[name] for name, value in counters(llm).items()}


def mixed_run(llm, length):
    """A prompt, a decode step, a step in which another prompt joins, a decode step: (phase, lookups speculated)."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)

    def step():
        _, gained = gains(llm, engine.step)
        phases = [phase for phase in PHASES if gained[f"steps_total/{phase}"]]
        return phases, gained["lookups_total/speculated"] > 0

    engine.add_request(f"first-{length}", {"prompt_token_ids": [5] * length}, sampling)
    steps = [step(), step()]
    engine.add_request(f"second-{length}", {"prompt_token_ids": [7] * length}, sampling)
    steps += [step(), step()]
    while engine.has_unfinished_requests():
        engine.step()
    return steps


@pytest.mark.engine
def test_exact_mode_is_bit_equal_to_stock_whatever_is_predicted(reference):
    with open_engine(TINY_MODEL, None) as stock:
        assert run_batch(stock) == reference.outputs == reference.with_garbage


@pytest.mark.engine
def test_first_and_last_layers_are_exact_whatever_the_artifact_says(served):
    assert served.layers == ALLOWED
    assert "execution speculative in 3 of 8 layers" in served.line


@pytest.mark.proves("speculative execution")
@pytest.mark.engine
def test_right_guesses_give_the_tokens_of_exact_mode(served, reference):
    assert served.replayed == reference.outputs


@pytest.mark.engine
def test_garbage_changes_tokens_but_not_those_from_prefill(served, reference):
    assert [one.tokens for one in served.with_garbage] != [one.tokens for one in reference.outputs]
    assert [one.logprobs[0] for one in served.with_garbage] == [one.logprobs[0] for one in reference.outputs]


@pytest.mark.engine
def test_without_allowed_layers_garbage_changes_nothing(served, reference):
    assert served.not_allowed == reference.outputs


@pytest.mark.engine
def test_only_allowed_layers_execute_their_guesses_and_every_lookup_is_counted_once(served, reference):
    needed = [[len(ids.unique()) for ids, _ in steps] for steps in reference.trace]
    decodes = [len(ids) == len(PROMPTS) for ids, _ in reference.trace[0]]
    in_decode = [sum(count for count, is_one in zip(own, decodes, strict=True) if is_one) for own in needed]
    expected = [count if layer in ALLOWED else 0 for layer, count in enumerate(in_decode)]
    assert served.by_layer == expected
    outcomes = {name: served.gained[f"lookups_total/{name}"] for name in OUTCOMES}
    assert outcomes["speculated"] == sum(expected) > 0
    assert sum(outcomes.values()) == sum(map(sum, needed))


@pytest.mark.engine
def test_the_missing_gate_mass_is_that_against_the_router(served):
    assert served.mass["missing_gate_mass_total"] > 0.3 * served.mass["scored_tokens_total"] > 0


@pytest.mark.engine
def test_prompts_are_exact_even_those_of_a_single_token_and_so_are_mixed_steps(served):
    expected = [(["prefill"], False), (["decode"], True), (["mixed"], False), (["decode"], True)]
    assert served.single_steps == [expected, expected]


def speculative(**options):
    return ExpertPrefetchConfig(**{"execution": "speculative", "artifact": "somewhere", **options})


def test_speculative_execution_is_a_valid_configuration_with_an_artifact():
    assert speculative(prefetch="on", predictor="hybrid").execution == "speculative"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"artifact": None}, ["artifact", "vllm-expert-prefetch calibrate"]),
        ({"prefetch": "off"}, ["prefetch on or auto"]),
        ({"predictor": "router"}, ["predictor auto or hybrid, not router"]),
    ],
)
def test_what_speculative_execution_lacks_is_named(options, named):
    with pytest.raises(ConfigError) as refused:
        speculative(**options)
    assert str(refused.value).startswith("expert_prefetch: execution speculative needs ")
    assert all(words in str(refused.value) for words in named)


def test_it_is_refused_where_nothing_can_look_ahead():
    with pytest.raises(ConfigError, match="execution is speculative and cannot be: every expert has a slot"):
        why_not(speculative(), NUM_LAYERS, None, breaks_graphs=False)


def test_an_empty_allow_list_is_exact_serving():
    card = Card("toy", "", [], 1, {}, {}, 1, {}, allow_list=[0, 7])
    assert allowed_layers(card, NUM_LAYERS) == frozenset()
    described = describe_execution(speculative(), SimpleNamespace(speculated_layers=frozenset()), NUM_LAYERS, "on: x")
    assert described.startswith("exact (speculative was asked for")


@pytest.mark.engine
def test_the_accuracy_command_compares_the_modes(reference, tmp_path, capsys):
    from vllm_expert_prefetch.cli.main import main

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(PROMPTS[start:])}) + "\n" for start in range(3)))
    options = ["--data", str(data), "--max-tokens", "120", "--window", "48", "--json"]
    assert main(["accuracy", str(TINY_MODEL), "--artifact", reference.artifact, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["moe_layers"] == NUM_LAYERS
    exact, guarded, published = report["modes"].values()
    assert list(report["modes"]) == ["exact", "speculative", "speculative, as published"]
    assert (exact["layers"], guarded["layers"], published["layers"]) == (
        [],
        sorted(ALLOWED),
        list(range(1, NUM_LAYERS)),
    )
    assert (exact["agreement"], exact["kl"], exact["increase"]) == (1.0, 0.0, 0.0)
    assert 0 < guarded["kl"] < published["kl"] < 1
    assert exact["tokens"] == guarded["tokens"] == published["tokens"] >= 70
    assert 5 < exact["perplexity"] < 200


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], "is empty"),
        ("once upon a time\n", [], "not JSON"),
        ('{"text": "x"}\n', ["--window", "4"], "--window must be at least 16, got 4"),
        ('{"text": "x"}\n', ["--max-tokens", "0"], "--max-tokens must be at least 16, got 0"),
        ('{"text": "x"}\n', ["--artifact", "/nowhere"], "no artifact at /nowhere"),
    ],
)
def test_the_accuracy_command_refuses_bad_input_before_a_model_is_loaded(tmp_path, capsys, content, options, message):
    from vllm_expert_prefetch.cli.main import main

    data = tmp_path / "data.jsonl"
    data.write_text(content)
    assert main(["accuracy", "/nowhere", "--data", str(data), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.engine
def test_compiled_layers_execute_their_guesses_as_eager_ones_do():
    with open_engine(TINY_MODEL, SERVED | {"prefetch": "on"}, enforce_eager=False) as llm:
        exact, trace = recorded(llm, run_batch)
        use(llm, Replay(trace), ALLOWED)
        assert run_batch(llm) == exact
        counted = speculated_by_layer(llm)
        use(llm, Garbage(NUM_LAYERS))
        assert run_batch(llm) != exact
    assert {layer for layer, lookups in enumerate(counted) if lookups} == ALLOWED
