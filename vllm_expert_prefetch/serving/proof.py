"""The proof at start: a layer's kernel gives the same bits whichever rows its experts are in, on this very machine.

All experts are laid into the row space of a layer in their own order, as plain vLLM has them, and then in another one;
for both the kernel computes the same tokens. An expert tensor that was not found, a kernel whose rows depend on each
other, or blocks in another order show as other bits. Nothing has been served yet, so whatever a row holds is replaced.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.serving.compat import kernel_name
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

NUM_TOKENS = (1, 32)
NUM_TOKENS_ON_GPU = (1, 32, 512)
"""Of the steps that are compared: kernels take other tiles, and divide their work in other ways, for other sizes."""


def prove_kernels(layers: "Sequence[CachedRoutedExperts]") -> None:
    """Prove one layer of each kind: same kernel, same shapes. `layers`: those with a cache.

    Raises TakeoverError, naming the layer and its kernel.
    """
    kinds = {_kind(layer): layer for layer in reversed(layers)}
    for layer in kinds.values():
        _prove(layer)


def _kind(layer: "CachedRoutedExperts") -> tuple[object, ...]:
    assert layer.cache is not None
    shapes = [(name, view.shape, view.dtype) for name, view in layer.cache.store.views.items()]
    return kernel_name(layer.quant_method), type(layer.quant_method), layer.top_k, layer.activation, *shapes


@torch.no_grad()
def _prove(layer: "CachedRoutedExperts") -> None:
    generator = torch.Generator().manual_seed(0)
    num_experts, device = layer.local_num_experts, layer.accelerator
    dtype = layer.quant_method.topk_indices_dtype or torch.int32
    own_order, other_order = torch.arange(num_experts), torch.randperm(num_experts, generator=generator)
    steps = []
    for num_tokens in NUM_TOKENS if device.type == "cpu" else NUM_TOKENS_ON_GPU:
        x = torch.randn((num_tokens, layer.hidden_size), generator=generator)
        scores = torch.rand((num_tokens, num_experts), generator=generator).topk(layer.top_k)
        weights = scores.values / scores.values.sum(-1, keepdim=True)
        steps.append((x.to(device, layer.moe_config.in_dtype), weights.to(device), scores.indices))
    outputs = []
    for row_of in (own_order, other_order):
        _lay(layer, row_of.tolist())
        for x, weights, ids in steps:
            rows = row_of[ids].to(device, dtype)
            # Kernels may write over their input, and give memory that the next call takes again.
            outputs.append(layer.compute(x.clone(), weights, ids.to(device, dtype), rows).clone())
    for expected, found in zip(outputs[: len(steps)], outputs[len(steps) :], strict=True):
        differ = expected.view(torch.uint8) != found.view(torch.uint8)  # bits: not a number is as good as any
        if differ.any():
            raise TakeoverError(
                f"{CONFIG_KEY}: {layer.layer_name} with {kernel_name(layer.quant_method)} "
                f"({type(layer.quant_method).__name__}) does not give the same bits when its experts are in other "
                f"rows: {100 * differ.float().mean().item():.2g} % of the bytes of {len(found)} tokens differ. Choose "
                "another --moe-backend, or serve without the plugin; please report it"
            )


def _lay(layer: "CachedRoutedExperts", row_of: list[int]) -> None:
    """Every expert into the row that `row_of` names, all of them the layer's own or shared."""
    assert layer.cache is not None
    for name, view in layer.cache.store.views.items():
        rows = layer.cache.tensors[name]
        for expert, row in enumerate(row_of):
            rows[row].copy_(view[expert], non_blocking=True)
