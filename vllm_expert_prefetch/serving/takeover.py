"""Taking the expert tensors of a layer out of vLLM's hands, and proving that nothing kept them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY

_EXPERT_PREFIXES = ("w13_", "w2_")
_NOT_PER_EXPERT = {"e_score_correction_bias", "hash_indices_table"}
"""Parameters with one row per expert that belong to the router."""


CANNOT_RELOAD = f"{CONFIG_KEY}: weights cannot be reloaded; restart the server instead"


class TakeoverError(RuntimeError):
    """A layer cannot be served from a cache. Start-up fails; nothing has been served."""


def expert_parameters(layer: torch.nn.Module, num_experts: int) -> dict[str, torch.nn.Parameter]:
    """The parameters of `layer` that hold one row per expert, by name.

    Raises TakeoverError for a parameter that looks like one and is not understood, or is not contiguous.
    """
    found = {}
    for name, parameter in layer.named_parameters(recurse=False):
        if name in _NOT_PER_EXPERT or parameter.dim() == 0 or parameter.shape[0] != num_experts:
            continue
        if not name.startswith(_EXPERT_PREFIXES) or not parameter.is_contiguous():
            raise TakeoverError(
                f"{CONFIG_KEY}: parameter {name} {tuple(parameter.shape)} with strides {parameter.stride()} has a row "
                "per expert and a layout that is not understood. Please report the model"
            )
        found[name] = parameter
    if not found:
        raise TakeoverError(f"{CONFIG_KEY}: the layer has no expert weights")
    return found


def replace_rows(layer: torch.nn.Module, rows: Mapping[str, torch.Tensor]) -> None:
    """Put the row space's tensors behind the layer's expert parameters, once and for all.

    Kernels and quantisation configs keep the very Parameter objects, hence `.data`. Raises TakeoverError when an old
    tensor can still be reached from the layer.
    """
    old_storages = {}
    for name, tensor in rows.items():
        parameter = getattr(layer, name)
        old_storages[parameter.untyped_storage().data_ptr()] = parameter.data  # kept until the check is done
        parameter.data = tensor
    keep_in_place(layer, rows)
    for path, tensor in reachable_tensors(layer):
        if tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() in old_storages:
            raise TakeoverError(
                f"{CONFIG_KEY}: {path} {tuple(tensor.shape)} still holds the full expert tensor after the swap; its "
                "kernel would compute with the wrong experts. Please report the model and --moe-backend"
            )


def keep_in_place(layer: torch.nn.Module, names: Iterable[str]) -> None:
    """Make buffers of the parameters `names`: vLLM's loader moves every parameter that it saw on the host back."""
    for name in list(names):
        layer.register_buffer(name, layer._parameters.pop(name), persistent=False)


def verify_taken_over(moe_layers: Sequence[torch.nn.Module]) -> None:
    """Raise TakeoverError, naming the layers, unless every one of a loaded model's MoE layers was taken over."""
    missed = [str(layer.layer_name) for layer in moe_layers if not getattr(layer, "is_taken_over", False)]
    if missed or not moe_layers:
        which = ", ".join(missed) or "none of the model's layers uses vLLM's RoutedExperts"
        raise TakeoverError(
            f"{CONFIG_KEY}: not every MoE layer was taken over ({which}); serving would keep these experts on the "
            "accelerator. Serve this model without the plugin, and please report it"
        )


def reachable_tensors(root: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor reachable from `root` through attributes, containers and objects of vLLM, with its path."""
    pending: list[tuple[str, Any]] = [(type(root).__name__, root)]
    seen: set[int] = set()
    while pending:
        path, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided:
                yield path, value
        elif isinstance(value, dict):
            pending += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            pending += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        elif value is root or type(value).__module__.split(".")[0] in ("vllm", "vllm_expert_prefetch", "torch"):
            pending += [(f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]
