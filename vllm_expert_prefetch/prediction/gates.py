"""What look-ahead needs of a model: each MoE layer's router and the norm in front of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_expert_prefetch.prediction.routing import Routing

_SMALLEST_GAIN = 1e-6
"""Relative to the largest gain of a norm: below it, a coordinate of the norm's output says nothing of its input."""


@dataclass(frozen=True)
class Norm:
    """`gain * (r - mean(r) if centered else r) / sqrt(mean(square) + eps) + shift`, over the hidden size H.

    `gain` (H,) float32 is the factor itself (for norms that store an offset from one, already added).
    """

    gain: torch.Tensor
    eps: float
    shift: torch.Tensor | None = None
    centered: bool = False

    def inverse_gain(self) -> torch.Tensor:
        """1 / gain (H,), 0 where the gain is (almost) 0."""
        readable = self.gain.abs() > _SMALLEST_GAIN * self.gain.abs().max()
        return torch.where(readable, 1.0 / self.gain, 0.0)

    def scale_of(self, residual: torch.Tensor) -> torch.Tensor:
        """What the norm divides each row of `residual` (T, H) by, (T,) float32."""
        residual = residual.float()
        if self.centered:
            residual = residual - residual.mean(-1, keepdim=True)
        return (residual.square().mean(-1) + self.eps).sqrt()

    def apply(self, residual: torch.Tensor) -> torch.Tensor:
        """The norm of `residual` (T, H) float32."""
        if self.centered:
            return F.layer_norm(residual, self.gain.shape, self.gain, self.shift, self.eps)
        normed = F.rms_norm(residual, self.gain.shape, self.gain, self.eps)
        return normed if self.shift is None else normed + self.shift


@dataclass(frozen=True)
class Gate:
    """The router of one MoE layer: `weight` (E, H), `bias` (E,) or None, both float32, and the norm it reads from.

    `output_scale` multiplies the sum of weighted expert outputs on its way into the residual.
    """

    name: str
    weight: torch.Tensor
    norm: Norm
    routing: Routing
    bias: torch.Tensor | None = None
    output_scale: float = 1.0

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Router logits (T, E) float32 of the norm's output `hidden` (T, H)."""
        return F.linear(hidden.float(), self.weight, self.bias)

    def to(self, device: torch.device) -> "Gate":
        """The same, every tensor on `device`."""
        move = {
            name: None if value is None else value.to(device)
            for name, value in (("weight", self.weight), ("bias", self.bias))
        }
        shift = None if self.norm.shift is None else self.norm.shift.to(device)
        norm = replace(self.norm, gain=self.norm.gain.to(device), shift=shift)
        return replace(self, norm=norm, routing=self.routing.to(device), **move)  # type: ignore[arg-type]


def fold(source: Gate, target: Gate) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The target's gate as a function of the source's norm output s: `weight` (E, H) float32 and `bias` (E,) or None.

    `W_t (gain_t / gain_s * (s - shift_s) + shift_t) + b_t`: exact when the residual does not change in between.
    """
    ratio = target.norm.gain * source.norm.inverse_gain()
    weight = target.weight * ratio
    constant = torch.zeros_like(ratio)
    if source.norm.shift is not None:
        constant = constant - ratio * source.norm.shift
    if target.norm.shift is not None:
        constant = constant + target.norm.shift
    if target.bias is None and not constant.any():
        return weight, None
    bias = target.weight @ constant
    return weight, bias if target.bias is None else bias + target.bias


def fingerprint(gates: Sequence[Gate]) -> str:
    """SHA-256 over every gate's shape and weights, first layer to last.

    Rounded to bfloat16, so that the precision a model is served in does not change it.
    """
    digest = hashlib.sha256()
    for gate in gates:
        digest.update(repr((tuple(gate.weight.shape), gate.routing.top_k)).encode())
        digest.update(gate.weight.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
