"""What cannot be served is refused at start-up, with one message that names the key or flag and the remedy."""

import json
import shutil

import pytest
from engines import TINY_MODEL, open_engine
from families import write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.serving.refusals import REFUSALS


def create_config(model=TINY_MODEL, config=None, **options):
    """vLLM's own path from flags to a checked configuration, without loading anything."""
    additional = {"expert_prefetch": config or {}}
    return EngineArgs(str(model), additional_config=additional, max_model_len=512, **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"enable_lora": True, "lora_target_modules": ["experts"]}, "--lora-target-modules"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
        ({"offload_group_size": 2}, "--offload-group-size"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"weight_transfer_config": {"backend": "ipc"}}, "--weight-transfer-config"),
    ],
)
def test_flags_without_a_test_are_refused_by_name(options, flag):
    with pytest.raises(ConfigError, match=flag):
        create_config(**options)


def test_sleep_mode_is_refused_by_vllm_on_the_cpu_platform_and_by_name_where_vllm_has_it(monkeypatch):
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        create_config(enable_sleep_mode=True)
    monkeypatch.setattr(CpuPlatform, "is_sleep_mode_available", lambda self: True)
    with pytest.raises(ConfigError, match="--enable-sleep-mode"):
        create_config(enable_sleep_mode=True)


def test_every_refusal_names_a_flag_and_a_remedy():
    for refusal in REFUSALS:
        assert refusal.what
        assert refusal.flag
        assert refusal.remedy


def test_a_dense_model_is_refused(tmp_path):
    model = write_checkpoint("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"a dense model .*no routed experts"):
        create_config(model, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"speculative_config": {"model": str(TINY_MODEL), "method": "draft_model", "num_speculative_tokens": 2}},
    ],
)
def test_flags_with_a_test_are_let_through(options):
    """Their tests are in `tests/parallel`."""
    create_config(**options)


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown key 'cache_fractoin'; did you mean 'cache_fraction'"):
        create_config(config={"cache_fractoin": 0.5})


def test_a_profile_that_cannot_be_read_or_written_is_said_before_anything_is_loaded(tmp_path):
    create_config(config={"write_profile": str(tmp_path / "hot.json")})
    create_config(config={"profile": str(tmp_path / "hot.json"), "write_profile": str(tmp_path / "hot.json")})
    with pytest.raises(ConfigError, match=r"profile: .*hot\.json is no profile"):
        create_config(config={"profile": str(tmp_path / "hot.json"), "write_profile": str(tmp_path / "other.json")})
    with pytest.raises(
        ConfigError, match=r"write_profile: .*missing/hot\.json cannot be written: .*or leave the key out"
    ):
        create_config(config={"write_profile": str(tmp_path / "missing" / "hot.json")})


@pytest.mark.parametrize(("version", "on_cpu"), [("0.25.1", False), ("0.34.0", False), ("0.29.0", True)])
def test_other_versions_of_vllm_are_refused_with_the_range(version, on_cpu):
    with pytest.raises(ConfigError, match=r"0\.26 to 0\.33 on a GPU"):
        compat.check_version(version, on_cpu)


@pytest.mark.parametrize(("version", "on_cpu"), [("0.26.0", False), ("0.33.2+cu130", False), ("0.30.0rc1", True)])
def test_versions_in_the_range_are_accepted(version, on_cpu):
    compat.check_version(version, on_cpu)


@pytest.fixture
def model_copy(tmp_path):
    return shutil.copytree(TINY_MODEL, tmp_path / "model", copy_function=shutil.copyfile)


def tensors_of(model):
    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def truncate(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_attention(model):
    tensors = tensors_of(model)
    name = "model.layers.3.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:-8].contiguous()}, model / "model.safetensors", {"format": "pt"})


def cut_one_expert(tensors):
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name][:-8].contiguous()


def drop_one_expert(tensors):
    del tensors["model.layers.3.mlp.experts.5.up_proj.weight"]


@pytest.mark.engine
def test_a_weight_that_is_too_small_fails_as_in_plain_vllm(model_copy):
    cut_attention(model_copy)
    with pytest.raises(RuntimeError) as failure:
        open_engine(model_copy, None).__enter__()
    with pytest.raises(RuntimeError) as ours:
        open_engine(model_copy, True).__enter__()
    assert str(ours.value) == str(failure.value)


@pytest.mark.engine
@pytest.mark.long
def test_a_server_of_a_damaged_checkpoint_ends_with_vllms_error(model_copy):
    from servers import serve

    truncate(model_copy)
    with serve("--plugin", "expert_prefetch", model=model_copy) as running:
        assert running.process.wait(120) != 0
        log = running.log.read_text()
        assert running.all_gone(10)
    assert "Error" in log
    assert "TakeoverError" not in log


@pytest.mark.engine
@pytest.mark.parametrize(
    ("damage", "found"),
    [(drop_one_expert, "'missing'"), (cut_one_expert, r"\(56, 128\)")],
    ids=["missing", "too small"],
)
def test_a_checkpoint_with_a_damaged_expert_fails_by_name(damage, found, model_copy):
    """Plain vLLM serves uninitialised memory there."""
    tensors = tensors_of(model_copy)
    damage(tensors)
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    place = r"model\.layers\.3\.mlp\.experts, w13_weight \(w3\)"
    with pytest.raises(TakeoverError, match=rf"{place}: expected \(64, 128\) .* found {{5: {found}}}"):
        open_engine(model_copy, True).__enter__()


@pytest.mark.engine
def test_what_cannot_be_ends_the_start_before_anything_is_loaded_with_the_message_last():
    from servers import serve

    with serve("--additional-config", json.dumps({"expert_prefetch": {"slots_per_layer": 1}})) as running:
        assert running.process.wait(120) != 0
        lines = running.log.read_text().strip().splitlines()
    assert "gives 1 slots per layer, and one token needs 2" in lines[-1]
    assert not any("EngineCore" in line for line in lines)
