"""The facts that ship: sizes agree with what models are named after, and with what vLLM's own code gave."""

import re

import pytest
from doc_tables import documented, models_table, recordings_table

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.planning.architecture import read_architecture
from vllm_expert_prefetch.planning.facts import find_gpu, find_link, find_model, load_facts
from vllm_expert_prefetch.planning.formats import FORMATS, format_of, row_bytes

FACTS = load_facts()
PUBLISHED = {
    "DeepSeek-V3": 671,
    "DeepSeek-V4-Flash": 284,
    "GLM-4.5": 355,
    "GLM-4.5-Air": 106,
    "Kimi-K2-Instruct": 1000,
    "Mixtral-8x7B-v0.1": 46.7,
    "Mixtral-8x22B-v0.1": 141,
    "MiniMax-M2.5": 229,
    "OLMoE-1B-7B-0924": 6.9,
    "Llama-4-Maverick-17B-128E-Instruct": 400,
    "granite-4.0-h-small": 32,
    "MiMo-V2-Flash": 309,
    "LFM2-8B-A1B": 8.3,
}
"""Billions of parameters where the name does not tell, or tells something else."""


def shape_of(name):
    model, form = find_model(name)
    return read_architecture(model.config), form


def named_billions(name):
    found = re.search(r"-(\d+(?:\.\d+)?)[Bb](?=-|$)", name)
    return PUBLISHED.get(name) or (float(found[1]) if found and not name.startswith(("Llama", "granite-3")) else None)


SIZED = [model for model in FACTS.models if named_billions(model.name)]


def test_at_least_twenty_five_models_have_their_size_checked():
    assert len(SIZED) >= 25


@pytest.mark.parametrize("model", SIZED, ids=lambda model: model.name)
def test_the_parameters_that_are_counted_are_those_that_the_name_says(model):
    counted = read_architecture(model.config).total_parameters / 1e9
    assert counted == pytest.approx(named_billions(model.name), rel=0.06)


@pytest.mark.parametrize("model", FACTS.models, ids=lambda model: model.name)
def test_every_model_has_a_source_and_formats_whose_records_are_known(model):
    shape = read_architecture(model.config)
    assert model.source
    assert model.formats.keys() <= FORMATS.keys()
    assert shape.sequence_bytes(8192, 2, 1) > 0
    assert 1 <= shape.top_k <= shape.num_experts
    assert all(min(row_bytes(form, shape)) > 0 for form in model.formats)


@pytest.mark.parametrize("gpu", FACTS.gpus, ids=lambda gpu: gpu.name)
def test_every_gpu_has_a_source_and_a_link_that_is_known(gpu):
    assert gpu.source
    assert find_link(gpu.link).gbps < find_link(gpu.link).nominal_gbps
    assert find_gpu(f"NVIDIA {gpu.name.lower()}") is gpu


@pytest.mark.parametrize(
    ("name", "form", "capability", "record"),
    [
        ("Qwen3-30B-A3B", "bf16", 90, 9_437_184),
        ("Qwen3-30B-A3B", "fp8", 90, 4_719_744),
        ("Qwen3-30B-A3B", "fp8", 86, 4_792_320),
        ("Qwen3-30B-A3B", "fp8-channel", 90, 4_732_928),
        ("Qwen3-30B-A3B", "int8", 90, 4_732_928),
        ("Qwen3-30B-A3B", "int4", 90, 2_433_024),
        ("Qwen3-30B-A3B", "gptq-int4", 90, 2_451_456),
        ("Qwen3-30B-A3B", "mxfp4", 90, 2_506_752),
        ("Qwen3-30B-A3B", "nvfp4", 90, 2_654_216),
        ("gpt-oss-120b", "mxfp4", 90, 14_431_744),
        ("DeepSeek-V3", "fp8", 90, 44_050_944),
        ("DeepSeek-V3", "fp8", 80, 44_728_320),
        ("DeepSeek-V3", "nvfp4", 90, 24_772_616),
        ("GLM-4.5-Air", "fp8", 90, 17_305_728),
        ("GLM-4.5-Air", "gptq-int4", 90, 8_988_672),
        ("Qwen3-Next-80B-A3B-Instruct", "fp8", 90, 3_146_496),
        ("Qwen3-Next-80B-A3B-Instruct", "int4", 90, 1_622_016),
    ],
)
def test_records_are_those_that_vllms_own_code_made(name, form, capability, record):
    assert sum(row_bytes(form, shape_of(name)[0], 1, capability)) == record


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("Qwen3-30B-A3B", 98_304),
        ("DeepSeek-V3", 70_272),
        ("Mixtral-8x7B-v0.1", 131_072),
        ("granite-4.0-h-small", 16_384),
    ],
)
def test_a_token_of_context_takes_what_its_attention_keeps(name, per_token):
    shape, _ = shape_of(name)
    assert shape.sequence_bytes(2000, 2, 1) - shape.sequence_bytes(1000, 2, 1) == 1000 * per_token
    assert shape.sequence_bytes(2000, 1, 1) <= shape.sequence_bytes(2000, 2, 1)


def test_a_window_keeps_no_more_than_itself_and_latents_are_on_every_rank():
    gpt, _ = shape_of("gpt-oss-120b")
    assert gpt.sequence_bytes(2000, 2, 1) - gpt.sequence_bytes(1000, 2, 1) == 1000 * 18 * 2 * 8 * 64 * 2
    latent, _ = shape_of("DeepSeek-V3")
    assert latent.sequence_bytes(1000, 2, 8) == latent.sequence_bytes(1000, 2, 1)
    grouped, _ = shape_of("Qwen3-30B-A3B")
    assert grouped.sequence_bytes(1000, 2, 8) == grouped.sequence_bytes(1000, 2, 1) / 4, "4 heads"


def compressed(**weights):
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fp8"}, "fp8-channel"),
        ({"quant_method": "gptq", "bits": 4}, "gptq-int4"),
        ({"quant_method": "awq", "w_bit": 4}, "gptq-int4"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        (compressed(type="int", num_bits=4, group_size=32), "int4-g32"),
        (compressed(type="float", num_bits=8, strategy="channel"), "fp8-channel"),
        (compressed(type="float", num_bits=8, strategy="block"), "fp8"),
    ],
)
def test_a_checkpoint_says_how_it_is_quantised(given, form):
    assert format_of({"quantization_config": given}) == form
    assert format_of({"text_config": {"hidden_size": 1, "quantization_config": given}}) == form


def test_a_quantisation_that_is_not_known_is_refused_with_the_flag_that_says_it():
    with pytest.raises(ConfigError, match=r"quantization_config of exl3 is not known.*--quantization bf16"):
        format_of({"quantization_config": {"quant_method": "exl3"}})


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match=r"llama has no routed experts.*Plain vLLM serves it"):
        read_architecture({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2})


def test_tables_of_n_grams_are_weights_too():
    model, _ = find_model("Qwen3.5-35B-A3B")
    plain = read_architecture(model.config)
    found = read_architecture({**model.config, "ple_layer_ids": [2], "ngram_vocab_size_base": 20_000_000})
    assert found.total_parameters - plain.total_parameters == 20_000_000 * 2048
    assert found.active_parameters == plain.active_parameters


def test_a_key_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="qwen3_moe has no vocab_size"):
        read_architecture({"model_type": "qwen3_moe", "hidden_size": 8, "num_experts": 4, "num_experts_per_tok": 2})


@pytest.mark.parametrize(("name", "table"), [("models", models_table), ("recordings", recordings_table)])
def test_the_documentation_shows_the_facts(name, table):
    assert documented(name) == table(), "python tests/doc_tables.py brings it up to date"
