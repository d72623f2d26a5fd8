"""Artifacts: what is written comes back, and what cannot be trusted is refused with the reason."""

import dataclasses
import json

import pytest
import torch
from toy_moe import EXPERTS, HIDDEN, LAYERS, make_gates

from vllm_expert_prefetch.prediction import (
    Artifact,
    ArtifactError,
    Card,
    Estimator,
    EstimatorShape,
    fingerprint,
    load_artifact,
    save_artifact,
)
from vllm_expert_prefetch.prediction.artifact import CARD, TENSORS
from vllm_expert_prefetch.prediction.defaults import DefaultVectors


def make_artifact():
    gates = make_gates()
    card = Card(
        model="toy",
        fingerprint=fingerprint(gates),
        layers=[gate.name for gate in gates],
        depth=1,
        versions={"torch": torch.__version__},
        data={"sha256": "0" * 64},
        over_fetch=2,
        recall={"router": [None, [0.5, 0.7, 0.2], [0.6, 0.8, 0.1], [0.9, 1.0, 0.0]]},
        recall_ahead={"router": [0.67]},
        hybrid=[["router", "estimator", "router"]],
        allow_list=[1],
        estimator={"m": 2, "n": 3, "default_vectors": True},
    )
    torch.manual_seed(0)
    estimator = Estimator(EstimatorShape(HIDDEN, EXPERTS, LAYERS - 1, m=2, n=3))
    defaults = DefaultVectors(torch.rand(LAYERS, EXPERTS, HIDDEN), torch.rand(LAYERS))
    return Artifact(card, defaults, torch.rand(LAYERS, EXPERTS), torch.rand(LAYERS, EXPERTS, EXPERTS), estimator)


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "artifact"
    save_artifact(make_artifact(), directory)
    return directory


def edit_card(directory, **changes):
    values = json.loads((directory / CARD).read_text())
    (directory / CARD).write_text(json.dumps(values | changes))


def test_an_artifact_comes_back_as_it_was(saved):
    made, loaded = make_artifact(), load_artifact(saved, fingerprint(make_gates()))
    assert all(map(torch.equal, loaded.defaults, made.defaults))
    assert torch.equal(loaded.frequency, made.frequency)
    assert torch.equal(loaded.transition, made.transition)
    q, source = torch.randn(3, HIDDEN), torch.tensor([1])
    assert torch.equal(loaded.estimator(q, source), made.estimator(q, source))
    assert loaded.card.tensors["bytes"] == (saved / TENSORS).stat().st_size
    assert loaded.with_card(tensors={}).card == made.card


def test_parts_may_be_missing(tmp_path):
    made = make_artifact().with_card(estimator=None)
    save_artifact(Artifact(made.card, None, made.frequency, made.transition), tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.defaults is None
    assert loaded.estimator is None


def test_an_artifact_for_other_weights_is_refused_by_name(saved):
    other = fingerprint(make_gates(seed=5))
    with pytest.raises(ArtifactError, match=f"made for another model: toy.*{other[:12]}"):
        load_artifact(saved, other)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_tensor_file_is_refused(saved, keep):
    content = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(content[:keep])
    with pytest.raises(ArtifactError, match=r"damaged: predictor.safetensors is \d+ bytes, expected"):
        load_artifact(saved)


def test_a_changed_tensor_file_is_refused(saved):
    content = bytearray((saved / TENSORS).read_bytes())
    content[-1] ^= 1
    (saved / TENSORS).write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="hash"):
        load_artifact(saved)


def test_a_missing_tensor_file_is_refused(saved):
    (saved / TENSORS).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_artifact(saved)


def as_format_1(directory, distance):
    values = json.loads((directory / CARD).read_text())
    new = ("depth", "recall_ahead")
    old = {name: value for name, value in values.items() if name not in new}
    (directory / CARD).write_text(json.dumps(old | {"format": 1, "distance": distance, "hybrid": values["hybrid"][0]}))


def test_the_format_before_is_read(saved):
    as_format_1(saved, distance=1)
    loaded = load_artifact(saved)
    assert loaded.card == dataclasses.replace(make_artifact().card, recall_ahead={}, tensors=loaded.card.tensors)


def test_the_format_before_is_refused_where_it_spoke_of_another_distance(saved):
    as_format_1(saved, distance=2)
    with pytest.raises(ArtifactError, match="speaks of 2 layers ahead alone: calibrate again"):
        load_artifact(saved)


def test_a_newer_format_is_refused(saved):
    edit_card(saved, format=3, something_new=True)
    with pytest.raises(ArtifactError, match="format 3, newer than the 2"):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"format": 2', "cannot be read"),
        ("[]", "no format number"),
        ("{}", "no format number"),
        ('{"format": "1"}', "no format number"),
        ('{"format": 2}', "missing 8 required"),
    ],
)
def test_a_damaged_card_is_refused(saved, content, message):
    (saved / CARD).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)


def test_a_directory_without_a_card_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="no artifact at"):
        load_artifact(tmp_path)


def test_a_card_that_promises_other_tensors_is_refused(saved):
    edit_card(saved, estimator={"m": 4, "n": 3, "default_vectors": True})
    with pytest.raises(ArtifactError, match="damaged"):
        load_artifact(saved)


def test_an_interrupted_rewrite_leaves_no_artifact_instead_of_a_mixed_one(saved, monkeypatch):
    monkeypatch.setattr("vllm_expert_prefetch.prediction.artifact.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_artifact(make_artifact(), saved)
    with pytest.raises(ArtifactError, match="no artifact at"):
        load_artifact(saved)
