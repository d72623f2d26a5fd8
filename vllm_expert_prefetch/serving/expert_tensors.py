"""What an expert is made of: every tensor that has a row per expert and that the layer's kernel reads.

These tensors are found when vLLM has post-processed a layer, not listed per quantisation method: they are the layer's
own (`w13_*`, `w2_*`) and those that its quantisation config holds (scales, zero points, biases, global scales). What is
found and not understood is an error: a tensor left behind would give other experts' values, with nothing to see.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY

_PREFIXES = ("w13_", "w2_")
_QUANT_CONFIG = "quant_config"
"""In the path of what it holds, be it reached as the method's `moe_quant_config` or as the kernel's `quant_config`."""
_OF_THE_ROUTER = {"e_score_correction_bias", "hash_indices_table"}
_SHORT_ROW_BYTES = 16
"""Rows up to this length that are equal for all experts stay where they are: shapes, strides, a common scale."""
_KERNELS = (
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.quantization",
    "vllm.model_executor.kernels",
    "triton_kernels",
    "humming",
    "flashinfer",
)
"""Modules of the objects that hold what a kernel reads."""


class TakeoverError(RuntimeError):
    """A layer cannot be served from a cache. Start-up fails; nothing has been served."""


@dataclass
class ExpertTensor:
    """One piece of memory with a row per expert."""

    rows: torch.Tensor
    """(E, *row), contiguous."""
    holders: list[torch.Tensor] = field(default_factory=list)
    """Every tensor object over this memory that the layer, its kernel or its quantisation config holds."""

    def replace(self, rows: torch.Tensor) -> None:
        """Put `rows`, of the shape and dtype of `self.rows`, behind all holders: kernels keep the objects."""
        as_bytes, start = rows.view(torch.uint8).view(-1), _first_byte(self.rows)
        for holder in self.holders:
            tail = as_bytes[_first_byte(holder) - start :]
            typed = tail[: tail.numel() // holder.element_size() * holder.element_size()].view(holder.dtype)
            holder.data = typed.as_strided(holder.shape, holder.stride(), typed.storage_offset())
        self.rows = rows


def find_expert_tensors(layer: Any, num_experts: int) -> dict[str, ExpertTensor]:
    """By the name of the first holder. `num_experts`: E, the rows that each has.

    Raises TakeoverError, with its name, for a tensor that has a row per expert and is not understood.
    """
    found: dict[int, ExpertTensor] = {}
    names: dict[str, ExpertTensor] = {}
    for path, tensor in tensors_of_kernel(layer):
        name = path.rsplit(".", 1)[-1]
        if tensor.dim() == 0 or len(tensor) != num_experts or tensor.numel() == 0 or name in _OF_THE_ROUTER:
            continue
        storage = tensor.untyped_storage().data_ptr()
        known = found.get(storage)
        if known is None:
            if _is_short_and_uniform(tensor):
                continue
            if not (name.startswith(_PREFIXES) or _QUANT_CONFIG in path):
                raise _not_understood(path, tensor, "a name that is not known")
            known = found[storage] = names[path] = ExpertTensor(_whole_rows(path, tensor))
        if tensor.stride(0) * tensor.element_size() != known.rows[0].nbytes:
            raise _not_understood(path, tensor, "a view of its memory with rows of another length")
        known.holders.append(tensor)
    if not names:
        raise TakeoverError(f"{CONFIG_KEY}: the layer has no expert weights")
    return names


def unprocessed_row_bytes(layer: torch.nn.Module, num_experts: int) -> tuple[int, ...]:
    """Bytes of a row of each parameter with a row per expert, as they are before vLLM's post-processing."""
    return tuple(
        parameter.nbytes // num_experts
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.dim() > 0 and len(parameter) == num_experts and name not in _OF_THE_ROUTER
    )


def check_weights_are_among(layer: Any, tensors: Mapping[str, ExpertTensor]) -> None:
    """Raise TakeoverError unless the two weights that vLLM hands to a layer's kernel are among its `tensors`."""
    held = {id(holder) for tensor in tensors.values() for holder in tensor.holders}
    for name in ("w13_weight", "w2_weight"):
        weight = getattr(layer, name, None)
        if id(weight) not in held:
            raise TakeoverError(
                f"{CONFIG_KEY}: {name} of {layer.layer_name} is a {type(weight).__name__} without a row per expert "
                f"that the cache could replace ({type(layer.quant_method).__name__}): choose another --moe-backend"
            )


def leave_where_it_is(layer: torch.nn.Module) -> None:
    """Make buffers of a layer's parameters: vLLM's loader moves every parameter that it saw on the host back there.

    Those of its router, which it only holds, stay.
    """
    for name in [name for name in layer._parameters if name not in _OF_THE_ROUTER]:
        layer.register_buffer(name, layer._parameters.pop(name), persistent=False)


def tensors_of_kernel(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What the kernel of `layer` may read, with its path: the layer's own tensors, then those of its quant method."""
    own = {**layer._parameters, **layer._buffers, **vars(layer)}
    seen = {id(layer)}
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield name, value
    yield from reachable_tensors(layer.quant_method, "quant_method", lambda module: module.startswith(_KERNELS), seen)


def reachable_tensors(
    root: Any, name: str, follow: Callable[[str], bool], seen: set[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor reachable from `root` through attributes and containers, with its path, which starts with `name`.

    `follow`: whether to look into objects of classes that this module defines; `seen`: ids of what is left out.
    """
    pending: list[tuple[str, Any]] = [(name, root)]
    seen = set() if seen is None else seen
    while pending:
        path, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout == torch.strided and value.device.type != "meta":
                yield path, value
        elif isinstance(value, dict):
            pending += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            pending += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        elif value is root or follow(type(value).__module__):
            pending += [(f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items()]


def _whole_rows(path: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or where it is a view into memory with a row per expert, that memory."""
    if tensor.is_contiguous():
        return tensor.data
    length, available = tensor.stride(0), tensor.untyped_storage().nbytes() // tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    start = tensor.storage_offset() // length * length if length else 0
    if tensor.storage_offset() - start + last >= length or start + length * len(tensor) > available:
        raise _not_understood(path, tensor, "rows that are not apart")
    return tensor.data.as_strided((len(tensor), length), (length, 1), start)


def _is_short_and_uniform(tensor: torch.Tensor) -> bool:
    if tensor[0].nbytes > _SHORT_ROW_BYTES:
        return False
    rows = tensor.data.contiguous().view(len(tensor), -1).view(torch.uint8)
    return bool((rows == rows[:1]).all())


def _first_byte(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _not_understood(path: str, tensor: torch.Tensor, what: str) -> TakeoverError:
    return TakeoverError(
        f"{CONFIG_KEY}: {path} {tuple(tensor.shape)} with strides {tensor.stride()} has a row per expert and {what}. "
        "Choose another --moe-backend, and please report the model"
    )
