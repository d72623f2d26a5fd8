"""The MoE computation of the synthetic decode loop: vLLM's fused kernel, else a small Triton one, else torch."""

from collections.abc import Callable

import torch

MoeKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (T, H), w13 (E, 2I, H), w2 (E, H, I), weights (T, K) float32, row ids (T, K) int32) -> (T, H)."""


def find_kernel() -> tuple[str, MoeKernel]:
    """The best kernel that is here, and its name."""
    try:
        return "vLLM fused_experts", _vllm_kernel()
    except ImportError:
        pass
    try:
        return "Triton, one program per pair and 32 rows", _triton_kernel()
    except ImportError:
        return "torch, weights gathered then multiplied", torch_kernel


def _vllm_kernel() -> MoeKernel:
    from vllm.model_executor.layers.fused_moe import fused_experts

    def kernel(
        x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, row_ids: torch.Tensor
    ) -> torch.Tensor:
        return fused_experts(x, w13, w2, weights, row_ids)

    return kernel


def torch_kernel(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, row_ids: torch.Tensor
) -> torch.Tensor:
    """Reads the weights twice: a bound from above, nothing to compare with."""
    chosen = row_ids.flatten().long()
    rows = x.repeat_interleave(row_ids.shape[1], 0)
    gate, up = torch.bmm(w13[chosen], rows.unsqueeze(2)).squeeze(2).chunk(2, dim=1)
    down = torch.bmm(w2[chosen], (torch.nn.functional.silu(gate) * up).unsqueeze(2)).squeeze(2)
    pairs = down.view(*row_ids.shape, -1) * weights.unsqueeze(2).to(down.dtype)
    return pairs.sum(1)


def _triton_kernel() -> MoeKernel:
    import triton
    from triton_moe import rows_times_vector

    def kernel(
        x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, row_ids: torch.Tensor
    ) -> torch.Tensor:
        top_k = row_ids.shape[1]
        pairs = row_ids.flatten()
        both = torch.empty(len(pairs), w13.shape[1], dtype=x.dtype, device=x.device)
        down = torch.empty(len(pairs), w2.shape[1], dtype=x.dtype, device=x.device)
        for weight, source, target, per_row in ((w13, x, both, top_k), (w2, None, down, 1)):
            if source is None:
                gate, up = both.chunk(2, dim=1)
                source = torch.nn.functional.silu(gate) * up
            grid = (len(pairs), triton.cdiv(weight.shape[1], 32))
            rows_times_vector[grid](source, weight, pairs, target, *weight.shape[1:], per_row, ROWS=32, WIDTH=256)
        return (down.view(*row_ids.shape, -1) * weights.unsqueeze(2).to(x.dtype)).sum(1)

    return kernel
