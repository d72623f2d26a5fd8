"""Triton source of the fused router; imported by `fused_router` when it first runs."""

import triton
import triton.language as tl


@triton.jit
def fused_router(  # type: ignore[no-untyped-def]  # Triton gives annotations a meaning of its own
    hidden,  # (T, H) any float, rows `hidden_stride` apart
    weight,  # (E, H)
    bias,  # (E,)
    logits,  # (T, E) float32, scratch
    finished,  # (T,) int32, zeros before and after
    ids,  # (T, COUNT) int64
    weights,  # (T, COUNT) float32
    hidden_stride,
    hidden_size,
    num_experts,
    num_programs,
    scaling,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALL_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (t, b) computes the logits of experts b * BLOCK_E and following for token t; the last one ranks them."""
    token = tl.program_id(0)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        row = tl.load(hidden + token * hidden_stride + columns, mask=columns < hidden_size, other=0.0)
        inside = (experts < num_experts)[:, None] & (columns < hidden_size)[None, :]
        block = tl.load(weight + experts[:, None] * hidden_size + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(block.to(tl.float32) * row.to(tl.float32)[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + experts, mask=experts < num_experts, other=0.0)
    tl.store(logits + token * num_experts + experts, total, mask=experts < num_experts)
    tl.debug_barrier()  # every thread's part is stored before the count says so
    if tl.atomic_add(finished + token, 1, sem="acq_rel") == num_programs - 1:
        tl.store(finished + token, 0)
        everyone = tl.arange(0, ALL_E)
        known = everyone < num_experts
        left = tl.load(logits + token * num_experts + everyone, mask=known, other=float("-inf"), cache_modifier=".cg")
        highest = tl.max(left, axis=0)
        mass = tl.sum(tl.exp(left - highest), axis=0)
        places = tl.arange(0, BLOCK_COUNT)
        chosen = tl.zeros((BLOCK_COUNT,), tl.float32)
        chosen_mass = 0.0
        for place in tl.static_range(COUNT):
            best = tl.max(left, axis=0)
            expert = tl.minimum(tl.argmax(left, axis=0), num_experts - 1)  # padding rows may hold NaN
            share = tl.exp(best - highest)
            if place < TOP_K:
                chosen_mass += share
            chosen = tl.where(places == place, share, chosen)
            tl.store(ids + token * COUNT + place, expert.to(tl.int64))
            left = tl.where(everyone == expert, float("-inf"), left)
        divisor = chosen_mass if RENORMALIZE else mass
        tl.store(weights + token * COUNT + places, scaling * chosen / divisor, mask=places < COUNT)
