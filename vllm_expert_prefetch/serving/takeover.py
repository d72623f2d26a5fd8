"""Taking the expert tensors of a layer out of vLLM's hands, and proving that nothing kept them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.serving.expert_tensors import (
    ExpertTensor,
    TakeoverError,
    check_weights_are_among,
    find_expert_tensors,
    leave_where_it_is,
    reachable_tensors,
)

CANNOT_RELOAD = f"{CONFIG_KEY}: weights cannot be reloaded; restart the server instead"
_OBJECTS = ("vllm", "vllm_expert_prefetch", "torch")


def replace_rows(
    layer: Any, tensors: Mapping[str, ExpertTensor], rows: Mapping[str, torch.Tensor], apart_from: Sequence[Any] = ()
) -> None:
    """Put the row space's `rows` behind the layer's expert `tensors`, by name, once and for all.

    Raises TakeoverError when an old tensor can still be reached from the layer, other than through `apart_from`: who
    may hold them, and what was looked through.
    """
    old = [tensors[name].rows for name in rows]  # kept until the check is done: their addresses are not used anew
    old_storages = {tensor.untyped_storage().data_ptr() for tensor in old}
    for name, tensor in rows.items():
        tensors[name].replace(tensor)
    leave_where_it_is(layer)
    name = type(layer).__name__
    for path, tensor in reachable_tensors(
        layer, name, lambda module: module.split(".")[0] in _OBJECTS, {id(value) for value in apart_from}
    ):
        if tensor.untyped_storage().data_ptr() in old_storages:
            raise TakeoverError(
                f"{CONFIG_KEY}: {path} {tuple(tensor.shape)} still holds the full expert tensor after the swap; its "
                "kernel would compute with the wrong experts. Please report the model and --moe-backend"
            )


def verify_rows(layer: Any, tensors: Mapping[str, ExpertTensor], num_experts: int) -> None:
    """Raise TakeoverError when something has replaced the row space behind a layer's tensors since the takeover.

    `tensors`: those of the takeover. What the layer and its kernel hold now is found anew.
    """
    check_weights_are_among(layer, tensors)
    row_space = {tensor.rows.untyped_storage().data_ptr() for tensor in tensors.values()}
    for name, tensor in [*tensors.items(), *find_expert_tensors(layer, num_experts).items()]:
        for holder in tensor.holders:
            if holder.untyped_storage().data_ptr() not in row_space or len(holder) != num_experts:
                raise TakeoverError(
                    f"{CONFIG_KEY}: {layer.layer_name}.{name} {tuple(holder.shape)} is not the row space of "
                    f"{num_experts} experts that took its place"
                )


def verify_taken_over(moe_layers: Sequence[torch.nn.Module]) -> None:
    """Raise TakeoverError, naming the layers, unless every one of a loaded model's MoE layers was taken over."""
    missed = [str(layer.layer_name) for layer in moe_layers if not getattr(layer, "is_taken_over", False)]
    if missed or not moe_layers:
        which = ", ".join(missed) or "none of the model's layers uses vLLM's RoutedExperts"
        raise TakeoverError(
            f"{CONFIG_KEY}: not every MoE layer was taken over ({which}); serving would keep these experts on the "
            "accelerator. Serve this model without the plugin, and please report it"
        )
