"""The router predictor as one Triton kernel: folded gate, top-k and weights in a single launch.

The folded matrix is split over programs, so that one token's prediction is read by many multiprocessors. The last
program of a token to finish (an atomic count tells) ranks the logits. Nothing is decided on the host, and the count
goes back to zero by itself: the kernel can be captured in a graph.
"""

from typing import Any

import torch

from vllm_expert_prefetch.prediction.routing import Prediction, Routing

_BLOCK_H = 256
_MAX_TOKENS = 64
"""Each token reads the matrix again: for more of them, a matrix product reads less."""
_kernel: Any = None


def is_available() -> bool:
    """Whether Triton is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def can_fuse(routing: Routing) -> bool:
    """Whether the kernel knows this routing: plain softmax top-k. Others take the path in torch."""
    return routing.scoring == "softmax" and routing.is_monotonic


def create_fused_router(weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing) -> "FusedRouter | None":
    """The router of these tensors as one kernel; None where it cannot be: not on a GPU, no Triton, another routing."""
    if not (weight.is_cuda and can_fuse(routing) and is_available()):
        return None
    return FusedRouter(weight, bias, routing, _MAX_TOKENS)


class FusedRouter:
    """`weight` (E, H) and `bias` (E,) or None as from `gates.fold`; at most `max_tokens` tokens per call."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing, max_tokens: int, block_experts: int = 8
    ) -> None:
        if not can_fuse(routing):
            raise ValueError(f"the fused router knows plain softmax top-k only, not {routing}")
        self._weight, self._bias, self._routing = weight.contiguous(), bias, routing
        self.max_tokens = max_tokens
        self._block_experts = block_experts
        self._finished = torch.zeros(max_tokens, dtype=torch.int32, device=weight.device)

    def predict(self, hidden: torch.Tensor, count: int) -> Prediction:
        """As `routing.choose(linear(hidden, weight, bias), count)` for `hidden` (T, H)."""
        num_tokens, (num_experts, hidden_size) = hidden.shape[0], self._weight.shape
        count = min(count, num_experts)
        ids = torch.empty(num_tokens, count, dtype=torch.int64, device=hidden.device)
        weights = torch.empty(num_tokens, count, device=hidden.device)
        logits = torch.empty(num_tokens, num_experts, device=hidden.device)
        num_programs = -(-num_experts // self._block_experts)
        _load_kernel()[(num_tokens, num_programs)](
            hidden,
            self._weight,
            self._weight if self._bias is None else self._bias,
            logits,
            self._finished,
            ids,
            weights,
            hidden.stride(0),
            hidden_size,
            num_experts,
            num_programs,
            self._routing.scaling,
            HAS_BIAS=self._bias is not None,
            RENORMALIZE=self._routing.renormalize,
            TOP_K=self._routing.top_k,
            COUNT=count,
            BLOCK_COUNT=_power_of_two(count),
            BLOCK_E=self._block_experts,
            ALL_E=_power_of_two(num_experts),
            BLOCK_H=_BLOCK_H,
        )
        return Prediction(ids, weights)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _load_kernel() -> Any:
    """Compiled on first use: Triton may be missing, and must not be imported where nothing runs on a GPU."""
    global _kernel
    if _kernel is None:
        from vllm_expert_prefetch.prediction.fused_router_kernel import fused_router

        _kernel = fused_router
    return _kernel
