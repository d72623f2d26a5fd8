"""Marlin's blocks of tokens in the order in which plain vLLM has them: by expert, not by the row that holds the expert.

Marlin divides the K dimension over its thread blocks by the place of a block of tokens in the launch, so the last bits
of a row depend on what comes before it. Blocks are therefore made of the step's expert ids, and each block's expert is
then replaced by its row. Other kernels' rows do not depend on each other, and take row ids.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_expert_prefetch.serving import compat

_KERNEL = "MarlinExperts"
_step: tuple[torch.Tensor, torch.Tensor] | None = None
"""(T, K) expert ids and row ids of the step that is being computed."""


def depends_on_order(quant_method: Any) -> bool:
    """Whether the kernel of a post-processed layer needs `blocks_by_expert`. Prepares vLLM for it where it does."""
    if compat.kernel_name(quant_method) != _KERNEL:
        return False
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    if not hasattr(marlin_moe.moe_align_block_size, "by_expert"):
        marlin_moe.moe_align_block_size = align_by_expert(marlin_moe.moe_align_block_size)
    return True


@contextmanager
def blocks_by_expert(expert_ids: torch.Tensor, row_ids: torch.Tensor) -> Iterator[None]:
    """Within: a kernel that is called with `row_ids` (T, K) gets blocks in the order of `expert_ids` (T, K)."""
    global _step
    _step = expert_ids, row_ids
    try:
        yield
    finally:
        _step = None


def align_by_expert(align: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `moe_align_block_size`, of which the second result names the expert of each block."""

    def aligned(topk_ids: torch.Tensor, block_size: int, num_experts: int, *args: Any, **kwargs: Any) -> Any:
        if _step is None:
            return align(topk_ids, block_size, num_experts, *args, **kwargs)
        expert_ids, row_ids = _step
        assert topk_ids.shape == row_ids.shape, f"{tuple(topk_ids.shape)} of a step's {tuple(row_ids.shape)} ids"
        ids, rows = expert_ids.to(topk_ids.dtype), row_ids.to(topk_ids.dtype)
        tokens, blocks, *rest = align(torch.where(rows < 0, rows, ids), block_size, num_experts, *args, **kwargs)
        # One place more, for ids below 0.
        table = torch.full((num_experts + 1,), -1, dtype=blocks.dtype, device=blocks.device)
        places = torch.where(ids < 0, num_experts, ids).flatten().long()
        table.scatter_(0, places, rows.flatten().to(blocks.dtype))
        # Behind the last block nothing is written: any value may stand there.
        known = (blocks >= 0) & (blocks < num_experts)
        return tokens, torch.where(known, table[torch.where(known, blocks, num_experts).long()], blocks), *rest

    aligned.by_expert = True  # type: ignore[attr-defined]
    return aligned
