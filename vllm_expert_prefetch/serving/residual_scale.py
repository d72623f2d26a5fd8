"""Observing the scale of the residual in front of each MoE layer, which default vectors need.

The norm gives the observer its own output to pass on: what follows then depends on the observation, so that neither
torch.compile nor a CUDA graph can drop it or move it behind the experts. The scale is written to a buffer of fixed
address.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_expert_prefetch.serving.lookahead_sources import Source

_buffers: dict[int, torch.Tensor] = {}


def observe_scales(sources: Sequence[Source], max_tokens: int) -> list[torch.Tensor]:
    """Make every source's norm write the root mean square of the residual; to be called before anything is compiled.

    Returns one buffer (max_tokens,) float32 per source, on the norm's device: row t is token t of the current step,
    valid from the norm of that layer to the next step.
    """
    return [_observe(source.norm, max_tokens) for source in sources]


def _observe(norm: Any, max_tokens: int) -> torch.Tensor:
    if isinstance(norm, _Observed):
        raise ValueError("expert_prefetch: this norm is observed already")
    number = len(_buffers) + 1
    _buffers[number] = torch.ones(max_tokens, device=norm.weight.device)
    # A number in a tensor, not a constant: equal layers share a compiled graph.
    norm.register_buffer("scale_handle", torch.tensor(number, device="cpu"), persistent=False)
    norm.__class__ = type(f"Observed{type(norm).__name__}", (_Observed, type(norm)), {})
    return _buffers[number]


class _Observed:
    """Mixed into the class of a norm."""

    scale_handle: torch.Tensor

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        output = super().forward(x, residual)  # type: ignore[misc]
        if residual is None:
            return torch.ops.expert_prefetch.observe_scale(output, x, self.scale_handle)
        normed, total = output
        return torch.ops.expert_prefetch.observe_scale(normed, total, self.scale_handle), total


def _observe_scale(normed: torch.Tensor, residual: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    buffer = _buffers[int(handle.item())]
    rows = min(residual.shape[0], buffer.shape[0])
    buffer[:rows].copy_(residual[:rows].float().square().mean(-1).sqrt())
    return normed.clone()


def _observe_scale_fake(normed: torch.Tensor, residual: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(normed)


_library = torch.library.Library("expert_prefetch", "FRAGMENT")
_library.define(
    "observe_scale(Tensor normed, Tensor residual, Tensor handle) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.impl("observe_scale", _observe_scale, "CompositeExplicitAutograd")
torch.library.register_fake("expert_prefetch::observe_scale", _observe_scale_fake, lib=_library)
