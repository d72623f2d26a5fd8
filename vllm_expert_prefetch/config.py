"""The configuration: one frozen dataclass, validated in one place.

It is what stands under the key `expert_prefetch` of vLLM's `additional_config`. Unknown keys are errors.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args

from vllm_expert_prefetch.residency import POLICIES

CONFIG_KEY = "expert_prefetch"
AUTO = "auto"
OFF = "off"
EXACT, SPECULATIVE = "exact", "speculative"

DEFAULT_CPU_FRACTION = 0.5

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


@dataclass(frozen=True)
class ExpertPrefetchConfig:
    """Every setting of the plugin; `docs/configuration.md` shows the same table.

    Raises ConfigError on construction when a value is out of range or two settings exclude each other.
    """

    cache_gb: float | None = _key(
        None,
        "Size of the expert cache on each accelerator, in GB (10^9 bytes), all MoE layers together. "
        "Excludes `cache_fraction` and `slots_per_layer`.",
    )
    cache_fraction: float | None = _key(
        None, "Share of each layer's experts that get a slot, 0 to 1. Excludes `cache_gb` and `slots_per_layer`."
    )
    slots_per_layer: int | None = _key(
        None, "Expert slots of each MoE layer. Excludes `cache_gb` and `cache_fraction`."
    )
    policy: str = _key("lru", "Eviction policy: " + ", ".join(f"`{name}`" for name in POLICIES) + ".")
    execution: str = _key(
        EXACT,
        "`exact`: the tokens are those of plain vLLM. `speculative`: where every sequence gives one token, the layers "
        "that the artifact allows execute the experts predicted for them in place of the router's: other tokens, fewer "
        "copies. Needs `artifact`; the CPU platform only.",
    )
    prefetch: str = _key(
        AUTO,
        "Copy experts before they are needed: `on`; `off`; `auto`: on, layer by layer where it pays. On the CPU "
        "platform `auto` looks ahead over an emulated link only.",
    )
    predictor: str = _key(
        AUTO,
        "What guesses the next layer's experts: "
        + ", ".join(f"`{name}`" for name in PREDICTORS)
        + "; `auto`: what the artifact found best, without one `router`. All but `router` and `previous` need an "
        "artifact.",
    )
    over_fetch: int = _key(
        1, "Experts to prefetch for each token beyond the model's top-k, where a copy fits the time there is."
    )
    lookahead_layers: int = _key(1, "How many MoE layers ahead to predict.")
    artifact: str | None = _key(None, "Folder that `vllm-expert-prefetch calibrate` has written for this model.")
    pin_memory: str = _key(
        AUTO,
        "Page-lock the host store: `auto` (on a GPU yes, and without it where that fails; on CPU no), `on` (fail at "
        "start-up when the memlock limit is too small), `off`.",
    )
    numa_node: int | None = _key(
        None,
        "NUMA node that holds the host store. Unset: on a GPU the node that it hangs on, on CPU where the worker runs.",
    )
    huge_pages: bool = _key(False, "Ask for transparent huge pages (2 MB) for the host store.")
    emulated_link_gbps: float | None = _key(
        None, "CPU only, for studies: bandwidth of an emulated host-to-accelerator link, in GB/s (10^9 bytes/s)."
    )
    emulated_link_latency_us: float = _key(
        0.0, "CPU only: latency of each copy batch over the emulated link, in microseconds."
    )

    planned_hit_rate: float | None = _key(
        None,
        "Hit rate that the cache was sized for, 0 to 1: shown as a metric, and an alert fires below it. Unset: the "
        "share of experts that have a slot.",
    )
    metrics_per_layer: bool = _key(False, "Also show lookups and stalls of each MoE layer on /metrics.")
    metrics_port: int | None = _key(
        None,
        "Each worker also shows its own numbers on this port plus its rank on the host, on every interface: for "
        "workers on other hosts than the API server. Unset: on vLLM's /metrics only.",
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_cache_size()
        _one_of("policy", self.policy, list(POLICIES))
        _one_of("execution", self.execution, [EXACT, SPECULATIVE])
        _one_of("prefetch", self.prefetch, [AUTO, "on", OFF])
        _one_of("predictor", self.predictor, [AUTO, *PREDICTORS])
        _at_least("over_fetch", self.over_fetch, 0)
        _at_least("lookahead_layers", self.lookahead_layers, 1)
        if self.execution == SPECULATIVE:
            self._check_speculative()
        _one_of("pin_memory", self.pin_memory, [AUTO, "on", OFF])
        if self.numa_node is not None:
            _at_least("numa_node", self.numa_node, 0)
        if self.planned_hit_rate is not None:
            _positive("planned_hit_rate", self.planned_hit_rate)
            _at_most("planned_hit_rate", self.planned_hit_rate, 1)
        if self.metrics_port is not None:
            _at_least("metrics_port", self.metrics_port, 1)
            _at_most("metrics_port", self.metrics_port, 65535)
        if self.emulated_link_gbps is not None:
            _positive("emulated_link_gbps", self.emulated_link_gbps)
        _at_least("emulated_link_latency_us", self.emulated_link_latency_us, 0)
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
                nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    _message(f"unknown key {key!r}; did you mean {nearest!r}? Valid keys: {', '.join(valid)}")
                )
        return cls(**values)

    def _check_types(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            wanted = next(kind for kind in (get_args(entry.type) or (entry.type,)) if kind is not NoneType)
            accepted = (int, float) if wanted is float else wanted
            if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
                kind = _KINDS[wanted]
                raise ConfigError(_message(f"{entry.name} must be {kind}, got {value!r}"))

    def _check_speculative(self) -> None:
        if self.artifact is None:
            problem = "artifact, which says in which layers: make one with vllm-expert-prefetch calibrate"
        elif self.prefetch == OFF:
            problem = "prefetch on or auto: it executes what was predicted"
        elif self.predictor not in (AUTO, "hybrid"):
            problem = f"predictor auto or hybrid, not {self.predictor}: the artifact's layers were allowed with these"
        elif self.lookahead_layers != 1:
            problem = f"lookahead_layers 1, not {self.lookahead_layers}"
        else:
            return
        raise ConfigError(_message(f"execution speculative needs {problem}"))

    def _check_cache_size(self) -> None:
        sizes = ["cache_gb", "cache_fraction", "slots_per_layer"]
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(_message(f"{' and '.join(given)} exclude each other; keep one"))
        for name in given:
            _positive(name, getattr(self, name))
        if self.cache_fraction is not None:
            _at_most("cache_fraction", self.cache_fraction, 1)


_KINDS: dict[Any, str] = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def config_from_additional(additional: Any) -> ExpertPrefetchConfig | None:
    """The plugin's configuration inside vLLM's `additional_config`, or None when the plugin was not asked for.

    `{"expert_prefetch": {...}}` asks for it, `{}` or `true` meaning everything automatic; `false` does not.
    Raises ConfigError for anything else.
    """
    if not isinstance(additional, Mapping) or CONFIG_KEY not in additional:
        return None
    values = additional[CONFIG_KEY]
    if values is False:
        return None
    if values is True:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(_message(f"expected an object of settings (or true / false), got {values!r}"))
    return ExpertPrefetchConfig.from_mapping(values)


_PARSED = "_expert_prefetch_config"
"""Attribute of vLLM's configuration object."""


def config_of(vllm_config: Any) -> ExpertPrefetchConfig | None:
    """The plugin's configuration in vLLM's, parsed once and kept there; None when the plugin was not asked for.

    Raises ConfigError as `config_from_additional` does.
    """
    if not hasattr(vllm_config, _PARSED):
        object.__setattr__(vllm_config, _PARSED, config_from_additional(vllm_config.additional_config))
    config: ExpertPrefetchConfig | None = getattr(vllm_config, _PARSED)
    return config


def _message(text: str) -> str:
    return f"{CONFIG_KEY}: {text}"


def _one_of(key: str, value: str, valid: list[str]) -> None:
    if value not in valid:
        raise ConfigError(_message(f"{key} must be one of {', '.join(valid)}, got {value!r}"))


def _positive(key: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(_message(f"{key} must be a finite number above 0, got {value}"))


def _at_least(key: str, value: float, low: float) -> None:
    if not low <= value < float("inf"):
        raise ConfigError(_message(f"{key} must be a finite number, at least {low}, got {value}"))


def _at_most(key: str, value: float, high: float) -> None:
    if value > high:
        raise ConfigError(_message(f"{key} must be at most {high}, got {value}"))
