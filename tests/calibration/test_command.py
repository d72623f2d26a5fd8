"""`vllm-expert-prefetch calibrate` on the tiny MoE, against the same computation in transformers."""

import gzip
import json
import os

import pytest
import torch
from engines import TESTS, TINY_MODEL

from vllm_expert_prefetch.cli.calibrate import sample_data
from vllm_expert_prefetch.cli.main import main

WINDOW, TOP_K, COUNT = 128, 2, 4


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def held_out_texts():
    """Prompts joined to passages; none of them is in the calibration sample."""
    prompts = [json.loads(line)["prompt"] for line in (TESTS / "data" / "prompts.jsonl").read_text().splitlines()]
    return ["\n".join(prompts[start : start + 4]) for start in range(0, 96, 4)]


def reference_recall(model, windows):
    """Mean over layers of the router predictor's recall@k, by transformers alone."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    blocks = loaded.model.layers
    gates = [block.mlp.gate if hasattr(block, "mlp") else block.block_sparse_moe.gate for block in blocks]
    gains = [block.post_attention_layernorm.weight.float() for block in blocks]
    seen = [[] for _ in blocks]
    for gate, inputs in zip(gates, seen, strict=True):
        gate.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].float()))
    with torch.inference_mode():
        for window in windows:
            loaded(input_ids=torch.tensor([window]))
    hidden = [torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs]) for inputs in seen]
    recalls = []
    for source, target in zip(range(len(blocks) - 1), range(1, len(blocks)), strict=True):
        weight = gates[target].weight.float()
        true = (hidden[target] @ weight.T).topk(TOP_K)[1]
        guess = ((hidden[source] * gains[target] / gains[source]) @ weight.T).topk(TOP_K)[1]
        recalls.append((guess.unsqueeze(-1) == true.unsqueeze(1)).any(1).float().mean().item())
    return sum(recalls) / len(recalls)


SMOLLM2_MOE = os.environ.get("SMOLLM2_MOE", "")


@pytest.mark.engine
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(str(TINY_MODEL), id="tiny-moe"),
        pytest.param(
            SMOLLM2_MOE,
            id="smollm2-moe",
            marks=pytest.mark.skipif(not SMOLLM2_MOE, reason="SMOLLM2_MOE names no directory with that demo model"),
        ),
    ],
)
def test_recorded_recall_is_that_of_transformers_on_the_same_text(model):
    from vllm_expert_prefetch.calibration.calibrate import mean_quality
    from vllm_expert_prefetch.calibration.evaluation import evaluate
    from vllm_expert_prefetch.prediction import Ingredients, create_predictor
    from vllm_expert_prefetch.studies.recording import open_recording_engine

    with open_recording_engine(model, WINDOW) as engine:
        windows = [engine.tokenize(text)[:WINDOW] for text in held_out_texts()]
        recorded = [engine.record(window) for window in windows]
        predictor = create_predictor("router", Ingredients(engine.gates))
    found = mean_quality(evaluate(predictor, recorded, COUNT))
    expected = reference_recall(model, windows)
    print(f"recall@{TOP_K}: vLLM {found.recall:.4f}, transformers {expected:.4f}; @{COUNT}: {found.recall_all:.4f}")
    assert found.recall == pytest.approx(expected, abs=0.01)
    assert 0.75 < found.recall < 0.92


@pytest.mark.engine
def test_the_command_makes_a_usable_artifact(tmp_path, capsys):
    from vllm_expert_prefetch.prediction import load_artifact

    lines = gzip.decompress(sample_data().read_bytes()).decode().splitlines()[:16]
    data = write_lines(tmp_path / "data.jsonl", [json.loads(line)["text"] for line in lines])
    output = tmp_path / "artifact"
    options = ["--data", str(data), "-o", str(output), "--max-tokens", "4096", "--window", "256", "--epochs", "2"]
    assert main(["calibrate", str(TINY_MODEL), *options]) == 0
    printed = capsys.readouterr().out
    assert "recall@2 / @4" in printed
    artifact = load_artifact(output)
    assert artifact.card.layers == [f"model.layers.{layer}.mlp.experts" for layer in range(8)]
    assert artifact.defaults.vectors.shape == (8, 16, 128)
    assert artifact.estimator is not None
    means = {name: sum(row[0] for row in rows[1:]) / 7 for name, rows in artifact.card.recall.items()}
    assert means["hybrid"] >= means["router"] - 0.01
    assert (artifact.card.depth, [len(own) for own in artifact.card.hybrid]) == (3, [7, 6, 5])
    ahead = artifact.card.recall_ahead["router"]
    assert ahead[0] == pytest.approx(means["router"])
    assert ahead[0] > ahead[1] > ahead[2] > 0.5
    assert means["router"] > means["transition"] > means["frequency"] > 1.5 * 2 / 16
    assert sum(artifact.card.data["tokens"].values()) == 4096
    guard = artifact.card.guard
    assert sorted(guard["candidates"]) == list(range(1, 7))
    assert guard["measured"][0]["layers"] == 6
    assert artifact.card.allow_list == []
    assert f"allowed in no layer: {guard['tokens']} decoded tokens decide nothing, 1000 are needed" in printed


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], "is empty"),
        ("once upon a time\n", [], "not JSON"),
        ('{"title": "x"}\n', [], "no text"),
        ('{"text": "x"}\n', ["--window", "4"], "--window must be at least 16, got 4"),
        ('{"text": "x"}\n', ["--engine", "[]"], "--engine must be a JSON object"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, capsys, content, options, message):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    arguments = ["calibrate", "/nowhere", "--data", str(data), "-o", str(tmp_path / "artifact"), *options]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
