"""The configuration: one frozen dataclass, validated in one place.

It is what stands under the key `expert_prefetch` of vLLM's `additional_config`. Unknown keys are errors. Numbers may be
given as text, shares in per cent, and switches as YAML and JSON write them: people write all of these.
"""

import difflib
import re
import weakref
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StrictStr, ValidationError
from pydantic.dataclasses import dataclass

from vllm_expert_prefetch.residency import HALF_LIFE, POLICIES

CONFIG_KEY = "expert_prefetch"
AUTO = "auto"
OFF = "off"
BROKEN_GRAPHS = "vLLM interrupts its CUDA graphs without joining other streams: VLLM_USE_BREAKABLE_CUDAGRAPH=0 helps"
RESIDENT = "resident"
EXACT, SPECULATIVE = "exact", "speculative"

DEFAULT_CPU_FRACTION = 0.5
MOST_LOOKAHEAD_LAYERS = 4
GHOST_SCALES = ("1.5", "2")
"""How many times the slots ghost caches have."""

PREDICTORS = ("router", "router_defaults", "estimator", "hybrid", "previous", "frequency", "transition")
"""Those of `prediction` that can serve; studies have others."""

REMOVED = {
    "staging": "every platform has one engine, C++ on the CPU platform and CUDA on a GPU",
    "stream_buffer": "overflow rows, which all layers share, hold what a step needs beyond the slots",
    "max_token_waves": "no step is split: overflow rows hold what it needs beyond the slots",
}
"""Keys of earlier versions, and what does it now."""


class ConfigError(RuntimeError):
    """A setting that cannot be honoured. The message names the key and the remedy."""


def _key(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _one_of(*valid: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in valid:
            raise ValueError(f"must be one of {', '.join(valid)}")
        return value

    return AfterValidator(check)


def _plain(value: Any) -> Any:
    """True and false are no numbers."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _per_cent(value: Any) -> Any:
    found = re.fullmatch(r"\s*([\d.]+)\s*%\s*", value) if isinstance(value, str) else None
    return float(found[1]) / 100 if found else value


def _switch(value: Any) -> Any:
    """YAML reads `on` as true."""
    meant = {"true": "on", "false": OFF}.get(str(value).lower())
    return meant if meant and isinstance(value, (bool, str)) else value


def _folder_or_off(value: Any) -> Any:
    if str(value).lower() in ("", "on", "true"):
        raise ValueError("must be off, or the folder to record into")
    return OFF if str(value).lower() == "false" else value


def _name_or_off(value: Any) -> Any:
    if str(value).lower() in ("false", OFF):
        return OFF
    if not re.fullmatch(r"(?!(on|true)$)\w[\w.-]{0,63}", str(value), re.ASCII | re.IGNORECASE):
        raise ValueError("must be off, or a name of letters, digits, dots, - and _")
    return value


def _share_or_resident(value: Any) -> Any:
    if value == RESIDENT:
        return value
    try:
        share = float(_plain(_per_cent(value)))
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"must be {RESIDENT}, or a share above 0 and below 1")
    return share


def _flag(value: Any) -> Any:
    """Numbers are no switches."""
    if not isinstance(value, (bool, str)):
        raise ValueError("must be true or false")
    return value


def _layers_ahead(value: Any) -> Any:
    number = int(value) if re.fullmatch(r"\s*\d+\s*", str(value)) else value
    if number != AUTO and (isinstance(number, bool) or number not in range(1, MOST_LOOKAHEAD_LAYERS + 1)):
        raise ValueError(f"must be {AUTO}, or 1 to {MOST_LOOKAHEAD_LAYERS}")
    return number


def _areas(value: Any) -> Any:
    number = int(value) if re.fullmatch(r"\s*[12]\s*", str(value)) else value
    if number != AUTO and (isinstance(number, bool) or number not in (1, 2)):
        raise ValueError(f"must be {AUTO}, 1 or 2")
    return number


_Count = Annotated[int, BeforeValidator(_plain)]
_Number = Annotated[float, BeforeValidator(_plain), Field(allow_inf_nan=False)]
_Positive = Annotated[_Number, Field(gt=0)]
_Share = Annotated[_Positive, Field(le=1), BeforeValidator(_per_cent)]
_Switch = Annotated[StrictStr, BeforeValidator(_switch), _one_of(AUTO, "on", OFF)]
_Flag = Annotated[bool, BeforeValidator(_flag)]


@dataclass(frozen=True)
class ExpertPrefetchConfig:
    """Every setting of the plugin; `docs/configuration.md` shows the same table.

    Raises ConfigError on construction when a value is out of range or two settings exclude each other.
    """

    cache_gb: _Positive | None = _key(
        None,
        "Size of the expert cache on each accelerator, in GB (10^9 bytes), all MoE layers together. "
        "Excludes `cache_fraction` and `slots_per_layer`.",
    )
    cache_fraction: _Share | None = _key(
        None, "Share of each layer's experts that get a slot, 0 to 1. Excludes `cache_gb` and `slots_per_layer`."
    )
    slots_per_layer: Annotated[_Count, Field(ge=1)] | None = _key(
        None, "Expert slots of each MoE layer. Excludes `cache_gb` and `cache_fraction`."
    )
    kv_cache_tokens: Annotated[_Count, Field(ge=1)] | None = _key(
        None,
        "GPU only, without a size of the expert cache: tokens that vLLM's KV cache holds at least; the expert cache "
        "takes the rest of the memory. Unset: four sequences of `max_model_len`, or half of that memory at most.",
    )
    policy: Annotated[StrictStr, _one_of(*POLICIES)] = _key(
        "ewma",
        "Eviction policy, who leaves: `lru`, the least recently used expert; `lfu`, the least often used; `lfru`, the "
        "one with the fewest uses over the age of the last; `ewma`, the one with the fewest uses, which halve every "
        f"{HALF_LIFE} steps.",
    )
    execution: Annotated[StrictStr, _one_of(EXACT, SPECULATIVE)] = _key(
        EXACT,
        "`exact`: the tokens are those of plain vLLM. `speculative`: where every sequence gives one token, the layers "
        "that the artifact allows execute the experts predicted for them in place of the router's: other tokens, fewer "
        "copies. Needs `artifact`; the CPU platform only.",
    )
    prefetch: _Switch = _key(
        AUTO,
        "Copy experts before they are needed: `on`; `off`; `auto`: on, layer by layer where it pays. On the CPU "
        "platform `auto` looks ahead over an emulated link only.",
    )
    predictor: Annotated[StrictStr, _one_of(AUTO, *PREDICTORS)] = _key(
        AUTO,
        "What guesses the next layer's experts: "
        + ", ".join(f"`{name}`" for name in PREDICTORS)
        + "; `auto`: what the artifact found best, without one `router`. All but `router` and `previous` need an "
        "artifact.",
    )
    over_fetch: Annotated[_Count, Field(ge=0)] = _key(
        1,
        "Experts to prefetch for each token beyond the model's top-k: those that are nearly as likely as the last of "
        "these, where a copy fits the time there is.",
    )
    lookahead_layers: Annotated[int | str, BeforeValidator(_layers_ahead)] = _key(
        AUTO,
        "How many MoE layers ahead to predict, 1 to 4, the nearest first; a farther one is fetched for only while the "
        "link would idle. `auto`: 4 on the CPU platform, 2 on a GPU; each layer goes as far as it pays.",
    )
    areas: Annotated[int | str, BeforeValidator(_areas)] = _key(
        AUTO,
        "Areas of overflow rows: with 2, what a prompt needs of the next layer is copied while a layer computes. "
        "`auto`: 2 where look-ahead is on and the second one costs at most 5 % of the cache.",
    )
    max_decode_delay_ms: _Positive | None = _key(
        None,
        "What a step that decodes may take when prompts come beside it, in milliseconds: such a step takes as many "
        "prompt tokens as keep it within this, as timed while serving, but 16 at least. Decodes get steadier, prompts "
        "slower. Unset: as many as vLLM's `max_num_batched_tokens` allows.",
    )
    draft_experts: Annotated[float | str, BeforeValidator(_share_or_resident)] = _key(
        RESIDENT,
        "Where a draft of speculative decoding that has MoE layers keeps their experts: `resident`, all on the "
        "accelerator; or the share of each layer's experts that get a slot, above 0 and below 1: a cache of its own.",
    )
    artifact: StrictStr | None = _key(None, "Folder that `vllm-expert-prefetch calibrate` has written for this model.")
    pin_memory: _Switch = _key(
        AUTO,
        "Page-lock the host store: `auto` (on a GPU yes, on CPU no), `on`, `off` (not with a GPU, whose kernels read "
        "it). A store that cannot be page-locked stops the start.",
    )
    numa_node: Annotated[_Count, Field(ge=0)] | None = _key(
        None,
        "NUMA node that holds the host store. Unset: on a GPU the node that it hangs on, on CPU where the worker runs.",
    )
    huge_pages: _Switch = _key(
        AUTO,
        "Ask for transparent huge pages (2 MB) for the host store: `auto` (on a GPU yes, and without them where the "
        "kernel gives none; on CPU no), `on` (fail at start-up where it gives none), `off`.",
    )
    shared_store: Annotated[StrictStr, BeforeValidator(_name_or_off)] = _key(
        OFF,
        "A name, or `off`: servers of one user on one host that give the same name keep the records of their "
        "checkpoint once for all of them. See below.",
    )
    emulated_link_gbps: _Positive | None = _key(
        None, "CPU only, for studies: bandwidth of an emulated host-to-accelerator link, in GB/s (10^9 bytes/s)."
    )
    emulated_link_latency_us: Annotated[_Number, Field(ge=0)] = _key(
        0.0, "CPU only: latency of each copy batch over the emulated link, in microseconds."
    )

    self_check: Annotated[StrictStr, BeforeValidator(_switch), _one_of("on", OFF)] = _key(
        "on",
        "Prove at start that copies are whole, and that the kernel gives the same bits whatever rows experts are in: "
        "seconds. `off` serves what nothing has proved on this machine.",
    )

    planned_hit_rate: _Share | None = _key(
        None,
        "Hit rate that the cache was sized for, 0 to 1: shown as a metric, and an alert fires below it. Unset: the "
        "share of experts that have a slot.",
    )
    metrics_per_layer: _Flag = _key(False, "Also show lookups and stalls of each MoE layer on /metrics.")
    ghost_caches: _Flag = _key(
        False,
        "Also count the hits that caches of " + " and ".join(GHOST_SCALES) + " times the slots would have, so that "
        "/metrics shows whether more memory would help. They hold no experts.",
    )
    metrics_port: Annotated[_Count, Field(ge=1, le=65535)] | None = _key(
        None,
        "Each worker also shows its own numbers on this port plus its rank on the host, on every interface: for "
        "workers on other hosts than the API server. Unset: on vLLM's /metrics only.",
    )

    trace: Annotated[StrictStr, BeforeValidator(_folder_or_off)] = _key(
        OFF,
        "Record routing from the start: the folder to record into, or `off`. `vllm-expert-prefetch trace` starts and "
        "stops a recording of a running server.",
    )
    trace_mb: Annotated[_Count, Field(ge=1)] = _key(
        256, "Size of all recordings in that folder, in MB (10^6 bytes): the oldest files go. Needs `trace`."
    )
    trace_weights: _Flag = _key(
        False,
        "Record the gate weights as well: three times the room. Needs `trace`; for a running server "
        "`vllm-expert-prefetch trace start --weights`.",
    )
    profile: StrictStr | None = _key(
        None,
        "File that `write_profile`, or `--write-profile` of `trace stop` or `simulate`, wrote for this model: its "
        "most used experts are in the slots at start. Unset: slots start free.",
    )
    write_profile: StrictStr | None = _key(
        None,
        "File for `profile`, written at the server's end and once a minute: the experts with a slot. Unset: none.",
    )

    @property
    def sizes_given(self) -> list[str]:
        """The keys that say how large the expert cache is; none of them: it is sized by what memory there is."""
        return [name for name in ("cache_gb", "cache_fraction", "slots_per_layer") if getattr(self, name) is not None]

    def __post_init__(self) -> None:
        given = self.sizes_given + ["kv_cache_tokens"] * (self.kv_cache_tokens is not None)
        if len(given) > 1:
            raise ConfigError(_message(f"{' and '.join(given)} exclude each other; keep one"))
        if self.execution == SPECULATIVE:
            self._check_speculative()
        for key in ("trace_mb", "trace_weights"):
            if self.trace == OFF and getattr(self, key) != getattr(ExpertPrefetchConfig, key):
                raise ConfigError(_message(f"{key} needs trace as well: say where to record, or drop it"))
        if self.emulated_link_latency_us and self.emulated_link_gbps is None:
            raise ConfigError(
                _message("emulated_link_latency_us needs emulated_link_gbps as well: set it, or drop the latency")
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "ExpertPrefetchConfig":
        """Build from what the user gave; raises ConfigError naming the nearest valid key for an unknown one."""
        valid = [entry.name for entry in fields(cls)]
        for key in values:
            if key in REMOVED:
                raise ConfigError(_message(f"{key} is no key any more: {REMOVED[key]}. Drop it"))
            if key not in valid:
                nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.45)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
                raise ConfigError(_message(f"unknown key {key!r}{hint} Valid keys: {', '.join(valid)}"))
        try:
            return cls(**values)
        except ValidationError as error:
            wrong = error.errors()[0]
            key, rule = str(wrong["loc"][0]), wrong["msg"].removeprefix("Value error, ").replace("Input should", "must")
            raise ConfigError(_message(f"{key} {rule}, got {values[key]!r}")) from None

    def _check_speculative(self) -> None:
        if self.artifact is None:
            problem = "artifact, which says in which layers: make one with vllm-expert-prefetch calibrate"
        elif self.prefetch == OFF:
            problem = "prefetch on or auto: it executes what was predicted"
        elif self.predictor not in (AUTO, "hybrid"):
            problem = f"predictor auto or hybrid, not {self.predictor}: the artifact's layers were allowed with these"
        else:
            return
        raise ConfigError(_message(f"execution speculative needs {problem}"))


def config_from_additional(additional: Any) -> ExpertPrefetchConfig | None:
    """The plugin's configuration inside vLLM's `additional_config`, or None when the plugin was not asked for.

    `{"expert_prefetch": {...}}` asks for it, `{}` or `true` meaning everything automatic; `false` does not.
    Raises ConfigError for anything else, and for a key that was meant to be this one.
    """
    if not isinstance(additional, Mapping):
        return None
    for key in additional:
        if key != CONFIG_KEY and re.sub(r"[\W_]", "", str(key).lower()) == CONFIG_KEY.replace("_", ""):
            raise ConfigError(f"{key} is no key of additional_config that any plugin knows; write {CONFIG_KEY}")
    if CONFIG_KEY not in additional:
        return None
    values = additional[CONFIG_KEY]
    if values is False:
        return None
    if values is True:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(_message(f"expected an object of settings (or true / false), got {values!r}"))
    return ExpertPrefetchConfig.from_mapping(values)


_parsed: dict[int, ExpertPrefetchConfig | None] = {}
"""By the id of vLLM's configuration object, while it lives. No attribute of it: vLLM copies these objects by theirs."""


def config_of(vllm_config: Any, model_config: Any = None) -> ExpertPrefetchConfig | None:
    """The plugin's configuration in vLLM's, parsed once; None when the plugin was not asked for.

    `model_config`: of the model in question, where it may be another one than the configuration's. vLLM hands the
    settings of a model on to its drafts (draft models, EAGLE and Medusa heads), which are not for the plugin: None.
    Raises ConfigError as `config_from_additional` does.
    """
    if _is_draft(vllm_config, model_config):
        return None
    key = id(vllm_config)
    if key not in _parsed:
        _parsed[key] = config_from_additional(vllm_config.additional_config)
        weakref.finalize(vllm_config, _parsed.pop, key, None)
    return _parsed[key]


def draft_model_of(vllm_config: Any) -> Any:
    """vLLM's configuration of the model that drafts, where it has weights of its own; else None."""
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    return None if draft is None or draft is speculative.target_model_config else draft


def config_of_draft(vllm_config: Any, model_config: Any) -> ExpertPrefetchConfig | None:
    """How a draft is served; None where the plugin was not asked for, and for a model that is no draft.

    What is said of the target's cache holds for the draft's as far as it concerns memory, the link and proofs: nothing
    is predicted, recorded or counted.
    """
    config = config_from_additional(vllm_config.additional_config) if _is_draft(vllm_config, model_config) else None
    if config is None:
        return None
    kept = ("policy", "pin_memory", "numa_node", "huge_pages", "self_check", "draft_experts")
    link = ("emulated_link_gbps", "emulated_link_latency_us")
    share = None if config.draft_experts == RESIDENT else float(config.draft_experts)
    return ExpertPrefetchConfig(
        cache_fraction=share, prefetch=OFF, **{name: getattr(config, name) for name in (*kept, *link)}
    )


def _is_draft(vllm_config: Any, model_config: Any) -> bool:
    draft = draft_model_of(vllm_config)
    return draft is not None and (model_config or vllm_config.model_config) is draft


def _message(text: str) -> str:
    return f"{CONFIG_KEY}: {text}"
