"""A synthetic decoder, one token per step, each step one replay of a CUDA graph: what residency and prefetch save.

Attention, norms and projections have the model's shapes and random weights; routing comes from a trace. One host store
serves all layers (the same bytes cross the link), while every layer has slots of its own and shares overflow rows.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from layers import DEVICE, ask, layer_of, make_caches, make_store
from moe import MoeKernel, find_kernel
from routing import Trace, bound_ms, missed_bytes, variants, warm_up_steps
from shapes import MoeShape, Plan

from vllm_expert_prefetch.cache.device import DeviceCache
from vllm_expert_prefetch.cache.words import Words


class Backbone:
    """Everything but the experts."""

    def __init__(self, shape: MoeShape, context: int) -> None:
        self.shape = shape
        sizes = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        layers = range(shape.num_layers)
        self.qkv = [_random_matrix(sizes[0] + 2 * sizes[1], shape.hidden) for _ in layers]
        self.out = [_random_matrix(shape.hidden, sizes[0]) for _ in layers]
        self.gate = [_random_matrix(shape.num_experts, shape.hidden) for _ in layers]
        self.keys, self.values = torch.randn(
            2, shape.num_layers, 1, shape.num_kv_heads, context, shape.head_size, dtype=torch.bfloat16, device=DEVICE
        )

    def attend(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x (1, H) after attention and the router's product, whose ids the trace replaces."""
        functional, shape = torch.nn.functional, self.shape
        normed = functional.rms_norm(x, (shape.hidden,))
        queries = (normed @ self.qkv[layer].T)[:, : shape.num_heads * shape.head_size]
        queries = queries.view(1, shape.num_heads, 1, shape.head_size)
        attended = functional.scaled_dot_product_attention(
            queries, self.keys[layer], self.values[layer], enable_gqa=True
        )
        x = x + attended.reshape(1, -1) @ self.out[layer].T
        return x + 0 * (x @ self.gate[layer].T).sum()


def _random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE) / columns**0.5


@dataclass
class Decoder:
    """`rows_of(layer)` brings what the layer needs and returns (row ids, w13, w2); `ahead(layer)` looks ahead."""

    backbone: Backbone
    kernel: MoeKernel
    rows_of: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ahead: Callable[[int], None]
    join: Callable[[], None]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One token through all layers."""
        shape = self.backbone.shape
        weights = torch.full((1, shape.top_k), 1 / shape.top_k, dtype=torch.float32, device=DEVICE)
        for layer in range(shape.num_layers):
            x = self.backbone.attend(layer, x)
            if layer + 1 < shape.num_layers:
                self.ahead(layer + 1)
            row_ids, w13, w2 = self.rows_of(layer)
            normed = torch.nn.functional.rms_norm(x, (shape.hidden,))
            x = x + self.kernel(normed, w13, w2, weights, row_ids)
        self.join()
        return x


class Cached:
    """Every expert in a row of its own; or planned as a cache (`cached`); or top-k slots, filled anew each step."""

    def __init__(self, shape: MoeShape, store: Any, num_slots: int, cached: bool, prefetch: bool, blocks: int) -> None:
        self.shape = shape
        self.resident, self.cached, self.prefetch = num_slots == shape.num_experts, cached, prefetch
        self.caches = make_caches(store, shape.num_layers, num_slots, shape.top_k, num_blocks=blocks)
        self.layers = [layer_of(self.caches, number) for number in range(shape.num_layers)]
        self.routed = torch.zeros(shape.num_layers, 1, shape.top_k, dtype=torch.int32, device=DEVICE)
        self.predicted = torch.zeros_like(self.routed)
        self.first_rows = torch.arange(shape.top_k, dtype=torch.int32, device=DEVICE).view(1, -1)
        self.rows = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        for layer in self.layers:
            layer.set_budget(shape.top_k, shape.top_k)
            if self.resident:
                ask(layer, [(expert, expert) for expert in range(num_slots)])
                layer.gather()

    def weights(self, layer: DeviceCache) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 (E, 2I, H) and w2 (E, H, I) in bfloat16, over the layer's rows."""
        hidden, intermediate = self.shape.hidden, self.shape.intermediate
        w13, w2 = layer.tensors.values()
        return w13.view(-1, 2 * intermediate, hidden), w2.view(-1, hidden, intermediate)

    def rows_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bring what the layer needs: its row ids and weights."""
        layer, routed = self.layers[index], self.routed[index]
        if self.resident:
            return routed, *self.weights(layer)
        if self.cached:
            return layer.serve(routed, self.rows), *self.weights(layer)
        orders = layer.demand
        orders.loads[: self.shape.top_k, 0].copy_(routed[0])
        orders.loads[: self.shape.top_k, 1].copy_(self.first_rows[0])
        orders.num_loads.fill_(self.shape.top_k)
        layer.gather()
        return self.first_rows, *self.weights(layer)

    def ahead(self, index: int) -> None:
        """Plan and start the prefetch of a layer."""
        if self.prefetch:
            with self.caches.aside():
                self.layers[index].prefetch(self.predicted[index], self.rows)

    def totals(self) -> dict[str, int]:
        """Sums over the layers since the start."""
        sums = self.caches.mirror.sum(0).tolist()
        words = Words._make(sums)
        return {name: getattr(words, name) for name in ("hits", "late", "misses", "evictions", "used", "unused")}


def measure(plan: Plan, trace: Trace, peak_gbps: float, blocks: int) -> dict[str, Any]:
    """Milliseconds per token of every variant, its bound, and how many outputs differ from the all-resident ones."""
    shape = _fitting(plan.shape)
    name, kernel = find_kernel()
    store = make_store(shape.row_bytes, shape.num_experts)
    backbone = Backbone(shape, plan.context)
    start = torch.randn(1, shape.hidden, dtype=torch.bfloat16, device=DEVICE)
    rows: list[dict[str, Any]] = []
    reference: torch.Tensor | None = None
    for label, slots, cached, prefetch in variants(shape, plan.cache_fractions):
        state = Cached(shape, store, slots, cached, prefetch, blocks)
        decoder = Decoder(backbone, kernel, state.rows_of, state.ahead, state.caches.join)
        outputs, ms = _run(decoder, state, trace, start)
        reference = outputs if reference is None else reference
        compute_ms = rows[0]["ms_per_token"] if rows else ms
        missed = missed_bytes(trace, shape, slots, cached)
        rows.append(
            {
                "variant": label,
                "slots_per_layer": slots,
                "ms_per_token": round(ms, 3),
                "missed_mb_per_token": round(missed / 1e6, 2),
                "bound_ms": round(bound_ms(compute_ms, missed, peak_gbps), 3),
                "differing_values": int((outputs != reference).sum().item()),
                "kernel_errors": state.caches.num_errors(),
                "totals": state.totals() if cached else {},
            }
        )
        del state, decoder
        gc.collect()
        torch.cuda.empty_cache()
    return {"moe_kernel": name, "num_layers": shape.num_layers, "rows": rows}


def _fitting(shape: MoeShape) -> MoeShape:
    """As many layers as the card can hold with every expert resident."""
    free, _ = torch.cuda.mem_get_info()
    return replace(
        shape, num_layers=min(shape.num_layers, int(0.85 * free) // (shape.num_experts * shape.record_bytes))
    )


def _run(decoder: Decoder, state: Cached, trace: Trace, start: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Outputs (steps, H), and milliseconds per token after the warm-up, one replay per token."""
    routed, predicted = (torch.tensor(ids, dtype=torch.int32).to(DEVICE) for ids in (trace.routed, trace.predicted))
    routed, predicted = (ids[:, : state.shape.num_layers].unsqueeze(2) for ids in (routed, predicted))
    x = start.clone()
    state.routed.copy_(routed[0])
    state.predicted.copy_(predicted[0])
    decoder.step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decoder.step(x)
    outputs = torch.empty(len(routed), x.shape[1], dtype=x.dtype, device=DEVICE)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for step in range(len(routed)):
        if step == warm_up_steps(trace):
            begin.record()
        state.routed.copy_(routed[step])
        state.predicted.copy_(predicted[step])
        graph.replay()
        outputs[step].copy_(result[0])
    end.record()
    end.synchronize()
    return outputs, begin.elapsed_time(end) / (len(routed) - warm_up_steps(trace))
