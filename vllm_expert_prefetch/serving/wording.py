"""How a worker says what it does."""

import re

from vllm_expert_prefetch.planning.sizing import GB


def describe_progress(num_done: int, num_layers: int, num_bytes: int, seconds: float) -> str:
    """How far a load is after `seconds`, how fast, and how long it will take still."""
    left = seconds / num_done * (num_layers - num_done)
    return (
        f"{num_done} of {num_layers} MoE layers are in host memory, {num_bytes / GB:.4g} GB at "
        f"{num_bytes / GB / seconds:.2g} GB/s, about {left:.0f} s to go"
    )


def span(values: list[int]) -> str:
    """The only one of sorted `values`, or the first and the last."""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def short_name(layer_name: str, index: int) -> str:
    """The number in a layer's name: model.layers.7.mlp.experts is 7."""
    found = re.search(r"\.(\d+)\.", layer_name)
    return found[1] if found else str(index)
