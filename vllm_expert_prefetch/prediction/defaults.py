"""Default vectors: the mean un-weighted output of every expert."""

import torch


class DefaultSums:
    """Running sums over tokens. `sums` (num_layers, E, H) float32, `counts` (num_layers, E) int64, on the CPU."""

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int) -> None:
        self.sums = torch.zeros(num_layers, num_experts, hidden_size)
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)

    def add(self, layer: int, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        """`outputs` (T, H): what the experts `ids` (T,) of `layer` gave, one per token."""
        ids = ids.to("cpu", torch.int64)
        self.sums[layer].index_add_(0, ids, outputs.to("cpu", torch.float32))
        self.counts[layer] += torch.bincount(ids, minlength=self.counts.shape[1])

    def means(self) -> torch.Tensor:
        """Default vectors (num_layers, E, H). An expert that no token reached gets the mean over its layer's tokens."""
        counts = self.counts.unsqueeze(-1)
        layer_means = self.sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
        return torch.where(counts > 0, self.sums / counts.clamp(min=1), layer_means)
