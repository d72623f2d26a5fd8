"""Random weights of a Qwen3-MoE layer, and a piece of the chain on its way through the layers.

The passage gives the outputs of attention and experts their stated size, and records which experts are routed to. It
knows no positions (no rotary embedding), otherwise it is what the model computes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import block_fp8
import torch
from chain import ChainOptions
from routing import Trace, TraceOptions, cache_misses, measured_locality, warm_up_steps
from shapes import MoeShape

GATE_GAIN = 2.0
HIT_RATES_AT = (0.125, 0.25, 0.4, 0.5, 0.75)
Tensors = dict[str, torch.Tensor]


@dataclass
class LayerWeights:
    """One layer's matrices, float32: `experts[name]` (E, rows, columns), the others (rows, columns)."""

    attention: Tensors
    gate: torch.Tensor
    experts: Tensors
    head_size: int

    @staticmethod
    def random(shape: MoeShape, generator: torch.Generator) -> "LayerWeights":
        """Entries whose product with a normalised input has mean square 1, the gate's GATE_GAIN squared."""

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, device=generator.device) / sizes[-1] ** 0.5

        queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        hidden, wide, experts = shape.hidden, shape.intermediate, shape.num_experts
        attention = {"q": draw(queries, hidden), "k": draw(keys, hidden), "v": draw(keys, hidden)}
        return LayerWeights(
            {**attention, "o": draw(hidden, queries)},
            draw(experts, hidden) * GATE_GAIN,
            {name: draw(experts, wide, hidden) for name in ("gate", "up")} | {"down": draw(experts, hidden, wide)},
            shape.head_size,
        )

    def tensors(self, prefix: str, fp8: bool) -> Tensors:
        """As the checkpoint names them."""
        found = {f"{prefix}self_attn.{name}_proj": matrix for name, matrix in self.attention.items()}
        for name, matrices in self.experts.items():
            found |= {f"{prefix}mlp.experts.{e}.{name}_proj": matrix for e, matrix in enumerate(matrices)}
        tensors: Tensors = {}
        for name, matrix in found.items():
            if fp8:
                tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = block_fp8.quantise(matrix)
            else:
                tensors[f"{name}.weight"] = matrix.bfloat16()
        hidden, head_size = self.gate.shape[1], self.head_size
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        norms |= {f"self_attn.{name}_norm": head_size for name in "qk"}
        tensors |= {f"{prefix}{name}.weight": torch.ones(size).bfloat16() for name, size in norms.items()}
        return {**tensors, f"{prefix}mlp.gate.weight": self.gate.bfloat16()}


class Probe:
    """A piece of the chain on its way through the layers: residual (T, H), and the routing so far."""

    def __init__(self, shape: MoeShape, options: ChainOptions, residual: torch.Tensor) -> None:
        self.shape, self.options, self.residual = shape, options, residual
        self.routed: list[torch.Tensor] = []
        self.predicted: list[torch.Tensor] = []
        self._seen: torch.Tensor | None = None

    def through(self, weights: LayerWeights) -> None:
        """One layer. Scales its output matrices so that they add the stated parts of the residual."""
        added = self._attend(weights)
        self._add(added, weights.attention["o"], self.options.attention_part)
        seen = _norm(self.residual)
        scores, ids = (seen @ weights.gate.T).softmax(-1).topk(self.shape.top_k, -1)
        looked = seen if self._seen is None else self._seen
        self.predicted.append((looked @ weights.gate.T).topk(self.shape.top_k, -1).indices)
        self.routed.append(ids)
        added = self._experts(weights, seen, ids, scores / scores.sum(-1, keepdim=True))
        self._add(added, weights.experts["down"], self.options.expert_part)
        self._seen = seen

    def _add(self, added: torch.Tensor, matrix: torch.Tensor, part: float) -> None:
        scale = part * (self.residual.square().mean() / added.square().mean()).sqrt()
        matrix *= scale
        self.residual = self.residual + added * scale

    def _attend(self, weights: LayerWeights) -> torch.Tensor:
        shape, count = self.shape, len(self.residual)
        x = _norm(self.residual)
        q, k, v = ((x @ weights.attention[name].T).view(count, -1, shape.head_size).transpose(0, 1) for name in "qkv")
        q, k = _norm(q), _norm(k)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        return attended[0].transpose(0, 1).reshape(count, -1) @ weights.attention["o"].T

    def _experts(self, weights: LayerWeights, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            tokens, places = (ids == expert).nonzero(as_tuple=True)
            gate, up, down = (weights.experts[name][expert] for name in ("gate", "up", "down"))
            inner = torch.nn.functional.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)
            total.index_add_(0, tokens, (inner @ down.T) * scores[tokens, places, None])
        return total

    def statistics(self) -> dict[str, Any]:
        """The stated options, and what was measured on the probe. Layer 0 is never predicted."""
        routed, predicted = (torch.stack(ids, 1).tolist() for ids in (self.routed, self.predicted))
        trace = Trace([layers[1:] for layers in routed], [layers[1:] for layers in predicted], TraceOptions())
        measured = measured_locality(trace)
        whole = Trace(routed, predicted, TraceOptions())
        lookups = self.shape.num_layers * self.shape.top_k
        hits = {}
        for fraction in HIT_RATES_AT:
            slots = max(self.shape.top_k, int(fraction * self.shape.num_experts))
            misses = cache_misses(whole, self.shape, slots, "lru", warm_up_steps(whole))
            hits[f"{fraction:g}"] = round(1 - sum(misses) / len(misses) / lookups, 3)
        return {
            "made_with": asdict(self.options),
            "probed_tokens": len(routed),
            "shared_with_previous_token": measured["shared_with_previous_token"],
            "recall_of_the_router_predictor": measured["measured_recall"],
            "lru_hit_rate_by_residency": hits,
        }


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
