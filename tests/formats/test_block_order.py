"""Marlin's blocks in the order of experts: shown by what the stand-in of its kernel makes of K in slices."""

import pytest
import torch

from formats import standins
from vllm_expert_prefetch.serving.block_order import align_by_expert, blocks_by_expert

E, TOP_K, BLOCK = 16, 4, 8


def align(topk_ids, block_size, num_experts, expert_map=None, **options):
    """vLLM's moe_align_block_size around the stand-in of its operator."""
    room = topk_ids.numel() + num_experts * (block_size - 1)
    tokens, blocks = torch.empty(room, dtype=torch.int32), torch.empty(room // block_size + 1, dtype=torch.int32)
    count = torch.empty(1, dtype=torch.int32)
    standins.align_blocks(topk_ids, num_experts, block_size, tokens, blocks, count, expert_map)
    return tokens, blocks, count


@pytest.fixture
def step():
    """Expert ids (T, K), the row of each expert, and their row ids; the last token is padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOP_K] for _ in range(9)]).to(torch.int32)
    row_of = torch.randperm(E, generator=generator).to(torch.int32)
    rows = row_of[ids.long()]
    ids[-1] = rows[-1] = -1
    return ids, row_of, rows


def test_blocks_are_those_of_the_experts_and_name_rows(step):
    ids, row_of, rows = step
    tokens, experts, count = align(ids, BLOCK, E)
    with blocks_by_expert(ids, rows):
        our_tokens, our_rows, our_count = align_by_expert(align)(rows, BLOCK, E)
    num_blocks = int(count) // BLOCK
    assert our_count == count
    assert torch.equal(our_tokens, tokens)
    assert torch.equal(our_rows[:num_blocks], row_of[experts[:num_blocks].long()])
    assert not torch.equal(align(rows, BLOCK, E)[0], tokens), "rows in another order than experts"


def test_what_stands_behind_the_last_block_does_no_harm(step):
    ids, _, rows = step

    def with_garbage(*args, **options):
        tokens, blocks, count = align(*args, **options)
        blocks[int(count) // BLOCK :] = torch.randint(-(2**31), 2**31 - 1, (1,)).int()
        return tokens, blocks, count

    with blocks_by_expert(ids, rows):
        align_by_expert(with_garbage)(rows, BLOCK, E)


def test_outside_a_step_nothing_changes(step):
    _, _, rows = step
    for ours, plain in zip(align_by_expert(align)(rows, BLOCK, E), align(rows, BLOCK, E), strict=True):
        assert torch.equal(ours, plain)


def test_at_sizes_where_k_is_divided_the_order_decides_the_last_bits(step):
    """H 1024, and 82 thread blocks: with row ids some values differ, with blocks by expert none."""
    ids, row_of, rows = step
    size_n, size_k = 512, 1024
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (E, size_k // 8, size_n * 8), generator=generator)
    packed = torch.stack([(expert.view(size_k // 8, size_n, 8) << (4 * torch.arange(8))).sum(-1) for expert in codes])
    weights = standins.repack_gptq_experts(packed.int(), None, size_k, size_n, 4)
    scales = torch.rand((E, size_k // 64, size_n), generator=generator).to(torch.bfloat16)
    x = torch.randn((len(ids), size_k), generator=generator).to(torch.bfloat16)

    def multiply(given, aligned, of_weights, of_scales):
        tokens, blocks, count = aligned(given, BLOCK, E)
        names = {"size_m": len(ids), "size_n": size_n, "size_k": size_k, "b_q_type": standins.scalar_types.uint4b8}
        out = torch.zeros(len(ids) * TOP_K, size_n, dtype=torch.bfloat16)
        none = [None] * 3
        weigh = (torch.ones(len(ids), TOP_K), BLOCK, TOP_K, False)
        standins.marlin_gemm(
            x, out, of_weights, None, of_scales, *none, torch.empty(0), tokens, blocks, count, *weigh, **names
        )
        return out

    in_rows = torch.empty_like(row_of).scatter_(0, row_of.long(), torch.arange(E, dtype=torch.int32)).long()
    expected = multiply(ids, align, weights, scales)
    moved = weights[in_rows], scales[in_rows]
    assert not torch.equal(multiply(rows, align, *moved), expected)
    with blocks_by_expert(ids, rows):
        assert torch.equal(multiply(rows, align_by_expert(align), *moved), expected)
