"""A row's step sizes, and their sums without rounding errors.

The decay from a position to the last one depends on the sum of the steps between them. The forward pass sums from the
last position back, the backward pass starts from the sum of all and subtracts; both must agree at the end of a row,
where sums are small and count most. So sums are pairs: a number, and what was lost in rounding it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import softplus

# Positions that are summed at once where nothing else is computed from them.
BLOCK_T = tl.constexpr(4)


@triton.jit
def two_sum(a, b):
    """a + b rounded, and what the rounding lost, exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def load_step(delta_row, t, offs_e, bias, dim, stride_dim, stride_seqlen, SOFTPLUS: tl.constexpr):
    """delta at position t with its bias, before and after softplus: [BLOCK_E] each."""
    place = t * stride_seqlen + offs_e.to(tl.int64) * stride_dim
    raw = tl.load(delta_row + place, mask=offs_e < dim, other=0.0).to(bias.dtype) + bias
    return raw, softplus(raw) if SOFTPLUS else raw


@triton.jit
def sum_of_steps(
    delta_row, begin, end, offs_e, bias, dim, stride_dim, stride_seqlen,
    SOFTPLUS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The sum over positions begin to end - 1 and its rounding: [BLOCK_E] each."""
    sums = tl.zeros([BLOCK_T, BLOCK_E], bias.dtype)
    roundings = tl.zeros([BLOCK_T, BLOCK_E], bias.dtype)
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        inside = (offs_t < end)[:, None]
        place = offs_t.to(tl.int64)[:, None] * stride_seqlen + offs_e.to(tl.int64)[None, :] * stride_dim
        delta = tl.load(delta_row + place, mask=inside & (offs_e < dim)[None, :], other=0.0).to(bias.dtype)
        delta += bias[None, :]
        if SOFTPLUS:
            delta = softplus(delta)
        sums, lost = two_sum(sums, tl.where(inside, delta, 0.0))
        roundings += lost
    total = tl.zeros([BLOCK_E], bias.dtype)
    rounding = tl.sum(roundings, axis=0)
    for row in tl.static_range(BLOCK_T):
        one = tl.sum(tl.where((tl.arange(0, BLOCK_T) == row)[:, None], sums, 0.0), axis=0)
        total, lost = two_sum(total, one)
        rounding += lost
    return total, rounding
