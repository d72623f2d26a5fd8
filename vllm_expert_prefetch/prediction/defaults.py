"""Default vectors: the mean un-weighted output of every expert, and the scale of the residual they are added to."""

from typing import NamedTuple

import torch


class DefaultVectors(NamedTuple):
    """`vectors` (num_layers, E, H) and `scales` (num_layers,), float32.

    A scale is the mean of what a layer's norm divides the residual by. Taking it for every token instead of the
    token's own costs less than 0.001 of recall (docs/predictors.md), and nothing has to be observed in serving.
    """

    vectors: torch.Tensor
    scales: torch.Tensor

    def to(self, device: torch.device) -> "DefaultVectors":
        return DefaultVectors(self.vectors.to(device), self.scales.to(device))


class DefaultSums:
    """Running sums over tokens, on the CPU.

    `sums` (num_layers, E, H) float32 and `counts` (num_layers, E) int64 of outputs; `scale_sums` (num_layers,) float64
    and `scale_counts` (num_layers,) int64 of scales.
    """

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int) -> None:
        self.sums = torch.zeros(num_layers, num_experts, hidden_size)
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.scale_sums = torch.zeros(num_layers, dtype=torch.float64)
        self.scale_counts = torch.zeros(num_layers, dtype=torch.int64)

    def add(self, layer: int, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        """`outputs` (T, H): what the experts `ids` (T,) of `layer` gave, one per token."""
        ids = ids.to("cpu", torch.int64)
        self.sums[layer].index_add_(0, ids, outputs.to("cpu", torch.float32))
        self.counts[layer] += torch.bincount(ids, minlength=self.counts.shape[1])

    def add_scales(self, layer: int, scales: torch.Tensor) -> None:
        """`scales` (T,): what the norm of `layer` divided each token's residual by."""
        self.scale_sums[layer] += scales.double().sum().cpu()
        self.scale_counts[layer] += scales.numel()

    def means(self) -> DefaultVectors:
        """The default vectors. An expert that no token reached gets the mean over its layer's tokens."""
        counts = self.counts.unsqueeze(-1)
        layer_means = self.sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
        vectors = torch.where(counts > 0, self.sums / counts.clamp(min=1), layer_means)
        return DefaultVectors(vectors, (self.scale_sums / self.scale_counts.clamp(min=1)).float())

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor, by name."""
        return dict(vars(self))

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        for name in vars(self):
            setattr(self, name, state[name])
