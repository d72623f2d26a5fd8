"""The configuration: what is accepted, what is refused in which words, and its table in the documentation."""

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
from doc_tables import config_table, documented

from vllm_expert_prefetch.config import REMOVED, ConfigError, ExpertPrefetchConfig, config_from_additional, config_of
from vllm_expert_prefetch.residency import POLICIES

KEYS = [entry.name for entry in dataclasses.fields(ExpertPrefetchConfig)]


class VllmConfig(SimpleNamespace):
    """Stands for vLLM's; a plain SimpleNamespace cannot be referred to weakly."""


SIZES = ["cache_gb", "cache_fraction", "slots_per_layer"]

GOOD = {
    "cache_gb": [0.001, 12, 12.5],
    "cache_fraction": [0.01, 0.5, 1, 1.0],
    "slots_per_layer": [1, 64],
    "kv_cache_tokens": [None, 1, 40960],
    "policy": list(POLICIES),
    "execution": ["exact"],
    "prefetch": ["auto", "on", "off"],
    "predictor": ["auto", "router", "hybrid", "previous"],
    "over_fetch": [0, 1, 8],
    "lookahead_layers": [1, 2],
    "areas": ["auto", 1, 2],
    "max_decode_delay_ms": [None, 50, 0.5],
    "draft_experts": ["resident", 0.25],
    "artifact": [None, "folder"],
    "pin_memory": ["auto", "on", "off"],
    "numa_node": [None, 0, 3],
    "huge_pages": ["auto", "on", "off"],
    "shared_store": ["off", "a", "qwen3-30b_A3B.1", "7"],
    "emulated_link_gbps": [None, 1, 0.5],
    "emulated_link_latency_us": [0, 0.0],
    "self_check": ["on", "off"],
    "planned_hit_rate": [None, 0.9, 1],
    "metrics_per_layer": [True, False],
    "ghost_caches": [True, False],
    "metrics_port": [None, 9400, 65535],
    "trace": ["off", "/var/traces"],
    "trace_mb": [256],
    "trace_weights": [False],
    "profile": [None, "file"],
    "write_profile": [None, "file"],
}
BAD = {
    "cache_gb": [0, -1, math.nan, math.inf, "12 GB", True],
    "cache_fraction": [0, -0.5, 1.01, math.nan, "half", True],
    "slots_per_layer": [0, -3, 2.5, "8.5", True],
    "kv_cache_tokens": [0, -1, 1.5, "many", True],
    "policy": ["LRU", "fifo", "", None, 1],
    "execution": ["Speculative", None, 1],
    "prefetch": ["yes", None, 1],
    "predictor": ["oracle", "none", "", None, 1],
    "over_fetch": [-1, 1.5, "one", None, True],
    "lookahead_layers": [0, -1, 1.5, None],
    "areas": [0, 3, 1.5, "two", None],
    "max_decode_delay_ms": [0, -1, math.inf, "50 ms", True],
    "draft_experts": [0, 1, -0.5, math.nan, "auto", "100%", None, True],
    "artifact": [1, True],
    "pin_memory": ["yes", 0, None],
    "numa_node": [-1, 0.5, "node 0", True],
    "huge_pages": [1, 0, "maybe", None],
    "shared_store": ["on", True, "", "a/b", "../a", "a b", "-a", "a" * 65, None, 1],
    "emulated_link_gbps": [0, -1, math.inf, "ten", True],
    "emulated_link_latency_us": [-1, math.nan, math.inf, "5 us", None, True],
    "self_check": ["auto", "yes", None, 1],
    "planned_hit_rate": [0, 1.5, math.nan, "90", "101%", True],
    "metrics_per_layer": [1, "maybe", None],
    "ghost_caches": [1, "1.5", None],
    "metrics_port": [0, 65536, 9400.5, "http", True],
    "trace": ["on", True, "", None, 1],
    "trace_mb": [0, -1, 0.5, "much", None, True],
    "trace_weights": [1, "maybe", None],
    "profile": [1, True],
    "write_profile": [1, True],
}


def cases(values):
    return [pytest.param(key, value, id=f"{key}={value!r}") for key, several in values.items() for value in several]


def test_every_key_has_accepted_and_refused_values_here():
    assert list(GOOD) == KEYS == list(BAD)


def test_the_defaults_are_a_valid_configuration():
    config = ExpertPrefetchConfig()
    assert (config.policy, config.execution, config.prefetch) == ("ewma", "exact", "auto")
    assert config == ExpertPrefetchConfig.from_mapping({})


@pytest.mark.parametrize(("key", "value"), cases(GOOD))
def test_good_values_are_kept_as_they_are(key, value):
    assert getattr(ExpertPrefetchConfig.from_mapping({key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), cases(BAD))
def test_bad_values_are_refused_with_the_name_of_their_key(key, value):
    with pytest.raises(ConfigError, match=rf"^expert_prefetch: {key} must be .*, got .*{value}.?$"):
        ExpertPrefetchConfig.from_mapping({key: value})


SWITCHES = ("prefetch", "pin_memory", "huge_pages", "self_check", "metrics_per_layer", "ghost_caches", "trace_weights")


@pytest.mark.parametrize("key", [key for key in KEYS if key not in SWITCHES])
def test_true_is_not_a_number_and_not_a_name(key):
    with pytest.raises(
        ConfigError,
        match=f"{key} must be (a number|a valid string|auto, or 1 to 4|auto, 1 or 2|off, or the folder to record into"
        "|resident, or a share above 0 and below 1|off, or a name of letters, digits, dots, - and _)"
        ", got True",
    ):
        ExpertPrefetchConfig.from_mapping({key: True})


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("prefetch", True, "on"),  # YAML reads on and off as true and false
        ("prefetch", False, "off"),
        ("pin_memory", True, "on"),
        ("pin_memory", False, "off"),
        ("huge_pages", True, "on"),
        ("self_check", False, "off"),
        ("trace", False, "off"),
        ("shared_store", False, "off"),
        ("huge_pages", "True", "on"),
        ("huge_pages", "false", "off"),
        ("metrics_per_layer", "on", True),
        ("ghost_caches", "on", True),
        ("metrics_per_layer", "false", False),
        ("cache_fraction", ".5", 0.5),
        ("cache_fraction", "50%", 0.5),
        ("cache_fraction", "12.5 %", 0.125),
        ("planned_hit_rate", "90%", 0.9),
        ("cache_gb", "12", 12.0),
        ("slots_per_layer", "8", 8),
        ("slots_per_layer", 8.0, 8),
        ("metrics_port", "9400", 9400),
        ("over_fetch", "0", 0),
    ],
)
def test_what_people_write_is_understood(key, written, meant):
    found = getattr(ExpertPrefetchConfig.from_mapping({key: written}), key)
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize("key", ["cache_gb", "slots_per_layer", "emulated_link_gbps"])
def test_only_shares_are_given_in_per_cent(key):
    with pytest.raises(ConfigError, match=f"{key} must be"):
        ExpertPrefetchConfig.from_mapping({key: "50%"})


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("cache_gib", "cache_gb"),
        ("cache-fraction", "cache_fraction"),
        ("slots", "slots_per_layer"),
        ("polcy", "policy"),
        ("numa", "numa_node"),
        ("hugepages", "huge_pages"),
        ("emulated_link_gbs", "emulated_link_gbps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one_and_all_of_them(unknown, nearest):
    with pytest.raises(ConfigError) as refused:
        ExpertPrefetchConfig.from_mapping({unknown: 1})
    assert f"unknown key {unknown!r}; did you mean {nearest!r}?" in str(refused.value)
    assert all(key in str(refused.value) for key in KEYS)


@pytest.mark.parametrize("unknown", ["", "zzz", "%", 7])
def test_an_unknown_key_that_resembles_none_is_refused_without_a_guess(unknown):
    with pytest.raises(ConfigError, match=rf"unknown key {unknown!r}\. Valid keys: cache_gb, "):
        ExpertPrefetchConfig.from_mapping({unknown: 1})


@pytest.mark.parametrize(("key", "instead"), REMOVED.items())
def test_a_removed_key_is_refused_with_what_does_it_now(key, instead):
    with pytest.raises(ConfigError, match=re.escape(f"{key} is no key any more: {instead}. Drop it")):
        ExpertPrefetchConfig.from_mapping({key: "auto"})


@pytest.mark.parametrize("left_out", [None, *SIZES])
def test_cache_sizes_exclude_each_other(left_out):
    given = {"cache_gb": 4, "cache_fraction": 0.5, "slots_per_layer": 8}
    given.pop(left_out, None)
    with pytest.raises(ConfigError, match=f"{' and '.join(given)} exclude each other"):
        ExpertPrefetchConfig.from_mapping(given)


def test_tokens_of_the_kv_cache_are_for_a_cache_that_is_sized_by_them():
    with pytest.raises(ConfigError, match="cache_gb and kv_cache_tokens exclude each other; keep one"):
        ExpertPrefetchConfig(cache_gb=4, kv_cache_tokens=1000)


def test_an_emulated_latency_needs_an_emulated_link():
    assert ExpertPrefetchConfig(emulated_link_gbps=10, emulated_link_latency_us=5).emulated_link_latency_us == 5
    with pytest.raises(ConfigError, match="emulated_link_latency_us needs emulated_link_gbps"):
        ExpertPrefetchConfig(emulated_link_latency_us=5)


@pytest.mark.parametrize(("key", "value"), [("trace_weights", True), ("trace_mb", 1), ("trace_mb", 4096)])
def test_what_is_said_of_a_recording_needs_one(key, value):
    assert getattr(ExpertPrefetchConfig(trace="folder", **{key: value}), key) == value
    with pytest.raises(ConfigError, match=f"{key} needs trace as well: say where to record, or drop it"):
        ExpertPrefetchConfig(**{key: value})


def test_a_configuration_is_parsed_once():
    vllm_config = VllmConfig(additional_config={"expert_prefetch": {"policy": "lfu"}})
    config = config_of(vllm_config)
    assert config == ExpertPrefetchConfig(policy="lfu")
    vllm_config.additional_config = {}
    assert config_of(vllm_config) is config
    assert config_of(VllmConfig(additional_config={})) is None


def test_vllms_configuration_gets_no_attribute():
    """vLLM makes configurations of others by their attributes (for draft models), and knows all of them."""
    vllm_config = VllmConfig(additional_config={"expert_prefetch": True})
    config_of(vllm_config)
    assert list(vars(vllm_config)) == ["additional_config"]


def test_a_draft_model_is_not_for_the_plugin():
    """vLLM hands the settings of a model on to its drafts: in a configuration of their own, or beside the target's."""
    target, draft = object(), object()
    speculative = SimpleNamespace(draft_model_config=draft, target_model_config=target)
    own = VllmConfig(additional_config={"expert_prefetch": True}, speculative_config=speculative)
    own.model_config = draft
    assert config_of(own) is None
    shared = VllmConfig(**vars(own))
    shared.model_config = target
    assert config_of(shared) == config_of(shared, target) == ExpertPrefetchConfig()
    assert config_of(shared, draft) is None
    speculative.draft_model_config = target  # ngram
    assert config_of(shared, target) == ExpertPrefetchConfig()


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExpertPrefetchConfig().policy = "lfu"


@pytest.mark.parametrize("additional", [None, {}, {"other": {"policy": "lfu"}}, {"expert_prefetch": False}, "text", 3])
def test_without_its_key_or_with_false_the_plugin_is_not_asked_for(additional):
    assert config_from_additional(additional) is None


@pytest.mark.parametrize("key", ["expert-prefetch", "Expert_Prefetch", "expertprefetch", "EXPERT PREFETCH"])
@pytest.mark.parametrize("values", [{}, False])
def test_a_key_that_was_meant_to_be_the_plugins_is_refused_with_the_right_one(key, values):
    with pytest.raises(ConfigError, match=f"{key} is no key.* write expert_prefetch"):
        config_from_additional({key: values})


@pytest.mark.parametrize("values", [{}, True])
def test_an_empty_object_and_true_mean_everything_automatic(values):
    assert config_from_additional({"expert_prefetch": values, "other": 1}) == ExpertPrefetchConfig()


def test_settings_are_read_from_the_key():
    config = config_from_additional({"expert_prefetch": {"policy": "lfu", "cache_gb": 2}})
    assert config == ExpertPrefetchConfig(policy="lfu", cache_gb=2)


@pytest.mark.parametrize("values", [None, "on", 1, 0, [], ["policy"]])
def test_anything_else_under_the_key_is_refused(values):
    with pytest.raises(ConfigError, match=r"expected an object of settings \(or true / false\), got"):
        config_from_additional({"expert_prefetch": values})


def test_the_documented_table_is_the_code():
    assert documented("config") == config_table(), "python tests/doc_tables.py brings it up to date"


@pytest.mark.parametrize("entry", dataclasses.fields(ExpertPrefetchConfig), ids=lambda entry: entry.name)
def test_every_key_says_what_it_means(entry):
    assert len(entry.metadata["doc"]) > 20
    assert entry.metadata["doc"].endswith(".")


def test_every_policy_is_explained():
    doc = ExpertPrefetchConfig.__dataclass_fields__["policy"].metadata["doc"]
    assert re.findall(r"`(\w+)`, ", doc) == list(POLICIES)
