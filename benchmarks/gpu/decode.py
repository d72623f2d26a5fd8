"""A synthetic decoder, one token per step, each step one replay of a CUDA graph: what residency and prefetch save.

Attention, norms and projections have the model's shapes and random weights; routing comes from a trace. One host store
serves all layers (the same bytes cross the link), while every layer has slots of its own.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from layers import DEVICE, Layer, make_store, planner_state
from moe import MoeKernel, find_kernel
from routing import Trace, bound_ms, missed_bytes, variants, warm_up_steps
from shapes import MoeShape, Plan

from vllm_expert_prefetch.experts.device_staging import DeviceLane, DeviceStagingOptions
from vllm_expert_prefetch.native.library import cuda_library

LFRU = 2


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
    """`slots_of(layer)` stages what the layer needs and returns (slot ids, w13, w2); `ahead(layer)` looks ahead."""

    backbone: Backbone
    kernel: MoeKernel
    slots_of: Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
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
            slot_ids, w13, w2 = self.slots_of(layer)
            normed = torch.nn.functional.rms_norm(x, (shape.hidden,))
            x = x + self.kernel(normed, w13, w2, weights, slot_ids.view(1, -1))
        self.join()
        return x


class Cached:
    """Slots in every layer: one per expert; or planned as a cache (`cached`); or top_k, filled anew each step."""

    def __init__(self, shape: MoeShape, store: Any, num_slots: int, cached: bool, prefetch: bool, blocks: int) -> None:
        self.shape = shape
        self.lane = DeviceLane(DEVICE)
        self.library: Any = cuda_library()
        self.resident, self.cached, self.prefetch = num_slots == shape.num_experts, cached, prefetch
        options = DeviceStagingOptions(num_demand_blocks=blocks)
        self.layers = [Layer(store, num_slots, self.lane, options) for _ in range(shape.num_layers)]
        self.routed = torch.zeros(shape.num_layers, shape.top_k, dtype=torch.int32, device=DEVICE)
        self.predicted = torch.zeros_like(self.routed)
        self.slot_ids = torch.arange(shape.top_k, dtype=torch.int32, device=DEVICE).repeat(shape.num_layers, 1)
        self.real = torch.ones(1, dtype=torch.int64, device=DEVICE)
        self.budget = torch.full((1,), shape.top_k, dtype=torch.int32, device=DEVICE)
        self.states = [planner_state(shape.num_experts, num_slots, shape.top_k, LFRU) for _ in self.layers]
        for layer in self.layers if self.resident else ():
            layer.staging.copy((expert, expert) for expert in range(num_slots))

    def weights(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 (C, 2I, H) and w2 (C, H, I) in bfloat16, over the layer's slots."""
        hidden, intermediate = self.shape.hidden, self.shape.intermediate
        w13, w2 = layer.pool.tensors.values()
        return w13.view(-1, 2 * intermediate, hidden), w2.view(-1, hidden, intermediate)

    def slots_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stage what the layer needs: its slot ids and weights."""
        layer, demand = self.layers[index], self.layers[index].demand
        if self.resident:
            return self.routed[index], *self.weights(layer)
        if self.cached:
            lists = (demand.loads, demand.num_loads, demand.late, demand.num_late)
            stream = torch.cuda.current_stream().cuda_stream
            routed, slot_ids = self.routed[index], self.slot_ids[index]
            self.library.plan_step(
                self.states[index], layer.staging.slot_words, routed.view(1, -1), self.real, slot_ids, *lists, 0, stream
            )
        else:
            demand.loads[:, 0].copy_(self.routed[index])
            demand.loads[:, 1].copy_(self.slot_ids[index])
            demand.num_loads.fill_(self.shape.top_k)
        layer.staging.stage(demand)
        return self.slot_ids[index], *self.weights(layer)

    def ahead(self, index: int) -> None:
        """Plan and start the prefetch of a layer."""
        if not self.prefetch:
            return
        layer, lists = self.layers[index], self.layers[index].ahead
        budget, stream = self.budget.data_ptr(), torch.cuda.current_stream().cuda_stream
        words, orders = layer.staging.slot_words, (lists.loads, lists.num_loads, lists.tickets)
        self.library.plan_prefetch(
            self.states[index], words, self.predicted[index].view(1, -1), self.real, budget, *orders, stream
        )
        layer.staging.prefetch(lists)

    def totals(self) -> dict[str, int]:
        """Totals of the planners since the start (residency.h's header words)."""
        headers = torch.stack([state[:17] for state in self.states]).sum(0).tolist()
        return dict(zip(("hits", "late", "misses", "evictions", "used", "unused"), headers[11:17], strict=True))


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
        decoder = Decoder(backbone, kernel, state.slots_of, state.ahead, state.lane.join)
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
                "kernel_errors": state.lane.num_errors(),
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
    routed, predicted = routed[:, : state.shape.num_layers], predicted[:, : state.shape.num_layers]
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
