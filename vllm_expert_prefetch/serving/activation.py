"""Turning the plugin on: the `--plugin` flag, the check of the configuration, and the layer class.

vLLM loads plugins before any configuration exists, so everything here is installed always and acts only when
`additional_config` holds the key `expert_prefetch`.
"""

import argparse
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from vllm_expert_prefetch.config import CONFIG_KEY, RESIDENT, config_of
from vllm_expert_prefetch.metrics.runtime_dir import carry_to_ray_workers, ensure_runtime_dir
from vllm_expert_prefetch.serving import compat, drafts
from vllm_expert_prefetch.serving.backends import choose_backend
from vllm_expert_prefetch.serving.early import check_settings
from vllm_expert_prefetch.serving.refusals import check_libraries, check_refusals
from vllm_expert_prefetch.serving.termination import make_server_interruptible

PLUGIN_GROUP = "vllm.general_plugins"
_VALUES = "_additional_config_values"
"""Namespace attribute: every value that --plugin and --additional-config gave, in order."""


def install() -> None:
    """Install everything, once per process."""
    _replace_layers()
    _extend_platform(compat.platform_class())
    _extend_model_loader()
    _extend_worker()
    _extend_scheduler()


def _replace_layers() -> None:
    """Register a replacement for vLLM's class and for every subclass, those that a model defines later included."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_expert_prefetch.serving.layer import can_replace, replacement_of

    def replace(vllm_class: type[RoutedExperts]) -> None:
        if not can_replace(vllm_class):
            return
        if vllm_class.__name__ in op_registry_oot:  # vLLM knows classes by name alone: leave both of them alone
            del op_registry_oot[vllm_class.__name__]
            return
        vllm_class.register_oot(replacement_of(vllm_class))

    known: list[type[RoutedExperts]] = [RoutedExperts, *RoutedExperts.__subclasses__()]
    for vllm_class in known:
        replace(vllm_class)
    RoutedExperts.__init_subclass__ = classmethod(replace)


def check_config(vllm_config: Any) -> None:
    """Refuse what cannot be served, in the process that reads the flags and before anything is loaded."""
    config = config_of(vllm_config)
    if config is None or vllm_config.model_config is None or drafts.is_for_a_draft(vllm_config):
        return
    compat.check_version(compat.vllm_version(), compat.on_cpu_platform())
    check_refusals(vllm_config, config)
    check_settings(vllm_config, config)
    check_libraries(compat.on_cuda_platform())
    chosen = choose_backend(vllm_config, config.draft_experts == RESIDENT)
    if chosen is not None:
        compat.logger().info("expert_prefetch: --moe-backend %s, which reads experts row by row", chosen)
    _show_metrics()
    make_server_interruptible(getattr(vllm_config, "shutdown_timeout", 0))


def _extend_platform(platform: Any) -> None:
    """vLLM lets its platform add command line flags and check each configuration; so does the plugin, by wrapping."""
    add_flags, check = platform.pre_register_and_update, platform.check_and_update_config

    def add_flags_and_ours(cls: Any, parser: argparse.ArgumentParser | None = None) -> None:
        add_flags(parser)
        if parser is not None:
            add_plugin_flag(parser)

    def check_ours_first(cls: Any, vllm_config: Any) -> None:
        check_config(vllm_config)
        check(vllm_config)

    platform.pre_register_and_update = classmethod(add_flags_and_ours)
    platform.check_and_update_config = classmethod(check_ours_first)


def _extend_model_loader() -> None:
    """After a model is loaded, prove that every MoE layer was taken over, and start serving it."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_expert_prefetch.serving.draft_worker import worker_of_draft

    load = BaseModelLoader.load_model

    def load_and_verify(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        if config_of(vllm_config, model_config) is not None:
            with drafts.building(False):
                model = load(self, vllm_config, model_config, *args, **kwargs)
            start_serving(model, vllm_config)
            return model
        worker = worker_of_draft(vllm_config, model_config)
        with drafts.building(True, worker), drafts.naming_the_remedy(vllm_config, model_config):
            model = load(self, vllm_config, model_config, *args, **kwargs)
        if worker is not None:
            worker.start(model)
        return model

    BaseModelLoader.load_model = load_and_verify


def start_serving(model: Any, vllm_config: Any) -> None:
    """Prove that every MoE layer of a loaded `model` was taken over, and start. A stage of a pipeline may have none.

    Raises TakeoverError or ConfigError where it cannot be served.
    """
    from vllm_expert_prefetch.serving.takeover import verify_taken_over

    layers = compat.moe_layers_of(model)
    has_stages = vllm_config.parallel_config.pipeline_parallel_size > 1
    num_layers = compat.sum_of_stages(len(layers)) if has_stages else len(layers)
    if num_layers and not layers:
        compat.logger().info("expert_prefetch: no MoE layer in this stage of the pipeline: nothing to cache here")
        return
    verify_taken_over(layers)
    layers[0].worker.num_layers = num_layers
    layers[0].worker.start(model)


def _extend_worker() -> None:
    from vllm_expert_prefetch.serving.steps import extend_worker

    extend_worker()


def _extend_scheduler() -> None:
    from vllm_expert_prefetch.serving.scheduling import extend_scheduler

    extend_scheduler()


def _show_metrics() -> None:
    """On /metrics with one API server, and with several, where prometheus-client works in its multiprocess mode."""
    from prometheus_client import REGISTRY

    from vllm_expert_prefetch.metrics.collector import extend_multiprocess_collector, register_collector

    directory = ensure_runtime_dir()
    carry_to_ray_workers()
    register_collector(REGISTRY, directory)
    extend_multiprocess_collector(directory)


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--plugin NAME` to vLLM's parser. It writes into `additional_config`, the field that reaches the workers."""
    actions = parser._option_string_actions
    if "--plugin" in actions or "--additional-config" not in actions:
        return
    parser.add_argument(
        "--plugin",
        action=_PluginAction,
        metavar="NAME",
        default=None,
        help="Turn on an installed vLLM plugin by its name: expert_prefetch serves Mixture-of-Experts models from a "
        "cache of expert slots, the experts staying in host memory. Settings: --additional-config.expert_prefetch.KEY.",
    )
    parser.set_defaults(**{_VALUES: None})
    config_action = actions["--additional-config"]
    config_action.__class__ = _merging(type(config_action))


class _PluginAction(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if values != CONFIG_KEY:
            installed = ", ".join(sorted(entry.name for entry in entry_points(group=PLUGIN_GROUP)))
            parser.error(
                f"argument --plugin: unknown plugin {values!r}; --plugin turns on: {CONFIG_KEY}. "
                f"Installed vLLM plugins (the others load by themselves): {installed}"
            )
        setattr(namespace, self.dest, values)
        _note(parser, namespace, {CONFIG_KEY: {}})


def _merging(store_action: type) -> type:
    """vLLM's action for --additional-config, except that values merge once --plugin was given, in any order."""

    class MergingAction(store_action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            super().__call__(parser, namespace, values, option_string)
            _note(parser, namespace, namespace.additional_config)

    return MergingAction


def _note(parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any) -> None:
    values = [*(getattr(namespace, _VALUES, None) or []), value]
    setattr(namespace, _VALUES, values)
    if getattr(namespace, "plugin", None) == CONFIG_KEY:
        merged: dict[str, Any] = {}
        for value in values:
            merged = deep_merge(merged, value)
        if merged[CONFIG_KEY] is False:
            parser.error(f"--plugin {CONFIG_KEY} turns the plugin on, and additional_config off: drop one of them")
        namespace.additional_config = merged


def deep_merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping with the keys of both; where both have a mapping they merge, elsewhere `high` wins."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged
