"""The `--plugin` flag, alone and together with every other way to set `additional_config`."""

import dataclasses
import json

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_expert_prefetch.config import ExpertPrefetchConfig, config_from_additional
from vllm_expert_prefetch.serving.activation import deep_merge


def parse(*arguments: str):
    """What vLLM's own parser makes of a command line; plugins are loaded while it is built."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(list(arguments))).additional_config


ASK = ["--plugin", "expert_prefetch"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (ASK, {"expert_prefetch": {}}),
        (["--additional-config.expert_prefetch.policy", "lfu"], {"expert_prefetch": {"policy": "lfu"}}),
        ([*ASK, "--additional-config.expert_prefetch.cache_gb", "1.5"], {"expert_prefetch": {"cache_gb": 1.5}}),
        ([*ASK, "--additional-config", '{"other": 1}'], {"other": 1, "expert_prefetch": {}}),
        (["--additional-config", '{"other": 1}', *ASK], {"other": 1, "expert_prefetch": {}}),
        (
            [
                "--additional-config",
                '{"expert_prefetch": {"policy": "lfu", "cache_gb": 2}}',
                *ASK,
                "--additional-config.expert_prefetch.cache_gb",
                "3",
            ],
            {"expert_prefetch": {"policy": "lfu", "cache_gb": 3}},
        ),
        (["--additional-config", '{"a": 1}', "--additional-config", '{"b": 2}'], {"b": 2}),
    ],
)
def test_the_ways_to_ask_combine(arguments, expected):
    assert parse(*arguments) == expected


def test_a_configuration_file_combines_with_the_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "plugin: expert_prefetch\nadditional-config:\n  expert_prefetch:\n    policy: lfru\n    slots_per_layer: 4\n"
    )
    arguments = ["--config", str(config), "--additional-config.expert_prefetch.slots_per_layer", "8"]
    assert parse(*arguments) == {"expert_prefetch": {"policy": "lfru", "slots_per_layer": 8}}


def test_parsing_twice_keeps_no_memory():
    assert parse(*ASK) == {"expert_prefetch": {}}
    assert parse("--additional-config", json.dumps({"x": 1})) == {"x": 1}


def test_an_unknown_plugin_is_refused_with_the_installed_ones(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--plugin", "expert_prefetsch")
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "unknown plugin 'expert_prefetsch'" in message
    assert "expert_prefetch" in message
    assert "lora_filesystem_resolver" in message


def test_the_flag_and_a_configuration_that_turns_it_off_contradict_each_other(capsys):
    with pytest.raises(SystemExit):
        parse(*ASK, "--additional-config", json.dumps({"expert_prefetch": False}))
    assert "drop one of them" in capsys.readouterr().err


def test_deep_merge_prefers_the_later_value_and_changes_no_argument():
    low, high = {"a": {"x": 1, "y": 1}, "b": 1}, {"a": {"y": 2}, "c": 3}
    assert deep_merge(low, high) == {"a": {"x": 1, "y": 2}, "b": 1, "c": 3}
    assert low == {"a": {"x": 1, "y": 1}, "b": 1}


def test_installing_twice_changes_nothing():
    from vllm.model_executor.custom_op import op_registry_oot

    from vllm_expert_prefetch.plugin import register

    register()
    before = dict(op_registry_oot)
    register()
    assert op_registry_oot == before
    assert op_registry_oot["RoutedExperts"].__name__ == "CachedRoutedExperts"


WRITTEN = {
    "cache_gb": ("2.5", 2.5),
    "cache_fraction": ("50%", 0.5),
    "slots_per_layer": ("4", 4),
    "kv_cache_tokens": ("8192", 8192),
    "policy": ("lfru", "lfru"),
    "execution": ("exact", "exact"),
    "prefetch": ("on", "on"),
    "predictor": ("previous", "previous"),
    "over_fetch": ("2", 2),
    "lookahead_layers": ("3", 3),
    "areas": ("2", 2),
    "max_decode_delay_ms": ("50", 50.0),
    "draft_experts": ("25%", 0.25),
    "artifact": ("a/folder", "a/folder"),
    "pin_memory": ("off", "off"),
    "numa_node": ("1", 1),
    "huge_pages": ("true", "on"),
    "shared_store": ("name", "name"),
    "emulated_link_gbps": (".5", 0.5),
    "emulated_link_latency_us": ("20", 20.0),
    "self_check": ("off", "off"),
    "planned_hit_rate": ("90 %", 0.9),
    "metrics_per_layer": ("on", True),
    "ghost_caches": ("true", True),
    "metrics_port": ("9400", 9400),
    "trace": ("a/folder", "a/folder"),
    "trace_mb": ("512", 512),
    "trace_weights": ("on", True),
    "profile": ("a/file.json", "a/file.json"),
    "write_profile": ("a/file.json", "a/file.json"),
}
"""Every key: as people write it, and what it means."""
SIZES = ("cache_gb", "cache_fraction", "slots_per_layer", "kv_cache_tokens")


def given_as(way, texts, folder):
    """`additional_config` after these settings, key -> text, were given in one of the ways that there are."""
    if way == "dotted":
        pairs = [(f"--additional-config.expert_prefetch.{key}", text) for key, text in texts.items()]
        return parse(*ASK, *(part for pair in pairs for part in pair))
    if way == "json":
        return parse("--additional-config", json.dumps({"expert_prefetch": texts}))
    if way == "yaml":
        lines = [f"    {key}: {text}\n" for key, text in texts.items()]
        (folder / "config.yaml").write_text("additional-config:\n  expert_prefetch:\n" + "".join(lines))
        return parse("--config", str(folder / "config.yaml"))
    return {"expert_prefetch": dict(texts)}  # LLM(...) takes it as it is


def test_every_key_is_written_here():
    assert list(WRITTEN) == [entry.name for entry in dataclasses.fields(ExpertPrefetchConfig)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["dotted", "json", "yaml", "LLM"])
def test_every_key_means_the_same_in_every_way_of_giving_it(way, size, tmp_path):
    keys = [key for key in WRITTEN if key not in SIZES or key == size]
    config = config_from_additional(given_as(way, {key: WRITTEN[key][0] for key in keys}, tmp_path))
    assert {key: getattr(config, key) for key in keys} == {key: WRITTEN[key][1] for key in keys}
