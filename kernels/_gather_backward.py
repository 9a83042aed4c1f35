"""The gradient of a gather: for every row of a table, the sum of the gradients of the places that read it.

The places are sorted by row, stably, and each row's places are added up in that order, without atomics: the same bits
every time. A row that very many places read (padding, a bestseller) must not become one long loop: wherever a whole
chunk of CHUNK sorted places belongs to one row, a first kernel adds the chunk up, and the second, which has one program
for each row that is read, takes such chunks whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import triton_dtype

CHUNK, BLOCK_R, BLOCK_C, NUM_WARPS = 128, 16, 64, 1


@triton.jit
def _add_up(
    total, x_ptr, order_ptr, start, end, offs_c, inside, channels,
    ORDERED: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_C] plus the rows start to end - 1 of x, or with ORDERED those that `order` names there."""
    for r0 in range(start, end, BLOCK_R):
        offs_r = r0 + tl.arange(0, BLOCK_R)
        here = offs_r < end
        rows = tl.load(order_ptr + offs_r, mask=here, other=0) if ORDERED else offs_r.to(tl.int64)
        x = tl.load(x_ptr + rows[:, None] * channels + offs_c[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        total += tl.sum(x.to(ACC), axis=0)
    return total


@triton.jit
def gather_bwd_chunks_kernel(
    dy_ptr, rows_ptr, order_ptr, sums_ptr, channels,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums [chunks, channels] of the chunks that belong to one row; the others stay unwritten and unread."""
    pid = tl.program_id(0)
    start, end = pid * CHUNK, pid * CHUNK + CHUNK
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = offs_c < channels
    if tl.load(rows_ptr + start) == tl.load(rows_ptr + end - 1):
        total = tl.zeros([BLOCK_C], ACC)
        total = _add_up(total, dy_ptr, order_ptr, start, end, offs_c, inside, channels, True, BLOCK_R, ACC)
        tl.store(sums_ptr + pid.to(tl.int64) * channels + offs_c, total, mask=inside)


@triton.jit
def gather_bwd_rows_kernel(
    dy_ptr, rows_ptr, order_ptr, ends_ptr, sums_ptr, d_table_ptr, channels,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d_table [n_rows, channels] at the rows that are read. The first of a row's sorted places does the work."""
    pid = tl.program_id(0)
    row = tl.load(rows_ptr + pid).to(tl.int64)
    before = tl.load(rows_ptr + pid - 1, mask=pid > 0, other=-1)
    if row != before:
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = offs_c < channels
        end = tl.load(ends_ptr + pid).to(tl.int32)
        first_chunk, end_chunk = (pid + CHUNK - 1) // CHUNK, end // CHUNK
        head_end = tl.minimum(end, first_chunk * CHUNK)
        tail = tl.maximum(head_end, end_chunk * CHUNK)
        total = tl.zeros([BLOCK_C], ACC)
        total = _add_up(total, dy_ptr, order_ptr, pid, head_end, offs_c, inside, channels, True, BLOCK_R, ACC)
        total = _add_up(
            total, sums_ptr, order_ptr, first_chunk, end_chunk, offs_c, inside, channels, False, BLOCK_R, ACC
        )
        total = _add_up(total, dy_ptr, order_ptr, tail, end, offs_c, inside, channels, True, BLOCK_R, ACC)
        tl.store(d_table_ptr + row * channels + offs_c, total.to(d_table_ptr.dtype.element_ty), mask=inside)


def launch_gather_backward(dy: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """d_table, like `table` [n_rows, C], of y = table[ids], ids [B]; dy [B, C] contiguous, in the dtype of the sums."""
    count, channels = dy.shape
    rows, order = torch.sort(ids.clamp(0, table.shape[0] - 1), stable=True)
    ends = torch.searchsorted(rows, rows, right=True)
    d_table = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    sums = torch.empty(count // CHUNK, channels, dtype=dy.dtype, device=dy.device)
    blocks = triton.cdiv(channels, BLOCK_C)
    tiles = {"CHUNK": CHUNK, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "ACC": triton_dtype(dy.dtype)}
    if count >= CHUNK:
        gather_bwd_chunks_kernel[(count // CHUNK, blocks)](
            dy, rows, order, sums, channels, **tiles, num_warps=NUM_WARPS
        )  # fmt: skip
    gather_bwd_rows_kernel[(count, blocks)](
        dy, rows, order, ends, sums, d_table, channels, **tiles, num_warps=NUM_WARPS
    )  # fmt: skip
    return d_table
