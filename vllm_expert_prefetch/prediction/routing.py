"""From router logits to experts, as the target model does it."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
_OUTSIDE_GROUPS = 1e3
"""Taken off the score of an expert outside the chosen groups: guesses come from there only when these run out."""


class Prediction(NamedTuple):
    """Experts in falling order of the score that chooses them.

    `ids` (R, count) int64. `weights` (R, count) float32: gate weights; the first top-k of a row are what the model
    would use, the others are on the same scale. R is the number of tokens, or 1 for a guess that no token changes.
    """

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """How one layer's router turns logits (T, E) into experts.

    `correction_bias` (E,) float32 steers the choice and not the weights. With `num_groups` > 1 only the `top_groups`
    best groups of neighbouring experts are eligible. `scaling` multiplies the weights.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    correction_bias: torch.Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring {self.scoring!r} is not one of {', '.join(SCORINGS)}")

    @property
    def is_monotonic(self) -> bool:
        """Whether the order of the logits is the order of the choice, whatever their scale."""
        return self.correction_bias is None and self.num_groups <= 1

    def choose(self, logits: torch.Tensor, count: int) -> Prediction:
        """The `count` (at most E) best experts of each row of `logits` (T, E), any float dtype."""
        count = min(count, logits.shape[-1])
        if self.scoring == "softmax" and self.is_monotonic:
            values, ids = logits.float().topk(count, dim=-1)
            over = values[:, : self.top_k] if self.renormalize else logits.float()
            weights = torch.exp(values - over.logsumexp(-1, keepdim=True))
        else:
            scores = self._scores(logits.float())
            ids = self._eligible(scores).topk(count, dim=-1)[1]
            weights = scores.gather(-1, ids)
            if self.renormalize:
                weights = weights / weights[:, : self.top_k].sum(-1, keepdim=True)
        return Prediction(ids, weights * self.scaling if self.scaling != 1.0 else weights)

    def to(self, device: torch.device) -> "Routing":
        """The same, its bias on `device`."""
        if self.correction_bias is None:
            return self
        return replace(self, correction_bias=self.correction_bias.to(device))

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scoring == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.scoring == "sigmoid" else F.softplus(logits).sqrt()

    def _eligible(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores for the choice. Groups as in DeepSeek: their best expert, or two best where there is a bias."""
        biased = scores if self.correction_bias is None else scores + self.correction_bias
        if self.num_groups <= 1:
            return biased
        by_group = biased.unflatten(-1, (self.num_groups, -1))
        num_best = 1 if self.correction_bias is None else 2
        group_scores = by_group.topk(num_best, dim=-1)[0].sum(-1)
        chosen = group_scores.topk(self.top_groups, dim=-1)[1]
        outside = torch.full_like(group_scores, _OUTSIDE_GROUPS).scatter(-1, chosen, 0.0)
        return (by_group - outside.unsqueeze(-1)).flatten(-2)
