"""LoRA adapters: served on every layer of vLLM's but the routed experts, whose rows are no experts."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError


def choose_kernel_as_without_adapters(arguments: Any) -> None:
    """Have vLLM choose a layer's kernel as if there were no adapters: none of them reaches its experts.

    It would take the Triton kernel whatever the platform. `arguments`: of the constructor of vLLM's RoutedExperts.
    """
    compat.moe_config_among(arguments).is_lora_enabled = False


def watch_adapters(runner: Any) -> None:
    """Keep vLLM from wrapping the cached MoE layers of `runner`'s model, and from loading adapters made for them."""
    load_model = runner.load_lora_model

    def load_and_leave_experts(model: Any, *args: Any, **kwargs: Any) -> Any:
        runners = compat.moe_runners_of(model)
        with _without(runners):
            model = load_model(model, *args, **kwargs)
        wrapped = [name for name, own in runners.items() if model.get_submodule(name) is not own]
        if wrapped:
            raise TakeoverError(f"{CONFIG_KEY}: vLLM has wrapped {wrapped[0]} for LoRA: drop --enable-lora")
        _refuse_for(runners, runner.lora_manager)
        return model

    runner.load_lora_model = load_and_leave_experts


@contextlib.contextmanager
def _without(runners: dict[str, Any]) -> Iterator[None]:
    """Meanwhile vLLM does not find that `runners` support LoRA."""
    from vllm.lora import model_manager

    find, hidden = model_manager.get_supported_lora_modules, {name.rpartition(".")[2] for name in runners}
    model_manager.get_supported_lora_modules = lambda model: [name for name in find(model) if name not in hidden]
    try:
        yield
    finally:
        model_manager.get_supported_lora_modules = find


def _refuse_for(runners: dict[str, Any], manager: Any) -> None:
    """Let `manager`, of vLLM, refuse by its name an adapter with weights for any of `runners`, by module name."""
    load, names = manager._load_adapter, {name.rpartition(".")[2] for name in runners}
    manager._adapter_manager.supported_lora_modules += names  # so that it reads them

    def load_and_look(request: Any) -> Any:
        adapter = load(request)
        found = sorted(name for name in adapter.loras if any(f"{name}.".startswith(f"{own}.") for own in runners))
        if found:
            raise ValueError(
                f"{CONFIG_KEY}: the LoRA adapter {request.lora_name!r} ({request.lora_path}) changes routed experts "
                f"({found[0]}, {len(found)} modules in all), which the plugin does not serve: use one of attention and "
                "dense layers, merge this one into the checkpoint, or serve without the plugin"
            )
        return adapter

    manager._load_adapter = load_and_look
