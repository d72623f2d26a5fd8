"""The router predictor: exact where the residual does not change, better with default vectors where it does."""

import dataclasses

import pytest
import torch
from toy_moe import EXPERTS, HIDDEN, LAYERS, TOP_K, make_gates, make_model, tokens

from vllm_expert_prefetch.prediction import Norm, Routing, fingerprint, fold
from vllm_expert_prefetch.prediction.defaults import DefaultSums, DefaultVectors
from vllm_expert_prefetch.prediction.router import DefaultVectorPredictor, RouterPredictor

NORMS = {
    "rms": lambda gain, shift: Norm(gain, 1e-6),
    "layer norm": lambda gain, shift: Norm(gain, 1e-6, shift, centered=True),
}


def with_norm(gates, kind):
    return [
        dataclasses.replace(gate, norm=NORMS[kind](gate.norm.gain, torch.linspace(-1, 1, HIDDEN).roll(number)))
        for number, gate in enumerate(gates)
    ]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["no gate bias", "gate bias"])
def test_folding_gives_the_targets_logits_when_the_residual_stays(kind, bias):
    source, target = with_norm(make_gates(), kind)[:2]
    target = dataclasses.replace(target, bias=torch.arange(8.0) if bias else None)
    residual = tokens(20)
    weight, constant = fold(source, target)
    folded = torch.nn.functional.linear(source.norm.apply(residual), weight, constant)
    torch.testing.assert_close(folded, target.logits(target.norm.apply(residual)), rtol=1e-4, atol=1e-4)


def test_a_gain_of_zero_is_left_out_instead_of_dividing_by_it():
    source, target = make_gates()[:2]
    gain = source.norm.gain.clone()
    gain[3], gain[5] = 0.0, 1e-9
    weight, _ = fold(dataclasses.replace(source, norm=Norm(gain, 1e-6)), target)
    assert torch.isfinite(weight).all()
    assert (weight[:, [3, 5]] == 0).all()


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("kind", NORMS)
def test_the_router_is_always_right_when_experts_change_nothing(kind, distance):
    model = make_model(strength=0.0)
    model.gates = with_norm(model.gates, kind)
    signals = model.run(tokens(30))
    predictor = RouterPredictor(model.gates, distance)
    for source in range(len(signals) - distance):
        prediction = predictor.predict(source, signals[source], TOP_K)
        assert prediction.ids.sort(-1)[0].tolist() == signals[source + distance].topk_ids.sort(-1)[0].tolist()
        torch.testing.assert_close(prediction.weights, signals[source + distance].topk_weights, rtol=1e-3, atol=1e-3)
    assert predictor.predict(len(signals) - distance, signals[-distance], TOP_K) is None


@pytest.mark.parametrize(
    "routing",
    [Routing(2), Routing(2, "sigmoid", correction_bias=torch.linspace(-0.5, 0.5, EXPERTS), num_groups=4, top_groups=2)],
    ids=["softmax", "biased groups"],
)
@pytest.mark.parametrize("kind", NORMS)
def test_default_vectors_are_exact_when_experts_are_constant(kind, routing):
    """... and the residual has the scale they were collected at: one token at a time."""
    model = make_model(routing=routing)
    model.gates = [dataclasses.replace(gate, output_scale=1.5) for gate in with_norm(model.gates, kind)]
    plain, wrong = RouterPredictor(model.gates), 0
    for residual in (tokens(30) + 2).split(1):
        sums = DefaultSums(LAYERS, EXPERTS, HIDDEN)
        signals = model.run(residual, sums)
        predictor = DefaultVectorPredictor(model.gates, DefaultVectors(model.experts, sums.means().scales))
        for source in range(LAYERS - 1):
            true = signals[source + 1].topk_ids.sort(-1)[0]
            assert torch.equal(predictor.predict(source, signals[source], TOP_K).ids.sort(-1)[0], true)
            wrong += int((plain.predict(source, signals[source], TOP_K).ids.sort(-1)[0] != true).sum())
    assert wrong > 0, "the experts must matter for this test to mean anything"


def test_default_means_are_means_and_unseen_experts_get_their_layers():
    sums = DefaultSums(2, 3, 2)
    sums.add(0, torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [5.0, 6.0]]))
    sums.add(0, torch.tensor([0]), torch.tensor([[3.0, 4.0]]))
    sums.add_scales(0, torch.tensor([1.0, 2.0]))
    sums.add_scales(0, torch.tensor([6.0]))
    vectors, scales = sums.means()
    assert vectors[0].tolist() == [[2.0, 3.0], [5.0, 6.0], [3.0, 4.0]]
    assert vectors[1].tolist() == [[0.0, 0.0]] * 3
    assert scales.tolist() == [3.0, 0.0]


def test_fingerprints_tell_models_apart_and_ignore_the_precision_of_serving():
    gates = make_gates()
    rounded = [dataclasses.replace(gate, weight=gate.weight.bfloat16().float()) for gate in gates]
    assert fingerprint(gates) == fingerprint(rounded)
    assert fingerprint(gates) != fingerprint(make_gates(seed=1))
    assert fingerprint(gates) != fingerprint(gates[::-1])
