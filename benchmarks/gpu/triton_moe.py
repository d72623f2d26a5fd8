"""Matrix rows of one expert times one vector: enough of a grouped GEMM for batches of a few tokens."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def rows_times_vector(
    x: Any,
    weights: Any,
    row_ids: Any,
    out: Any,
    num_rows: Any,
    width: Any,
    per_row: Any,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """out (P, N)[p] = weights (E, N, K)[row_ids[p]] @ x (P // per_row, K)[p // per_row], summed in float32."""
    pair = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    expert = tl.load(row_ids + pair).to(tl.int64)
    matrix = weights + expert * num_rows * width + rows[:, None] * width + columns[None, :]
    vector = x + (pair // per_row) * width + columns
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, WIDTH):
        inside = columns < width - start
        part = tl.load(matrix + start, mask=(rows[:, None] < num_rows) & inside[None, :], other=0.0)
        values = tl.load(vector + start, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(part.to(tl.float32) * values[None, :], 1)
    tl.store(out + pair * num_rows + rows, total.to(out.dtype.element_ty), mask=rows < num_rows)
