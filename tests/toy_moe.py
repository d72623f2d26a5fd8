"""A small pre-norm MoE in plain torch, for tests: what vLLM would compute, with nothing of vLLM."""

from dataclasses import dataclass

import torch

from vllm_expert_prefetch.prediction import Gate, Norm, Routing, Signals

HIDDEN, EXPERTS, LAYERS, TOP_K = 32, 8, 4, 2


def make_gates(routing=None, layers=LAYERS, hidden=HIDDEN, experts=EXPERTS, seed=0):
    """Gates with random weights and gains; `routing` as given, else softmax top-2."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Gate(
            f"layer{number}",
            torch.randn(experts, hidden, generator=generator),
            Norm(1 + 0.3 * torch.randn(hidden, generator=generator), eps=1e-6),
            routing or Routing(TOP_K),
        )
        for number in range(layers)
    ]


@dataclass
class ToyModel:
    """`experts[l]` (E, H): what expert e of layer l adds to the residual, whatever its input. No attention."""

    gates: list[Gate]
    experts: torch.Tensor

    def run(self, residual, sums=None):
        """Signals of every layer for the residual (T, H) in front of layer 0; what experts give is added to `sums`."""
        signals = []
        for gate, experts in zip(self.gates, self.experts, strict=True):
            hidden = gate.norm.apply(residual)
            ids, weights = gate.routing.choose(gate.logits(hidden), gate.routing.top_k)
            signals.append(Signals(hidden, ids, weights))
            if sums is not None:
                layer = len(signals) - 1
                sums.add_scales(layer, gate.norm.scale_of(residual))
                sums.add(layer, ids.flatten(), experts[ids.flatten()])
            residual = residual + gate.output_scale * (weights.unsqueeze(-1) * experts[ids]).sum(1)
        return signals


def make_model(strength=1.0, seed=0, **options):
    """A toy model whose experts' outputs have entries of size `strength`."""
    gates = make_gates(seed=seed, **options)
    shape = (len(gates), gates[0].num_experts, gates[0].weight.shape[1])
    return ToyModel(gates, strength * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)))


def tokens(count, hidden=HIDDEN, seed=2):
    """Residuals (count, hidden)."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))
