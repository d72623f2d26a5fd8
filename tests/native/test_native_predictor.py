"""Native predictions are those of the predictors in torch."""

import dataclasses
import itertools

import pytest
import torch

from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.prediction import (
    Artifact,
    Card,
    Estimator,
    EstimatorShape,
    Gate,
    Ingredients,
    Norm,
    Routing,
    Signals,
    create_predictor,
    native_predict,
)
from vllm_expert_prefetch.prediction.compiled import NativePredictor, PredictorWeights
from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.prediction.estimator import EstimatorPredictor
from vllm_expert_prefetch.prediction.native_predict import NativelyPredicting, natively
from vllm_expert_prefetch.prediction.router import DefaultVectorPredictor, RouterPredictor

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

LAYERS, EXPERTS, TOP_K = 3, 11, 2
NORMS = {
    "rms": lambda gain, shift: Norm(gain, 1e-6),
    "rms with shift": lambda gain, shift: Norm(gain, 1e-3, shift),
    "layer norm": lambda gain, shift: Norm(gain, 1e-5, shift, centered=True),
    "layer norm without shift": lambda gain, shift: Norm(gain, 1e-5, None, centered=True),
}
ROUTINGS = {
    "renormalized": Routing(TOP_K),
    "not renormalized": Routing(TOP_K, renormalize=False),
    "scaled": Routing(TOP_K, scaling=2.5),
}
OTHER_ROUTINGS = {
    "sigmoid": Routing(TOP_K, "sigmoid"),
    "bias": Routing(TOP_K, correction_bias=torch.linspace(0, 1, EXPERTS)),
    "groups": Routing(TOP_K, num_groups=11, top_groups=3),
}
KINDS = ("router", "router_defaults", "estimator", "estimator without defaults")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_gates(norm="rms", bias=False, routing=ROUTINGS["renormalized"], hidden_size=45):
    generator = torch.Generator().manual_seed(hidden_size)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return [
        Gate(
            f"layer{number}",
            random(EXPERTS, hidden_size) / hidden_size**0.5,
            NORMS[norm](1 + 0.3 * random(hidden_size), 0.2 * random(hidden_size)),
            routing,
            random(EXPERTS) if bias else None,
            output_scale=1.5,
        )
        for number in range(LAYERS)
    ]


def make_predictor(kind, gates, distance=1):
    torch.manual_seed(7)
    hidden_size = gates[0].weight.shape[1]
    defaults = DefaultVectors(torch.randn(LAYERS, EXPERTS, hidden_size), 1 + torch.rand(LAYERS))
    if kind == "router":
        return RouterPredictor(gates, distance)
    if kind == "router_defaults":
        return DefaultVectorPredictor(gates, defaults, distance)
    estimator = Estimator(EstimatorShape(hidden_size, EXPERTS, LAYERS, m=2, n=3))
    with torch.no_grad():
        for parameter in estimator.norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return EstimatorPredictor(gates, estimator, None if "without" in kind else defaults, distance)


def make_signals(num_tokens, dtype=torch.float32, ids=torch.int32, hidden_size=45):
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
    return Signals(hidden, chosen.to(ids), torch.rand(num_tokens, TOP_K, generator=generator))


def native(predictor, gates, monkeypatch):
    """Native calls, and an error where torch would be asked."""
    made = natively(predictor, gates)
    assert isinstance(made, NativelyPredicting)
    monkeypatch.setattr(made, "_predictor", None)
    return made


def assert_same(found, expected):
    assert found.ids.dtype == torch.int64
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_native_predictions_are_those_of_torch(kind, norm, routing, bias, monkeypatch):
    gates = make_gates(norm, bias, ROUTINGS[routing])
    predictor = make_predictor(kind, gates)
    made = native(predictor, gates, monkeypatch)
    for num_tokens, count, dtype in itertools.product((1, 3, 17), (1, TOP_K, TOP_K + 3, EXPERTS, EXPERTS + 5), DTYPES):
        signals = make_signals(num_tokens, dtype)
        for source in range(LAYERS - 1):
            assert_same(made.predict(source, signals, count), predictor.predict(source, signals, count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden_size", [2, 16, 64, 100, 256])
def test_any_hidden_size_will_do(kind, hidden_size, monkeypatch):
    gates = make_gates(hidden_size=hidden_size)
    predictor = make_predictor(kind, gates)
    signals = make_signals(5, hidden_size=hidden_size)
    made = native(predictor, gates, monkeypatch)
    assert_same(made.predict(1, signals, TOP_K), predictor.predict(1, signals, TOP_K))


@pytest.mark.parametrize("kind", KINDS)
def test_sources_look_as_far_ahead_as_asked_and_no_further(kind):
    gates = make_gates()
    predictor = make_predictor(kind, gates, distance=2)
    made, signals = natively(predictor, gates), make_signals(1)
    assert_same(made.predict(0, signals, TOP_K), predictor.predict(0, signals, TOP_K))
    assert made.predict(1, signals, TOP_K) is None
    assert (made.name, made.distance, made.num_layers) == (predictor.name, 2, LAYERS)


@pytest.mark.parametrize("kind", KINDS)
def test_signals_may_come_in_any_type_and_layout(kind, monkeypatch):
    gates = make_gates()
    predictor = make_predictor(kind, gates)
    plain = make_signals(4, ids=torch.int64)
    loose = Signals(plain.hidden.T.contiguous().T, plain.topk_ids.int().T.contiguous().T, plain.topk_weights.double())
    made = native(predictor, gates, monkeypatch)
    expected = predictor.predict(0, plain, TOP_K)
    assert_same(made.predict(0, plain, TOP_K), expected)
    assert_same(made.predict(0, loose, TOP_K), expected)


def test_half_precision_is_read_exactly():
    """Every float16 but NaN, through a gate of weight 1 in one of two experts."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()].unsqueeze(1)
    weights = PredictorWeights({"logits.weight": torch.tensor([[1.0], [0.0]])})
    made = NativePredictor(weights, 2, False, 1.0)
    for dtype in DTYPES:
        hidden = values.to(dtype)
        ids, chosen = made.predict(hidden, torch.empty(0, 0), torch.empty(0, 0), 1)
        logits = torch.cat([hidden.float(), torch.zeros(len(hidden), 1)], 1)
        torch.testing.assert_close(chosen, logits.softmax(-1).amax(-1, keepdim=True), rtol=1e-6, atol=0)
        clear = hidden.flatten() != 0
        assert torch.equal(ids[clear, 0], (hidden[clear, 0] < 0).long())


@pytest.mark.parametrize("routing", OTHER_ROUTINGS)
def test_other_routing_is_left_to_torch(routing):
    gates = make_gates(routing=OTHER_ROUTINGS[routing])
    predictor = make_predictor("router", gates)
    signals = make_signals(3)
    assert torch.equal(
        natively(predictor, gates).predict(0, signals, 4).weights, predictor.predict(0, signals, 4).weights
    )


@pytest.mark.parametrize(
    ("num_threads", "num_tokens", "is_native"),
    [(1, 64, True), (1, 65, False), (2, 4, True), (2, 5, False)],
)
def test_wide_steps_are_left_to_torch(num_threads, num_tokens, is_native, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(native_predict, "MAX_MULTIPLICATIONS", 4 * EXPERTS * 45)
    gates = make_gates()
    made = natively(make_predictor("router", gates), gates)
    asked = []
    monkeypatch.setattr(made, "_predictor", type("Torch", (), {"predict": lambda self, *given: asked.append(given)})())
    made.predict(0, make_signals(num_tokens), TOP_K)
    assert len(asked) == (0 if is_native else 1)


def test_without_the_library_torch_predicts(monkeypatch):
    monkeypatch.setattr(native_predict, "can_predict", lambda: False)
    gates = make_gates()
    predictor = make_predictor("router", gates)
    assert natively(predictor, gates) is predictor


def test_predictors_by_name_are_native():
    gates = make_gates()
    card = Card(model="", fingerprint="", layers=[], depth=1, versions={}, data={}, over_fetch=0, recall={})
    card = dataclasses.replace(card, hybrid=[["router", "estimator"]], estimator={"default_vectors": True})
    estimator = Estimator(EstimatorShape(45, EXPERTS, LAYERS))
    counts = torch.zeros(LAYERS, EXPERTS), torch.zeros(LAYERS, EXPERTS, EXPERTS)
    defaults = DefaultVectors(torch.zeros(LAYERS, EXPERTS, 45), torch.ones(LAYERS))
    ingredients = Ingredients(gates, Artifact(card, defaults, *counts, estimator))
    for name in ("router", "router_defaults", "estimator"):
        assert isinstance(create_predictor(name, ingredients), NativelyPredicting)
    assert create_predictor("hybrid", ingredients).predict(1, make_signals(1), TOP_K).ids.shape == (1, TOP_K)


@pytest.mark.parametrize("expert", [EXPERTS, -2, 2**31 - 1])
@pytest.mark.parametrize("kind", ["router_defaults", "estimator"])
def test_experts_that_do_not_exist_are_refused(kind, expert):
    gates = make_gates()
    signals = make_signals(2)
    signals.topk_ids[1, 0] = expert
    with pytest.raises(ValueError, match=f"topk_ids has expert {expert} at token 1, there are {EXPERTS} experts"):
        natively(make_predictor(kind, gates), gates).predict(0, signals, TOP_K)


def test_padding_adds_nothing():
    gates = make_gates()
    predictor, signals = make_predictor("router_defaults", gates), make_signals(2)
    signals.topk_ids[1, 0] = -1
    found = natively(predictor, gates).predict(0, signals, TOP_K)
    signals.topk_ids[1, 0], signals.topk_weights[1, 0] = 0, 0.0
    assert_same(found, predictor.predict(0, signals, TOP_K))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 44)}, r"hidden must have shape \(2, 45\), it has \(2, 44\)"),
        ({"hidden": torch.zeros(90)}, "hidden must have two dimensions"),
        ({"hidden": torch.zeros(2, 45).double()}, "hidden must be float32, bfloat16 or float16"),
        ({"hidden": torch.zeros(45, 2).T}, "hidden must be contiguous"),
        ({"topk_ids": torch.zeros(3, 2).int()}, r"topk_ids must have shape \(2, 2\), it has \(3, 2\)"),
        ({"topk_ids": torch.zeros(2, 2).short()}, "topk_ids must be int32"),
        ({"topk_weights": torch.zeros(2, 3)}, r"topk_weights must have shape \(2, 2\), it has \(2, 3\)"),
        ({"topk_weights": torch.zeros(2, 2).bfloat16()}, "topk_weights must be float32"),
        ({"count": 0}, r"out_ids must have shape \(2, 1 to 11\)"),
        ({"count": EXPERTS + 1}, r"out_ids must have shape \(2, 1 to 11\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    gates = make_gates()
    made = NativePredictor(make_predictor("router_defaults", gates).weights(0), TOP_K, True, 1.0)
    signals = make_signals(2)._asdict() | {"count": TOP_K}
    with pytest.raises((ValueError, TypeError), match=message):
        made.predict(**signals | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": torch.zeros(44)}, r"factor must have shape \(45\), it has \(44\)"),
        ({"vectors": torch.zeros(EXPERTS, 44)}, r"vectors must have shape \(11, 45\), it has \(11, 44\)"),
        ({"vectors": torch.zeros(45)}, "vectors must have two dimensions"),
        ({"target_gain": None}, "there is no target_gain"),
        ({"reduce.weight": torch.zeros(0, 45)}, "reduce.weight must have two dimensions and not be empty"),
        ({"widen.weight": torch.zeros(66, 21)}, "widen.weight has 21 columns, what it is applied to has 22"),
        ({"narrow.weight": torch.zeros(22, 65)}, "narrow.weight has 65 columns, what it is applied to has 66"),
        ({"narrow.weight": torch.zeros(21, 66), "narrow.bias": None}, "narrow.weight has 21 rows"),
        ({"norm.bias": None}, "there is no norm.bias"),
        ({"logits.bias": torch.zeros(10)}, r"logits.bias must have shape \(11\), it has \(10\)"),
    ],
)
def test_weights_that_do_not_fit_each_other_are_named(change, message):
    weights = make_predictor("estimator", make_gates()).weights(0)
    with pytest.raises(ValueError, match=message):
        NativePredictor(weights.and_also(change), TOP_K, True, 1.0)


def test_the_weights_stay_while_they_are_needed():
    gates = make_gates()
    signals = make_signals(3)
    predictor = make_predictor("estimator", gates)
    expected = predictor.predict(0, signals, TOP_K)
    made = NativePredictor(predictor.weights(0), TOP_K, True, 1.0)
    del predictor, gates
    _ = [torch.full((EXPERTS, 45), float("nan")) for _ in range(100)]
    assert torch.equal(made.predict(*signals, TOP_K)[0], expected.ids)
