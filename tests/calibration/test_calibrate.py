"""Calibration on a toy model: its artifact, its report, and going on after an interruption."""

import dataclasses

import pytest
import torch
from toy_moe import EXPERTS, HIDDEN, LAYERS, TOP_K, make_gates, make_model

from vllm_expert_prefetch.calibration import CalibrationError
from vllm_expert_prefetch.calibration.calibrate import MEASURED, Calibration, Options, mean_quality
from vllm_expert_prefetch.calibration.report import recall_table
from vllm_expert_prefetch.calibration.text import Text
from vllm_expert_prefetch.calibration.training import TrainingOptions
from vllm_expert_prefetch.prediction import ArtifactError, Ingredients, create_predictor, fingerprint, load_artifact
from vllm_expert_prefetch.prediction.truth import Quality

TEXT = Text([f"document {number} " * 12 for number in range(40)], "ab" * 32)
TRAINING = TrainingOptions(m=1, n=2, epochs=4, batch_size=256, learning_rate=5e-3, warm_up=5)


class ToyEngine:
    """Tokens are characters; token and neighbour make the residual in front of layer 0, so that routing varies."""

    def __init__(self, gates=None, fails_after=None):
        self.model = make_model(strength=0.8)
        if gates is not None:
            self.model.gates = gates
        self._embedding = torch.randn(256, HIDDEN, generator=torch.Generator().manual_seed(7))
        self._fails_after, self.recorded = fails_after, []

    @property
    def gates(self):
        return self.model.gates

    def tokenize(self, text):
        return list(text.encode())

    def record(self, tokens, defaults=None):
        if self._fails_after == len(self.recorded):
            raise KeyboardInterrupt
        self.recorded.append(list(tokens))
        rows = self._embedding[torch.tensor(tokens)]
        residuals = torch.nn.functional.normalize(rows + rows.roll(1, 0)) * HIDDEN**0.5
        return self.model.run(residuals, defaults)


def calibrate(engine, output, tell=lambda *_: None, **options):
    settings = dataclasses.replace(Options(window=64, max_tokens=4000, training=TRAINING), **options)
    return Calibration(engine, TEXT, output, "toy", {"torch": torch.__version__}, settings, tell).run()


def recall(artifact, name):
    rows = [None if row is None else Quality(*row) for row in artifact.card.recall[name]]
    return mean_quality(rows, 1).recall


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    output = tmp_path_factory.mktemp("calibration") / "artifact"
    return calibrate(ToyEngine(), output), output


def test_the_artifact_on_disk_is_the_one_returned_and_nothing_else_is_left(calibrated):
    made, output = calibrated
    loaded = load_artifact(output, fingerprint(make_gates()))
    assert loaded.with_card(tensors={}).card == made.card
    assert torch.equal(loaded.transition, made.transition)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_default_vectors_are_what_the_experts_add(calibrated):
    made, _ = calibrated
    used = made.frequency > 0
    torch.testing.assert_close(
        made.defaults.vectors[used], make_model(strength=0.8).experts[used], rtol=1e-4, atol=1e-4
    )


def test_constant_experts_make_default_vectors_right_and_the_estimator_uses_them(calibrated):
    made, _ = calibrated
    assert recall(made, "router_defaults") > max(0.95, recall(made, "router") + 0.1)
    assert made.card.estimator["default_vectors"] is True
    assert made.card.hybrid[0] == ["router_defaults"] * (LAYERS - 1)
    assert made.card.guard == {"candidates": sorted(made.card.guard["candidates"])} == {"candidates": [1, 2]}
    assert made.card.allow_list == []


def test_every_predictor_is_in_the_table_and_the_text(calibrated):
    made, _ = calibrated
    assert tuple(made.card.recall) == MEASURED
    assert all(len(rows) == LAYERS for rows in made.card.recall.values())
    table = recall_table(made.card, TOP_K)
    assert "recall@2 / @4" in table
    assert all(name in table for name in MEASURED)


def test_tables_are_shares(calibrated):
    made, _ = calibrated
    for table in (made.frequency, made.transition):
        torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:-1]))


def test_the_estimator_learns(calibrated):
    made, _ = calibrated
    losses = made.card.estimator["validation_kl"]
    assert losses[-1] < 0.7 * losses[0]
    assert recall(made, "estimator") > recall(made, "frequency") + 0.2


def test_what_was_measured_is_what_a_loaded_artifact_predicts(calibrated):
    _, output = calibrated
    artifact = load_artifact(output)
    signals = ToyEngine().record(list(b"some other text"))
    for name in MEASURED:
        predictor = create_predictor(name, Ingredients(make_model(strength=0.8).gates, artifact))
        ids, weights = predictor.predict(1, signals[1], 4)
        assert ids.shape == weights.shape
        assert ids.shape[0] in (1, 15)
        assert int(ids.max()) < EXPERTS


def test_an_interrupted_calibration_goes_on_and_ends_the_same(calibrated, tmp_path):
    made, _ = calibrated
    first = ToyEngine(fails_after=40)
    with pytest.raises(KeyboardInterrupt):
        calibrate(first, tmp_path / "artifact")
    second = ToyEngine()

    def stop_in_training(what, done, total):
        if (what, done) == ("training", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(second, tmp_path / "artifact", stop_in_training)
    assert second.recorded[0] == first.recorded[32], "windows 0 to 31 were kept: progress is saved every 16"
    third, stages = ToyEngine(), []
    again = calibrate(third, tmp_path / "artifact", lambda *stage: stages.append(stage))
    assert third.recorded == []
    assert [done for what, done, _ in stages if what == "training"] == [2, 3, 4]
    assert again.card == made.card
    assert all(map(torch.equal, again.defaults, made.defaults))
    assert all(
        torch.equal(a, b) for a, b in zip(again.estimator.parameters(), made.estimator.parameters(), strict=True)
    )


def test_recordings_of_another_model_are_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        calibrate(ToyEngine(fails_after=20), tmp_path / "artifact")
    engine = ToyEngine(make_gates(seed=9))
    calibrate(engine, tmp_path / "artifact", estimator=False)
    assert len(engine.recorded) > 40


def test_a_directory_of_the_users_is_not_taken_for_recordings(tmp_path):
    (tmp_path / "artifact.work").mkdir()
    (tmp_path / "artifact.work" / "thesis.txt").write_text("mine")
    with pytest.raises(CalibrationError, match="holds something else"):
        calibrate(ToyEngine(), tmp_path / "artifact")
    assert (tmp_path / "artifact.work" / "thesis.txt").read_text() == "mine"


def test_one_network_speaks_of_every_distance(calibrated):
    made, _ = calibrated
    assert made.card.depth == LAYERS - 1, "three layers, or as many as there are"
    assert [len(own) for own in made.card.hybrid] == [3, 2, 1]
    assert made.estimator.shape.num_sources == 3 + 2 + 1
    assert {name: len(own) for name, own in made.card.recall_ahead.items()} == dict.fromkeys(
        ("router", "router_defaults", "estimator", "hybrid"), 3
    )
    # What is constant in this model, default vectors tell exactly one layer ahead; the network learns it for all.
    estimator, router = made.card.recall_ahead["estimator"], made.card.recall_ahead["router"]
    assert all(own > other for own, other in zip(estimator[1:], router[1:], strict=True))
    assert "3 layers ahead" in recall_table(made.card, TOP_K)


@pytest.mark.parametrize("depth", [1, 2])
def test_how_far_it_speaks_can_be_chosen(tmp_path, depth):
    made = calibrate(ToyEngine(), tmp_path / "artifact", depth=depth)
    assert (made.card.depth, len(made.card.hybrid)) == (depth, depth)
    gates = ToyEngine().gates
    for distance in range(1, depth + 1):
        assert create_predictor("hybrid", Ingredients(gates, made, distance)).target_of(0) == distance
    with pytest.raises(ArtifactError, match=f"does not speak of {depth + 1} layers ahead"):
        create_predictor("estimator", Ingredients(gates, made, depth + 1))


def test_parts_can_be_left_out(tmp_path):
    made = calibrate(ToyEngine(), tmp_path / "artifact", estimator=False, defaults=False, keep_recordings=True)
    assert (made.estimator, made.defaults) == (None, None)
    assert made.card.hybrid == [["router"] * 3, ["router"] * 2, ["router"]]
    assert "estimator" not in made.card.recall
    assert (tmp_path / "artifact.work" / "state.json").is_file()


def test_training_stops_when_the_validation_loss_does(tmp_path):
    patient = dataclasses.replace(TRAINING, epochs=40, patience=1, learning_rate=0.3)
    losses = calibrate(ToyEngine(), tmp_path / "artifact", training=patient).card.estimator["validation_kl"]
    assert len(losses) < 40
    assert losses[-1] > min(losses[:-1])


def test_layers_of_different_shapes_are_refused(tmp_path):
    gates = [*make_gates()[:-1], make_gates(experts=4)[-1]]
    with pytest.raises(CalibrationError, match="differ"):
        calibrate(ToyEngine(gates), tmp_path / "artifact")


def test_a_look_ahead_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="1 to 3"):
        calibrate(ToyEngine(), tmp_path / "artifact", depth=4)
