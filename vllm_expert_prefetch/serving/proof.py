"""The proof at start: a layer's kernel gives the same bits whichever rows its experts are in, on this very machine.

All experts are laid into the row space of a layer in their own order, as plain vLLM has them, and then in another one;
for both the kernel computes the same tokens. An expert tensor that was not found, a kernel whose rows depend on each
other, or blocks in another order show as other bits. Nothing has been served yet, so whatever a row holds is replaced.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

NUM_TOKENS = (1, 32)
NUM_TOKENS_ON_GPU = (1, 32, 512)
"""Of the steps that are compared: kernels take other tiles, and divide their work in other ways, for other sizes."""


def prove_kernels(layers: "Sequence[CachedRoutedExperts]") -> set[str]:
    """Prove one layer of each kind: same kernel, same shapes. Returns the kernels' names.

    Raises TakeoverError, naming the layer and its kernel. `layers`: those with a cache.
    """
    kinds = {_kind(layer): layer for layer in reversed(layers)}
    for layer in kinds.values():
        _prove(layer)
    return {kernel_name(layer) for layer in layers}


def kernel_name(layer: "CachedRoutedExperts") -> str:
    """vLLM's name of the class that computes the experts of a layer."""
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    return type(layer.quant_method if kernel is None else kernel.fused_experts).__name__


def _kind(layer: "CachedRoutedExperts") -> tuple[object, ...]:
    assert layer.cache is not None
    shapes = [(name, view.shape, view.dtype) for name, view in layer.cache.store.views.items()]
    return kernel_name(layer), type(layer.quant_method), layer.top_k, layer.activation, *shapes


def _prove(layer: "CachedRoutedExperts") -> None:
    generator = torch.Generator().manual_seed(0)
    num_experts, device = layer.local_num_experts, layer.accelerator
    own_order, other_order = torch.arange(num_experts), torch.randperm(num_experts, generator=generator)
    steps = []
    for num_tokens in NUM_TOKENS if device.type == "cpu" else NUM_TOKENS_ON_GPU:
        x = torch.randn((num_tokens, layer.hidden_size), generator=generator)
        scores = torch.rand((num_tokens, num_experts), generator=generator).topk(layer.top_k)
        weights = (scores.values / scores.values.sum(-1, keepdim=True)).float()
        steps.append((x.to(layer.moe_config.in_dtype).to(device), weights.to(device), scores.indices))
    outputs = []
    for row_of in (own_order, other_order):
        _lay(layer, row_of.tolist())
        # Kernels may write over their input.
        outputs.append([layer.compute_in_rows(x.clone(), weights, ids, row_of[ids]) for x, weights, ids in steps])
    for (x, _, _), expected, found in zip(steps, *outputs, strict=True):
        if not torch.equal(expected, found):
            differing = (expected != found).float().mean().item()
            raise TakeoverError(
                f"{CONFIG_KEY}: {layer.layer_name} with {kernel_name(layer)} ({type(layer.quant_method).__name__}) "
                f"does not give the same bits when its experts are in other rows: {100 * differing:.2g} % of the "
                f"values of {len(x)} tokens differ. Choose another --moe-backend, or serve without the plugin; please "
                "report it"
            )


def _lay(layer: "CachedRoutedExperts", row_of: list[int]) -> None:
    """Every expert into the row that `row_of` names, all of them the layer's own or shared."""
    assert layer.cache is not None
    for name, view in layer.cache.store.views.items():
        rows = layer.cache.tensors[name]
        for expert, row in enumerate(row_of):
            rows[row].copy_(view[expert], non_blocking=True)
