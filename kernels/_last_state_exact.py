"""The last position's closed form with one exponential per position, channel and state.

    y[e] = sum_t delta_te u_te sum_n C_n B_tn exp(A_en T_te)        T_te = sum_{s > t} delta_se

One warp walks over the positions of one row and block of channels, from the last one back, so that T grows from 0 and
the positions that matter most have the most accurate one. A [N, BLOCK_E] and T stay in registers; little is reduced
across lanes and nothing synchronises. T is a number and its rounding error (an exact sum of two): that costs eight
additions a position and channel, and frees the result from the length of the row.

Bound by the special-function unit: one exponential takes it eight cycles per warp; everything issues in six.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, load_length
from ._last_state_output import write_output
from ._last_state_steps import load_step, sum_of_steps, two_sum


@triton.jit(do_not_specialize=["batch", "seqlen"])
def last_state_exact_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, lengths_ptr, y_ptr, saved_ptr, parts_ptr,
    batch, dim, dstate, seqlen,
    stride_u_batch, stride_u_dim, stride_u_seqlen,
    stride_delta_batch, stride_delta_dim, stride_delta_seqlen,
    stride_B_batch, stride_B_dstate, stride_B_seqlen, stride_C_batch, stride_C_dstate, stride_z_batch, stride_z_dim,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SOFTPLUS: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A [dstate, dim] contiguous: transposed, it is loaded in the layout in which it is used."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_split = tl.program_id(2)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = tl.arange(0, BLOCK_N)
    mask_e = offs_e < dim
    mask_n = offs_n < dstate
    bias = tl.zeros([BLOCK_E], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(ACC)
    length = load_length(lengths_ptr, pid_b, seqlen, HAS_LENGTHS)
    u_row, B_row = u_ptr + pid_b * stride_u_batch, B_ptr + pid_b * stride_B_batch
    delta_row = delta_ptr + pid_b * stride_delta_batch

    # This split's positions are begin to end - 1; later ones only count with their steps.
    per_split = (length + SPLITS - 1) // SPLITS
    end = tl.maximum(length - pid_split * per_split, 0)
    begin = tl.maximum(end - per_split, 0)
    T = tl.zeros([BLOCK_E], ACC)
    rounding = tl.zeros([BLOCK_E], ACC)
    if SPLITS > 1:
        T, rounding = sum_of_steps(
            delta_row, end, length, offs_e, bias, dim, stride_delta_dim, stride_delta_seqlen, SOFTPLUS, BLOCK_E
        )
    total = tl.zeros([BLOCK_E], ACC)
    # [BLOCK_N, BLOCK_E]
    place_A = offs_n[:, None] * dim + offs_e[None, :]
    A = tl.load(A_ptr + place_A, mask=mask_n[:, None] & mask_e[None, :], other=0.0) * LOG2E
    C = tl.load(C_ptr + pid_b * stride_C_batch + offs_n * stride_C_dstate, mask=mask_n, other=0.0).to(ACC)
    for i in range(end - begin):
        t = (end - 1 - i).to(tl.int64)
        place = t * stride_u_seqlen + offs_e.to(tl.int64) * stride_u_dim
        u = tl.load(u_row + place, mask=mask_e, other=0.0).to(ACC)
        B = tl.load(B_row + t * stride_B_seqlen + offs_n * stride_B_dstate, mask=mask_n, other=0.0).to(ACC)
        _, delta = load_step(delta_row, t, offs_e, bias, dim, stride_delta_dim, stride_delta_seqlen, SOFTPLUS)
        decay = tl.exp2(A * (T + rounding)[None, :])  # [BLOCK_N, BLOCK_E]
        total += delta * u * tl.sum((C * B)[:, None] * decay, axis=0)
        T, lost = two_sum(T, delta)
        rounding += lost

    if SPLITS > 1:
        place = (pid_split * batch.to(tl.int64) + pid_b) * dim + offs_e
        tl.store(parts_ptr + place, total, mask=mask_e)
    else:
        write_output(
            total, pid_b, length - 1, offs_e, u_ptr, D_ptr, z_ptr, y_ptr, saved_ptr, dim,
            stride_u_batch, stride_u_dim, stride_u_seqlen, stride_z_batch, stride_z_dim, HAS_D, HAS_Z,
        )  # fmt: skip


def blocks(dim: int, dstate: int) -> dict[str, int]:
    """One warp, and as many channels as let A take 64 registers of each lane."""
    widest = {16: 128, 32: 64, 64: 32}[max(16, triton.next_power_of_2(dstate))]
    return {
        "BLOCK_N": triton.next_power_of_2(dstate),
        "BLOCK_E": max(32, min(widest, triton.next_power_of_2(dim))),
        "num_warps": 1,
    }
