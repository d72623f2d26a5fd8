"""A dense FFN becomes a MoE without training (after MoEfication, Zhang et al. 2022, arXiv:2110.01786).

Per layer: clusters of the FFN's inputs give the router, each expert keeps the neurons that matter most on its cluster,
and its down projection is corrected by ridge regression for the neurons it dropped.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# A cluster with at most this many tokens is started anew; an expert with fewer than this many is fitted on all tokens.
MIN_CLUSTER_TOKENS = 8
MIN_EXPERT_TOKENS = 64
# Mean gap between the first and the last chosen logit: the top-2 weights are then about 0.7 and 0.3.
LOGIT_GAP = 0.9


@dataclass(frozen=True)
class MoeSpec:
    """What a layer becomes."""

    num_experts: int = 16
    top_k: int = 2
    expert_width: int = 1024
    """Neurons of one expert."""
    ridge: float = 0.01
    """Regularisation, as a share of the mean of the Gram matrix's diagonal."""
    num_kmeans_steps: int = 12
    seed: int = 0


@dataclass(frozen=True)
class DenseFFN:
    """A SwiGLU block: `down @ (silu(gate @ x) * (up @ x))`. All float32."""

    gate: torch.Tensor
    """[width, hidden]"""
    up: torch.Tensor
    """[width, hidden]"""
    down: torch.Tensor
    """[hidden, width]"""


def fit_layer(
    inputs: torch.Tensor, neurons: torch.Tensor, dense: DenseFFN, spec: MoeSpec, layer: int
) -> dict[str, torch.Tensor]:
    """Router and experts of one layer.

    `inputs`: what the dense FFN sees, float32 [tokens, hidden], at least `num_experts` of them. `neurons`: what its
    down projection sees, float32 [tokens, width]. Returns float32 tensors named as below a Mixtral `block_sparse_moe`:
    `gate.weight` [num_experts, hidden], `experts.E.w1.weight` and `w3` [expert_width, hidden], `experts.E.w2.weight`
    [hidden, expert_width]. Each layer draws from its own seed, so the result does not depend on which layers were
    fitted before. Raises ValueError for too few tokens or neurons.
    """
    _check(inputs, dense, spec)
    generator = torch.Generator().manual_seed(spec.seed * 1000 + layer)
    router = fit_router(inputs, spec, generator)
    routed = (inputs @ router.T).topk(spec.top_k, dim=1).indices
    tensors = {"gate.weight": router}
    for expert in range(spec.num_experts):
        mine = (routed == expert).any(dim=1)
        own = neurons[mine] if int(mine.sum()) >= MIN_EXPERT_TOKENS else neurons
        tensors |= {f"experts.{expert}.{name}": weight for name, weight in fit_expert(own, dense, spec).items()}
    return tensors


def fit_router(inputs: torch.Tensor, spec: MoeSpec, generator: torch.Generator) -> torch.Tensor:
    """Cluster centres of the inputs, scaled so that the chosen logits lie LOGIT_GAP apart: [num_experts, hidden]."""
    centres = spherical_kmeans(inputs, spec.num_experts, spec.num_kmeans_steps, generator)
    chosen = (inputs @ centres.T).topk(spec.top_k, dim=1).values
    gap = (chosen[:, 0] - chosen[:, -1]).mean().clamp_min(1e-6)
    return centres * (LOGIT_GAP / gap)


def spherical_kmeans(points: torch.Tensor, num: int, num_steps: int, generator: torch.Generator) -> torch.Tensor:
    """`num` unit centres [num, hidden] of float32 points [tokens, hidden], by cosine (Dhillon and Modha 2001)."""
    points = F.normalize(points, dim=1)
    centres = points[torch.randperm(len(points), generator=generator)[:num]]
    for _ in range(num_steps):
        nearest = (points @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        small = torch.bincount(nearest, minlength=num) <= MIN_CLUSTER_TOKENS
        sums[small] = points[torch.randint(len(points), (int(small.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=1)
    return centres


def fit_expert(neurons: torch.Tensor, dense: DenseFFN, spec: MoeSpec) -> dict[str, torch.Tensor]:
    """`w1`, `w3` and the corrected `w2` of one expert, from neuron values [tokens, width] on its tokens."""
    # a neuron's energy: root mean square of what it adds to the output
    energy = neurons.square().mean(dim=0).sqrt() * dense.down.norm(dim=0)
    kept = energy.topk(spec.expert_width).indices.sort().values
    dropped = torch.ones(len(energy), dtype=torch.bool).index_fill(0, kept, False)
    lost = neurons[:, dropped] @ dense.down[:, dropped].T
    correction = ridge_regression(neurons[:, kept], lost, spec.ridge)
    return {
        "w1.weight": dense.gate[kept],
        "w3.weight": dense.up[kept],
        "w2.weight": dense.down[:, kept] + correction.T,
    }


def ridge_regression(features: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """The W that minimises |features @ W - targets|^2 + penalty |W|^2: [num_features, num_targets].

    W = (F'F + penalty I)^-1 F'T with penalty = ridge x mean(diag(F'F)) (Hoerl and Kennard 1970).
    """
    gram = features.T @ features
    penalty = ridge * gram.diagonal().mean() + 1e-6
    gram.diagonal().add_(penalty)
    return torch.linalg.solve(gram, features.T @ targets)


def _check(inputs: torch.Tensor, dense: DenseFFN, spec: MoeSpec) -> None:
    if len(inputs) < spec.num_experts:
        raise ValueError(f"{len(inputs)} calibration tokens cannot give {spec.num_experts} experts")
    if dense.gate.shape[0] < spec.expert_width:
        raise ValueError(f"expert_width = {spec.expert_width} is more than the {dense.gate.shape[0]} dense neurons")
